"""Servers for tests: a real one on a port of the loopback, over an engine or over a script that says what it is told."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import httpx
import uvicorn

from glm52.chat import ChatTemplate
from glm52.engine import Event, SamplingParams, Sequence, TokenLogprob
from glm52.engine.guide import Guide, Marks
from glm52.hub import NANO
from glm52.server.app import create_app
from glm52.server.limits import Limits
from glm52.server.service import Backend, Options, Service
from tests.scripted import EOS, TOKENIZER

TEMPLATE = ChatTemplate.read(NANO)
MARKS = Marks.of(TOKENIZER)
USER: list[Any] = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}  # fmt: skip


class Script:
    """A backend that says ``text``, ``stride`` tokens an event, and pauses before each. error: how it ends instead."""

    def __init__(self, text: str = "ok", delay_s: float = 0.0, stride: int = 1) -> None:
        self.text, self.delay_s, self.stride = text, delay_s, stride
        self.error: str | None = None
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.ended = 0

    async def generate(self, tokens: Iterable[int], params: SamplingParams) -> AsyncIterator[Event]:
        prompt = list(tokens)
        self.prompts.append(TOKENIZER.decode(prompt))
        self.params.append(params)
        seq = Sequence(
            id=0, prompt=prompt, params=params, seed=0, tokens=list(prompt), max_tokens=params.max_tokens,
            detokenizer=TOKENIZER.stream(), guide=Guide(prompt=prompt, marks=MARKS), num_cached_tokens=3,
        )  # fmt: skip
        ids = [*TOKENIZER.encode(self.text), EOS[1]]
        try:
            while seq.finish_reason is None:
                await asyncio.sleep(self.delay_s)
                if self.error and len(ids) == 1:
                    yield Event(seq=seq, finish_reason="error", error=self.error)
                    return
                chunk, ids = ids[: self.stride], ids[self.stride :]
                yield self._event(seq, chunk)
        finally:
            self.ended += 1

    def _event(self, seq: Sequence, chunk: list[int]) -> Event:
        said, text = [], ""
        for token in chunk:
            piece = seq.append(token, frozenset(EOS))
            if piece is not None:
                said.append(token)
                text += piece
            if seq.finish_reason is not None:
                text += seq.close_text()
                break
        logprobs = [TokenLogprob(t, -0.5, {t: -0.5, 1: -2.0}) for t in said] if seq.params.logprobs is not None else []
        return Event(seq=seq, token_ids=said, text=text, logprobs=logprobs, finish_reason=seq.finish_reason)


def scripted_service(backend: Backend, *, context_length: int = 512, **options: Any) -> Service:
    """nano's words without nano."""
    limits = {name: options.pop(name) for name in list(options) if name in Limits.__dataclass_fields__}
    return Service(
        backend, TOKENIZER, TEMPLATE, name="nano", context_length=context_length, defaults={},
        options=Options(limits=Limits(**limits), **options),
    )  # fmt: skip


@contextlib.contextmanager
def running(service: Service) -> Iterator[str]:
    """A real server on a free port of the loopback."""
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def asgi(service: Service) -> httpx.AsyncClient:
    """A client without a network."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://test")


def sse(body: str) -> list[tuple[str | None, str]]:
    """Name and data of each event."""
    out = []
    for block in body.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        name = next((x[7:] for x in lines if x.startswith("event: ")), None)
        out += [(name, x[6:]) for x in lines if x.startswith("data: ")]
    return out
