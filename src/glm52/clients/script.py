"""A model without weights that says what a check needs, and the server around it.

What it says is a function of the prompt: a mark such as ``[check:tools]`` in a user's text names the scene, the tools
that the client offers are called by their own schemas, and what a tool found is told in the answer.
"""

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm52.chat import ChatTemplate
from glm52.config import GLMConfig
from glm52.engine import Event, SamplingParams, Sequence
from glm52.engine.guide import Guide, Marks
from glm52.hub import NANO
from glm52.server.app import create_app
from glm52.server.service import Service
from glm52.tokenizer import Tokenizer

THOUGHT = "Let me look at this first."
ANSWER = "The answer is forty-two."
_MARK = re.compile(r"\[check:([a-z-]+)\]")
_TOOLS = re.compile(r"<tools>\n(.*?)</tools>", re.DOTALL)
_COMMANDS = ("command", "cmd", "commands")
_WINDOW, _SMALL_WINDOW = 1 << 20, 4096


@dataclass
class Turn:
    """A prompt that is answered. is_cut: the reply is over and did not come to its end."""

    prompt: str
    num_tokens: int
    num_cached: int
    is_cut: bool = False


@dataclass
class Exchange:
    """A request as it came over HTTP, and the status of what it got."""

    path: str
    body: bytearray = field(default_factory=bytearray)
    status: int = 0


class Script:
    """The backend. Prompts share prefixes as in a cache that forgets nothing."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.read(NANO)
        self.eos = frozenset(GLMConfig.read(NANO).eos_token_id)
        self._marks = Marks.of(self.tokenizer)
        self._known: list[list[int]] = []
        self.turns: list[Turn] = []

    async def generate(self, tokens: Iterable[int], params: SamplingParams) -> AsyncIterator[Event]:
        prompt = list(tokens)
        text = self.tokenizer.decode(prompt)
        turn = Turn(text, len(prompt), self._cached(prompt))
        self.turns.append(turn)
        seq = Sequence(
            id=0, prompt=prompt, params=params, seed=0, tokens=list(prompt), max_tokens=params.max_tokens,
            detokenizer=self.tokenizer.stream(), guide=Guide(prompt=prompt, marks=self._marks),
            num_cached_tokens=turn.num_cached,
        )  # fmt: skip
        pause_s = 0.02 if scene_of(text) == "hang-up" else 0.0
        try:
            for token in [*self.tokenizer.encode(reply_to(text)), min(self.eos)]:
                await asyncio.sleep(pause_s)
                piece = seq.append(token, self.eos)
                rest = seq.close_text() if seq.finish_reason else ""
                yield Event(seq=seq, token_ids=[] if piece is None else [token], text=(piece or "") + rest,
                            finish_reason=seq.finish_reason)  # fmt: skip
                if seq.finish_reason is not None:
                    return
        finally:
            turn.is_cut = seq.finish_reason is None
            self._known.append(seq.tokens)

    def _cached(self, prompt: list[int]) -> int:
        return max((_shared(prompt[:-1], known) for known in self._known), default=0)


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def scene_of(prompt: str) -> str:
    marks = _MARK.findall(prompt)
    return marks[-1] if marks else ""


def reply_to(prompt: str) -> str:
    """What the model says after a rendered prompt. Pure."""
    thought = f"{THOUGHT}</think>" if prompt.endswith("<think>") else ""
    scene, since = scene_of(prompt), _MARK.split(prompt)[-1]
    if scene == "hang-up":
        return thought + "On and on it goes. " * 500
    commands = {"tools": ["cat note-1.txt"], "cache": ["cat note-1.txt"], "reasoning": ["cat note-1.txt"],
                "parallel": ["cat note-1.txt", "cat note-2.txt"]}.get(scene, [])  # fmt: skip
    found = _TOOLS.search(prompt)
    tools = [json.loads(line) for line in found[1].splitlines() if line.strip()] if found else []
    if "<tool_response>" in since:
        return f"{thought}The notes say: {', '.join(re.findall('word-[a-z0-9]+', since))}."
    calls = [call for command in commands if (call := shell_call(tools, command))]
    return thought + ("".join(calls) or ANSWER)


def shell_call(tools: list[Any], command: str) -> str | None:
    """A call of whichever tool requires a command, its other required arguments filled by their types."""
    for tool in tools:
        parameters = tool.get("parameters") or {}
        properties, required = parameters.get("properties") or {}, parameters.get("required", ())
        key = next((k for k in _COMMANDS if k in properties and k in required), None)
        if key is not None:
            values = {k: _some(properties.get(k, {})) for k in required if k != key}
            is_list = properties[key].get("type") == "array"
            value = (["bash", "-c", command] if key == "command" else [command]) if is_list else command
            said = {key: value, **values}.items()
            arguments = "".join(f"<arg_key>{k}</arg_key><arg_value>{_text(v)}</arg_value>" for k, v in said)
            return f"<tool_call>{tool['name']}{arguments}</tool_call>"
    return None


def _some(schema: Any) -> Any:
    if schema.get("enum"):
        return schema["enum"][0]
    return {"boolean": False, "integer": 1, "number": 1, "array": [], "object": {}}.get(
        schema.get("type", ""), "read a note"
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ── The servers ──────────────────────────────────────────────────────────────────────────────────────────────────


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


@dataclass(frozen=True)
class Stage:
    """What a check plays on: two servers, one with a window so small that nothing long fits."""

    script: Script
    recorder: Recorder
    url: str
    small_url: str


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    script = Script()
    template = ChatTemplate.read(NANO)

    def service(window: int) -> Service:
        return Service(script, script.tokenizer, template, name="glm-5.2", context_length=window, defaults={})

    recorder = Recorder(create_app(service(_WINDOW)))
    with served(recorder) as url, served(create_app(service(_SMALL_WINDOW))) as small_url:
        yield Stage(script, recorder, url, small_url)


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
