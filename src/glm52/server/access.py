"""Around all routes: each request has an id, is counted and leaves one line of JSON in the log, whatever becomes of it.

A GET leaves none unless it is refused. A line says how much was said and never what, unless that is asked for.
"""

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm52.errors import RequestError
from glm52.ids import new_id
from glm52.server.request import Json
from glm52.server.service import Call, Service

requests_log = logging.getLogger("glm52.requests")
_SANE = re.compile(rb"[\w.:/+=-]{1,128}", re.ASCII)  # ids that a header and a log can hold


@dataclass
class Entry:
    """What the routes find out about a request. own_id: what its body calls it. call: once it is being served. error:
    with which it was refused."""

    id: str
    client: str
    own_id: str = ""
    call: Call | None = None
    error: RequestError | None = None


class AccessLog:
    """The application and its log. name_of: what a path is counted as."""

    def __init__(self, app: ASGIApp, service: Service, name_of: Callable[[str], str]) -> None:
        self._app, self._service, self._name_of = app, service, name_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499
        peer = scope.get("client")
        entry = Entry(_id(scope), peer[0] if peer else "local")
        scope.setdefault("state", {})["entry"] = entry
        header = entry.id.encode()

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":  # OpenAI's clients read the one, Anthropic's the other
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", header), (b"request-id", header)]
                if scope["method"] == "POST" or entry.error:
                    self._service.metrics.count(self._name_of(scope["path"]), status)
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            if (scope["method"] == "POST" or entry.error) and requests_log.isEnabledFor(logging.INFO):
                line = self._line(scope["path"], entry, status) | {"total_s": round(time.monotonic() - began, 4)}
                requests_log.info("%s", json.dumps(line, ensure_ascii=False))

    def _line(self, path: str, entry: Entry, status: int) -> Json:
        """A stream that failed began as a 200: its status here is that of the error."""
        call, error = entry.call, entry.error
        if call is not None:
            status, error = call.status or status, error or call.error
        line: Json = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "id": entry.id,
            "dialect": self._name_of(path), "path": path[:200], "client": entry.client,
            "status": error.status if error else status,
        }  # fmt: skip
        if entry.own_id:
            line["request_id"] = entry.own_id[:200]
        if error is not None:
            line |= {"code": error.code, "param": error.param and error.param[:200]}
        return line | (call.figures() if call else {})


def _id(scope: Scope) -> str:
    """The client's own, if it is sane, or a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _SANE.fullmatch(given) else new_id("req_", 24)
