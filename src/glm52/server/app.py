"""The ASGI application: which route speaks which dialect, and one way to serve them all."""

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from glm52 import __version__
from glm52.errors import CapacityError, ContextOverflow, RequestError
from glm52.server import anthropic, completions, openai, page, responses, tokens, zai
from glm52.server.access import AccessLog
from glm52.server.http import EventStream, as_request_error, json_body, run_whole, sse
from glm52.server.openapi import document
from glm52.server.request import ChatRequest, Defaults, Json
from glm52.server.service import Call, Service

_LARGE_BODY = 1 << 16  # bytes from which a prompt is rendered off the event loop


@dataclass(frozen=True)
class Dialect:
    """Pure functions of one protocol. fails_in_stream: an overflow of a streamed request is an event, since its clients
    look for it there. signs_errors: whether they name the request. foreign: a prefix of other models' names that mean
    this one."""

    name: str
    read: Callable[[Any, Defaults], ChatRequest]
    writer: Callable[..., Any]
    error: Callable[[RequestError], Json]
    fails_in_stream: bool = False
    signs_errors: bool = False
    foreign: str | None = None


CHAT = Dialect("chat", openai.read, openai.Writer, openai.error_payload)
TEXT = Dialect("completions", completions.read, completions.Writer, openai.error_payload)
RESPONSES = Dialect("responses", responses.read, responses.Writer, openai.error_payload, fails_in_stream=True)
MESSAGES = Dialect(
    "messages", anthropic.read, anthropic.Writer, anthropic.error_payload, signs_errors=True, foreign="claude"
)
ZAI = Dialect("zai", zai.read, zai.Writer, zai.error_payload)
ZAI_CODING = replace(ZAI, read=zai.read_coding)
DIALECTS = {
    "/v1/chat/completions": CHAT, "/chat/completions": CHAT,
    "/v1/completions": TEXT,
    "/v1/responses": RESPONSES, "/responses": RESPONSES,
    "/v1/messages": MESSAGES, "/api/anthropic/v1/messages": MESSAGES,
    "/api/paas/v4/chat/completions": ZAI, "/api/coding/paas/v4/chat/completions": ZAI_CODING,
}  # fmt: skip
_COUNT, _TOKENS = replace(MESSAGES, name="count_tokens"), replace(CHAT, name="tokenize")
SMALL = {
    "/v1/messages/count_tokens": _COUNT, "/api/anthropic/v1/messages/count_tokens": _COUNT,
    "/tokenize": _TOKENS, "/detokenize": replace(CHAT, name="detokenize"),
}  # fmt: skip


def _client(request: Request) -> str:
    service: Service = request.app.state.service
    headers, peer = request.headers, request.client.host if request.client else "local"
    client = service.options.keys.client(headers.get("authorization"), headers.get("x-api-key"), peer)
    request.state.entry.client = client
    return client


async def _read(request: Request, dialect: Dialect) -> ChatRequest:
    """The body as a request for this model. The header x-glm52-mode, or the server's own mode, stands for the field."""
    service: Service = request.app.state.service
    body = await json_body(request, service.options.limits)
    mode = request.headers.get("x-glm52-mode") or service.options.mode
    if mode and isinstance(body, dict) and dialect is not TEXT:
        body["mode"] = body.get("mode") or mode
    chat, entry = dialect.read(body, service.defaults), request.state.entry
    entry.own_id = chat.request_id
    chat = replace(chat, request_id=chat.request_id or entry.id)
    _check_strict(request, chat.ignored)
    service.check_model(chat.model, any_of=dialect.foreign)
    return chat


def _check_strict(request: Request, ignored: Sequence[str]) -> None:
    if ignored and request.query_params.get("strict") == "1":
        raise RequestError(f"{ignored[0]}: not known here, and strict=1", param=ignored[0])


async def _converse(request: Request, dialect: Dialect) -> ASGIApp:
    service: Service = request.app.state.service
    client = _client(request)
    chat = await _read(request, dialect)
    writer = dialect.writer(chat, service.name, service.tokenizer)
    try:
        call = await _call(request, chat, client, dialect.name)
    except ContextOverflow as error:
        if not (dialect.fails_in_stream and chat.stream):
            raise
        request.state.entry.error = error
        return Response(sse([*writer.begin(0, 0), *writer.fail(error)]), media_type="text/event-stream")
    request.state.entry.call = call
    headers = _headers(chat.ignored, call.notes, call.unheld)
    service.gate.admit(len(call.answers))  # until call.finish
    if chat.stream:
        return EventStream(call, writer, headers)
    status = 499
    try:
        await run_whole(request, call)
        status = 200
    except ClientDisconnect:
        raise
    except Exception as error:
        known = as_request_error(error)
        status = known.status
        raise known from error
    finally:
        call.finish(status)
    return JSONResponse(writer.whole(call.answers, call.usage), headers=headers)


async def _call(request: Request, chat: ChatRequest, client: str, name: str) -> Call:
    service: Service = request.app.state.service
    explain = "cache" in request.headers.get("x-glm52-explain", "")
    begin = partial(service.call, chat, client, name, explain=explain, deadline_s=_deadline(request))
    is_large = int(request.headers.get("content-length") or _LARGE_BODY) >= _LARGE_BODY
    return await asyncio.to_thread(begin) if is_large else begin()


def _deadline(request: Request) -> float | None:
    given = request.headers.get("x-glm52-deadline-s")
    try:
        seconds = float(given) if given else None
    except ValueError:
        seconds = -1.0
    if seconds is not None and not 0 < seconds < float("inf"):
        raise RequestError(f"x-glm52-deadline-s: expected seconds, found {given!r}", param="x-glm52-deadline-s")
    return seconds


def _headers(ignored: Sequence[str], notes: Sequence[str] = (), unheld: Sequence[str] = ()) -> dict[str, str]:
    """What was accepted without effect, what was done to the prompt, and what of the schemas is not held."""
    said = {"x-glm52-ignored": ignored, "x-glm52-prompt": notes, "x-glm52-unheld": unheld}
    return {k: re.sub("[^ -~]", "?", ", ".join(v))[:1024] for k, v in said.items() if v}


# ── Other routes ─────────────────────────────────────────────────────────────────────────────────────────────────


async def count_tokens(request: Request) -> Response:
    service: Service = request.app.state.service
    client = _client(request)
    chat = await _read(request, MESSAGES)
    _, prompts, notes = await asyncio.to_thread(service.render, chat, client)
    return JSONResponse({"input_tokens": len(prompts[0])}, headers=_headers(chat.ignored, notes))


async def tokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    client = _client(request)
    body = await json_body(request, service.options.limits)
    out, ignored = await asyncio.to_thread(tokens.tokenize, service, client, body)
    _check_strict(request, ignored)
    return JSONResponse(out, headers=_headers(ignored))


async def detokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    _client(request)
    out, ignored = tokens.detokenize(service, await json_body(request, service.options.limits))
    _check_strict(request, ignored)
    return JSONResponse(out, headers=_headers(ignored))


async def models(request: Request) -> Response:
    service: Service = request.app.state.service
    _client(request)
    return JSONResponse(openai.models_payload(service.names, service.created, service.context_length))


async def model(request: Request) -> Response:
    service: Service = request.app.state.service
    _client(request)
    name = request.path_params["name"]
    if not name:
        return await models(request)
    service.check_model(name)
    return JSONResponse(openai.model_payload(name, service.created, service.context_length))


async def health(request: Request) -> Response:
    service: Service = request.app.state.service
    trouble = await service.trouble()
    state = {"status": trouble or "ok", "model": service.name, "running": service.gate.running,
             "waiting": service.gate.waiting}  # fmt: skip
    return JSONResponse(state, 503 if trouble else 200)


async def metrics(request: Request) -> Response:
    _client(request)
    return Response(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4")


async def openapi(request: Request) -> Response:
    return JSONResponse(document(request.app.state.service.name, __version__))


def _dialect_of(path: str) -> Dialect:
    """What a request is counted as, and which envelope an error on this path is told in."""
    known = DIALECTS.get(path) or SMALL.get(path)
    if known is not None:
        return known
    if "/messages" in path or path.startswith("/api/anthropic"):
        return replace(MESSAGES, name="other")
    return replace(ZAI if path.startswith(("/api/paas", "/api/coding")) else CHAT, name="other")


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    known, dialect = as_request_error(error), _dialect_of(request.url.path)
    request.state.entry.error = known
    headers = {"retry-after": "1"} if known.status in (429, 503) else {}
    if known.code == "shutting_down" or known.status == 500:  # after which uvicorn hangs up
        headers["connection"] = "close"
    if isinstance(error, HTTPException):
        headers |= dict(error.headers or {})
    signature = {"request_id": request.state.entry.id} if dialect.signs_errors else {}
    return JSONResponse(dialect.error(known) | signature, known.status, headers=headers)


def create_app(service: Service) -> ASGIApp:
    routes = [Route(path, partial(_converse, dialect=dialect), methods=["POST"]) for path, dialect in DIALECTS.items()]
    for prefix in ("/v1", "/api/paas/v4", "/api/coding/paas/v4", "/api/anthropic/v1"):
        routes += [Route(f"{prefix}/models", models), Route(f"{prefix}/models/{{name:path}}", model)]
    small = {"count_tokens": count_tokens, "tokenize": tokenize, "detokenize": detokenize}
    routes += [Route(path, small[kind.name], methods=["POST"]) for path, kind in SMALL.items()]
    routes += [
        *page.ROUTES, Route("/health", health), Route("/metrics", metrics), Route("/openapi.json", openapi),
    ]  # fmt: skip
    handled: tuple[type[Exception], ...] = (
        RequestError, CapacityError, HTTPException, ClientDisconnect, RecursionError, Exception,
    )  # fmt: skip
    app = Starlette(routes=routes, exception_handlers={kind: _on_error for kind in handled})
    app.state.service = service
    return AccessLog(app, service, lambda path: _dialect_of(path).name)
