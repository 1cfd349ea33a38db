"""The page at ``/``: a chat over ``/v1/chat/completions`` in a few files, written by hand and served as they are.

It loads nothing from elsewhere and may not: its Content-Security-Policy names this server alone.
"""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_FILES = ("chat.js", "markdown.js", "stream.js", "style.css", "tools.js")
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


async def _serve(request: Request) -> Response:
    name = request.url.path.removeprefix("/page/").lstrip("/") or "index.html"
    return FileResponse(_FOLDER / name, media_type=_TYPES[Path(name).suffix], headers=_HEADERS)


ROUTES = [Route("/", _serve), *(Route(f"/page/{name}", _serve) for name in _FILES)]
