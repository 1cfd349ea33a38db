"""The servers that clients ask: ours with the scripted model, or a gateway of ours to another server that has it.

That other server speaks like vLLM and fails as planned. A scene named after a fault meets it when a prompt comes for
the first time and not when it comes again, so a client that asks again gets all of the answer. Faults of a stream come
when most of the reply is out, which then looks like an answer.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm52.chat import ChatTemplate
from glm52.clients.probes import FAULTS, SCENES
from glm52.clients.script import Script, reply_to, scene_of
from glm52.config import GLMConfig
from glm52.engine import SamplingParams
from glm52.hub import NANO
from glm52.server.app import create_app
from glm52.server.service import Backend, Service
from glm52.server.upstream import Upstream, meet

_WINDOW, _SMALL_WINDOW = 1 << 20, 4096
_STALL_S = 1.0  # how long a gateway waits for what comes next


@dataclass
class Exchange:
    """A request as it came over HTTP, and the status of what it got."""

    path: str
    body: bytearray = field(default_factory=bytearray)
    status: int = 0


class Recorder:
    """Passes requests on and remembers them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.exchanges: list[Exchange] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        exchange = Exchange(scope["path"])
        self.exchanges.append(exchange)

        async def heard() -> Message:
            message = await receive()
            exchange.body += message.get("body", b"")
            return message

        async def said(message: Message) -> None:
            exchange.status = message.get("status", exchange.status)
            await send(message)

        await self._app(scope, heard, said)


class Faulty:
    """The server behind a gateway."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._seen: Counter[str] = Counter()
        self.app = Starlette(routes=[
            Route("/v1/models", self._models), Route("/v1/completions", self._complete, methods=["POST"]),
        ])  # fmt: skip

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "glm-5.2"}]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        text = self._script.tokenizer.decode(body["prompt"])
        self._seen[text] += 1
        fault = scene_of(text) if self._seen[text] % 2 else ""
        if fault == "bad-gateway":
            return PlainTextResponse("out of order", 502)
        return StreamingResponse(self._lines(body, text, fault), media_type="text/event-stream")

    async def _lines(self, body: Any, text: str, fault: str) -> AsyncIterator[str]:
        faulty_at = len(self._script.tokenizer.encode(reply_to(text))) * 3 // 4 if fault in FAULTS else -1
        num_said, num_cached = 0, 0
        async for event in self._script.generate(body["prompt"], SamplingParams(max_tokens=body["max_tokens"])):
            num_cached = event.seq.num_cached_tokens
            if num_said == faulty_at:
                if fault in ("cut", "cut-call"):
                    raise Planned
                if fault == "stall":
                    await asyncio.sleep(60 * _STALL_S)
                yield "data: {oops\n\n"
            choice = {"text": event.text, "token_ids": event.token_ids, "finish_reason": event.finish_reason}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            num_said += 1
        usage = {"prompt_tokens_details": {"cached_tokens": num_cached}}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


class Planned(Exception):
    """Ends a connection amid its reply; nobody needs to read of it."""


def _is_unplanned(record: logging.LogRecord) -> bool:
    return record.exc_info is None or not isinstance(record.exc_info[1], Planned)


@dataclass(frozen=True)
class Stage:
    """What a check plays on: two servers, one with a window so small that nothing long fits. scenes: what is played."""

    script: Script
    recorder: Recorder
    url: str
    small_url: str
    scenes: tuple[str, ...]


@contextlib.contextmanager
def stage(*, is_gateway: bool = False) -> Iterator[Stage]:
    """is_gateway: another server computes, and fails."""
    script, template = Script(), ChatTemplate.read(NANO)
    with contextlib.ExitStack() as stack:
        backend: Backend = stack.enter_context(_gateway_to(script)) if is_gateway else script

        def service(window: int) -> Service:
            return Service(backend, script.tokenizer, template, name="glm-5.2", context_length=window, defaults={})

        recorder = Recorder(create_app(service(_WINDOW)))
        url = stack.enter_context(served(recorder))
        small_url = stack.enter_context(served(create_app(service(_SMALL_WINDOW))))
        yield Stage(script, recorder, url, small_url, (*SCENES, *FAULTS) if is_gateway else tuple(SCENES))


@contextlib.contextmanager
def _gateway_to(script: Script) -> Iterator[Upstream]:
    config = dataclasses.replace(GLMConfig.read(NANO), max_position_embeddings=_WINDOW)
    logger = logging.getLogger("uvicorn.error")
    logger.addFilter(_is_unplanned)
    try:
        with served(Faulty(script).app) as url:
            yield Upstream(meet(url), script.tokenizer, config, stall_s=_STALL_S)
    finally:
        logger.removeFilter(_is_unplanned)


@contextlib.contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """A server on a free port of the loopback, for as long as the context lasts."""
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            started.set()

    server = Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    started.wait()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
