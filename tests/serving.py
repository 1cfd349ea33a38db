"""Servers for tests: a real one on a port of the loopback, over an engine or over a script that says what it is told."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from glm52.chat import ChatTemplate
from glm52.engine import Event, SamplingParams, Sequence, TokenLogprob
from glm52.engine.guide import Guide, Marks
from glm52.hub import NANO
from glm52.server.app import create_app
from glm52.server.connections import Server
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
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(service)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
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


# ── What a dialect said, in one form for all ─────────────────────────────────────────────────────────────────────


@dataclass
class Said:
    """calls: names and the JSON text of their arguments."""

    reasoning: str = ""
    content: str = ""
    calls: list[list[str]] = field(default_factory=list)
    finish: str | None = None
    usage: Any = None


PATHS = {"chat": "/v1/chat/completions", "zai": "/api/paas/v4/chat/completions", "responses": "/v1/responses",
         "messages": "/v1/messages"}  # fmt: skip


def whole(dialect: str, body: Any) -> Said:
    """A body that was not streamed."""
    if dialect in ("chat", "zai"):
        choice = body["choices"][0]
        message = choice["message"]
        calls = [[c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls", ())]
        return Said(message.get("reasoning_content", ""), message["content"] or "", calls, choice["finish_reason"],
                    body["usage"])  # fmt: skip
    said = Said(usage=body["usage"])
    if dialect == "responses":
        said.finish = body["status"]
        for item in body["output"]:
            if item["type"] == "function_call":
                said.calls.append([item["name"], item["arguments"]])
            else:
                kind = "reasoning" if item["type"] == "reasoning" else "content"
                setattr(said, kind, getattr(said, kind) + "".join(p["text"] for p in item["content"]))
        return said
    said.finish = body["stop_reason"]
    for block in body["content"]:
        if block["type"] == "tool_use":
            said.calls.append([block["name"], json.dumps(block["input"], ensure_ascii=False)])
        said.reasoning += block.get("thinking", "")
        said.content += block.get("text", "")
    return said


def streamed(dialect: str, frames: list[tuple[str | None, str]]) -> Said:
    """What the increments of a stream amount to, as a client puts them together."""
    said = Said()
    if dialect in ("chat", "zai"):
        assert frames[-1] == (None, "[DONE]"), frames[-3:]
        frames = frames[:-1]
    for name, data in frames:
        event = json.loads(data)
        {"chat": _chunk, "zai": _chunk, "responses": _typed, "messages": _block}[dialect](said, name, event)
    return said


def _chunk(said: Said, name: str | None, event: Any) -> None:
    assert name is None
    said.usage = event.get("usage", said.usage)
    for choice in event["choices"]:
        delta = choice["delta"]
        said.reasoning += delta.get("reasoning_content", "")
        said.content += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(said.calls):
                said.calls.append([call["function"]["name"], ""])
            said.calls[call["index"]][1] += call["function"]["arguments"]
        assert said.finish is None, "nothing follows the reason"
        said.finish = choice["finish_reason"]


def _typed(said: Said, name: str | None, event: Any) -> None:
    assert name == event["type"]
    match name:
        case "response.reasoning_text.delta":
            said.reasoning += event["delta"]
        case "response.output_text.delta":
            said.content += event["delta"]
        case "response.output_item.added" if event["item"]["type"] == "function_call":
            said.calls.append([event["item"]["name"], ""])
        case "response.function_call_arguments.delta":
            said.calls[-1][1] += event["delta"]
        case "response.completed" | "response.incomplete":
            said.usage, said.finish = event["response"]["usage"], event["response"]["status"]
            assert whole("responses", event["response"]) == said


def _block(said: Said, name: str | None, event: Any) -> None:
    assert name == event["type"]
    if name == "content_block_start" and event["content_block"]["type"] == "tool_use":
        said.calls.append([event["content_block"]["name"], ""])
    elif name == "content_block_delta":
        delta = event["delta"]
        said.reasoning += delta.get("thinking", "")
        said.content += delta.get("text", "")
        if "partial_json" in delta:
            said.calls[-1][1] += delta["partial_json"]
    elif name == "message_delta":
        said.finish, said.usage = event["delta"]["stop_reason"], event["usage"]


def ask(
    client: httpx.Client, dialect: str, question: str, *, max_tokens: int, stream: bool = False, **fields: Any
) -> Said:
    """One question in any dialect."""
    body = {"stream": stream, **fields}
    if dialect == "responses":
        body |= {"input": question, "max_output_tokens": max_tokens}
    else:
        body |= {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens}
    if dialect == "chat":
        body["stream_options"] = {"include_usage": True}
    reply = client.post(PATHS[dialect], json=body)
    assert reply.status_code == 200, reply.text
    return streamed(dialect, sse(reply.text)) if stream else whole(dialect, reply.json())


def schema_fields(dialect: str, schema: Any) -> dict[str, Any]:
    """How a dialect asks for JSON by a schema."""
    if dialect == "responses":
        return {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}
    if dialect == "messages":
        return {"output_format": {"type": "json_schema", "schema": schema}}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
