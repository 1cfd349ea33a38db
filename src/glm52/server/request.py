"""The one request every dialect translates to, the one answer they write from, and how a body is read.

Null is absent. Fields nobody knows are accepted and listed, so that a response header can name them.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from glm52.chat import Delta, ReasoningDelta, Reply, ReplyParser, Thinking, ToolCallEnd, ToolCallStart, collect
from glm52.engine import Event, Repetition, SamplingParams, TokenLogprob
from glm52.errors import RequestError
from glm52.grammar import Grammar

Json = dict[str, Any]
Defaults = Mapping[str, Any]  # generation_config.json
CODING_SAMPLING: Json = {"temperature": 0.7, "top_p": 1.0}


class Body(BaseModel):
    """Strict about the types of what is known, open to what is not."""

    model_config = ConfigDict(extra="allow", strict=True)


class Known:
    """Beside a field that stays the dict it came as: what may stand in it, by paths. Below a path that goes on no
    further anything may."""

    def __init__(self, *paths: str) -> None:
        self.paths = paths

    def unknown(self, given: Json, at: str = "") -> list[str]:
        found = []
        for path, inner in ((f"{at}{key}", inner) for key, inner in sorted(given.items()) if inner is not None):
            if isinstance(inner, dict) and any(p.startswith(f"{path}.") for p in self.paths):
                found += self.unknown(inner, f"{path}.")
            elif path not in self.paths:
                found.append(path)
        return found


Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], body: Any) -> Model:
    """A decoded JSON body as ``kind``; RequestError names the field at fault."""
    if not isinstance(body, dict):
        raise RequestError(f"expected a JSON object, found {type(body).__name__}")
    given = {k: v for k, v in body.items() if v is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        errors = error.errors()
        # Of a union's branches, the one that fits furthest is the one that was meant.
        worst = max((e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]), key=lambda e: len(e["loc"]))
        where = _where(worst["loc"], given, worst["type"] == "missing")
        raise RequestError(f"{where}: {worst['msg']}", param=where) from error


def unknown_fields(body: Body) -> list[str]:
    """Paths of the fields that nobody knows, also of those inside of others. Messages and tools are lists, which the
    template may show whole, so nobody looks into them, nor into schemas."""
    found = sorted(name for name, value in (body.model_extra or {}).items() if value is not None)
    for name, inner in vars(body).items():
        if isinstance(inner, Body):
            found += [f"{name}.{path}" for path in unknown_fields(inner)]
        elif isinstance(inner, dict):
            known = (k for k in type(body).model_fields[name].metadata if isinstance(k, Known))
            found += [f"{name}.{path}" for k in known for path in k.unknown(inner)]
    return found


def _where(location: Sequence[int | str], body: Any, is_missing: bool) -> str:
    """The path of a field in the body, without the names pydantic gives to the branches of a union."""
    path, node = [], body
    for part in location:
        inside = node if isinstance(node, dict) else dict(enumerate(node)) if isinstance(node, list) else {}
        if part in inside:
            node = inside[part]
            path.append(str(part))
    if is_missing:
        path.append(str(location[-1]))
    return ".".join(path)


class Sampling(Body):
    """Fields of sampling that dialects share."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


def sampling(
    body: Sampling, defaults: Defaults, *, coding: bool = False, names: Mapping[str, str] | None = None, **more: Any
) -> SamplingParams:
    """Given fields before those of coding mode before the checkpoint's. more: fields that are the dialect's own. names:
    what the client calls those that the engine calls otherwise."""
    given = {name: getattr(body, name) for name in Sampling.model_fields}
    own = {n: defaults[n] for n in ("temperature", "top_p", "top_k") if defaults.get(n) is not None}
    known = own | (CODING_SAMPLING if coding else {}) | {k: v for k, v in given.items() if v is not None}
    known |= {"top_k": 0} if known.get("top_k") == -1 else {}  # vLLM's way to say all
    try:
        return SamplingParams(**known, **{k: v for k, v in more.items() if v is not None})
    except RequestError as error:
        name = (names or {}).get(error.param or "", error.param)
        raise RequestError(str(error).replace(f"{error.param}: ", f"{name}: ", 1), param=name) from error


def left_out(found: Sequence[tuple[str, str]]) -> list[str]:
    """Places and kinds of what a conversation loses, for ``ChatRequest.ignored``: a name for each kind, since a header
    that grows with the conversation is one that clients refuse."""
    places: dict[str, list[str]] = {}
    for at, kind in found:
        places.setdefault(kind, []).append(at)
    return [f"{at[0]} ({kind}{f' and {len(at) - 1} more' if at[1:] else ''})" for kind, at in places.items()]


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


@dataclass(frozen=True)
class ToolChoice:
    """Whether tools are called: as the model sees fit, never, at least one, or the one that is named. allowed: the
    names of those that may be; None: all."""

    kind: Literal["auto", "none", "required", "named"] = "auto"
    name: str | None = None
    allowed: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A conversation to continue, or ``prompts`` (texts or token ids) to continue as they stand.

    structure: the form the answer must have. ignored: fields of the body that were accepted and have no meaning here.
    ends_loops: whether a reply that goes round in circles is ended. n: answers for each prompt. request_id: as the
    client calls it, or as the log does. show_reasoning: whether it wants to see it. whole_calls: calls are streamed
    complete. raw: what the dialect wants to remember of the body for its answer."""

    model: str
    params: SamplingParams
    messages: list[Json] = field(default_factory=list)
    prompts: tuple[str | list[int], ...] | None = None
    thinking: Thinking = field(default_factory=Thinking)
    tools: list[Json] | None = None
    tool_choice: ToolChoice = ToolChoice()
    parallel_calls: bool = True
    structure: Grammar | None = None
    stream: bool = False
    include_usage: bool = False
    show_reasoning: bool = True
    whole_calls: bool = False
    echo: bool = False
    ends_loops: bool = True
    n: int = 1
    request_id: str = ""
    ignored: tuple[str, ...] = ()
    raw: Json = field(default_factory=dict)

    @property
    def callable_tools(self) -> list[Json] | None:
        """The prompt shows all tools whatever the choice, so that prefixes hit."""
        if self.tool_choice.kind == "none":
            return None
        allowed = self.tool_choice.allowed
        return self.tools if allowed is None else [t for t in self.tools or () if t["function"]["name"] in allowed]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one request. thinking_closed: how an over-long reasoning was ended. divergence: why the prefix cache
    held no more, if that was asked for."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    thinking_closed: Literal["soft", "hard"] | None = None
    divergence: Json | None = None


def guided(request: ChatRequest) -> SamplingParams:
    """Its sampling with what the reply must keep to: the form, and in a conversation also the budget of thinking, the
    tools, and no loops. RequestError if the form cannot be held."""
    grammar, choice = request.structure, request.tool_choice
    if request.prompts is not None:
        return request.params if grammar is None else replace(request.params, grammar=grammar)
    if request.tools and not (grammar and choice.kind == "none"):
        grammar = Grammar.tool_calls(
            request.callable_tools or (), choice.kind, name=choice.name, parallel=request.parallel_calls,
            answer=grammar, param="tools" if choice.kind in ("auto", "none") else "tool_choice",
        )  # fmt: skip
    budget = request.thinking.budget if request.thinking.enabled else None
    repetition = Repetition() if request.ends_loops else None
    return replace(request.params, grammar=grammar, thinking_budget=budget, repetition=repetition)


class Answer:
    """One reply while it arrives: parses the text, counts what it was made of. Pure: it is fed events.

    reason: why it ended, in the engine's words, and ``context`` where the model's longest context was the limit."""

    def __init__(self, request: ChatRequest, prompt: Sequence[int], index: int, *, context_length: int) -> None:
        self.request, self.prompt, self.index = request, prompt, index
        self._thinks = request.prompts is None and request.thinking.enabled
        self._parser = (
            ReplyParser(request.callable_tools, thinking=self._thinks, verbatim=request.structure is not None)
            if request.prompts is None
            else None
        )
        self._context_length = context_length
        self.deltas: list[Delta] = []
        self.text, self.reasoning = "", ""
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: Sequence[TokenLogprob | None] = ()
        self.tokens = list(prompt)
        self.reasoning_tokens = self.cached_tokens = 0
        self.thinking_closed: Literal["soft", "hard"] | None = None
        self.stop_string: str | None = None
        self.reason = ""

    def take(self, event: Event) -> list[Delta]:
        """What an event brings, without the reasoning where the client wants none."""
        seq = event.seq
        self.tokens += event.token_ids
        self.cached_tokens, self.reasoning_tokens = seq.num_cached_tokens, seq.num_reasoning
        self.thinking_closed = seq.thinking_closed
        self.logprobs += event.logprobs
        self.text += event.text
        new = self._parser.feed(event.text) if self._parser else []
        if event.finish_reason is not None:
            self.reason = event.finish_reason
            self.stop_string, self.prompt_logprobs = seq.stop_string, seq.prompt_logprobs
            if self.reason == "length" and len(self.tokens) >= self._context_length:
                self.reason = "context"
            new += self._parser.close() if self._parser else []
        self.reasoning += "".join(d.text for d in new if isinstance(d, ReasoningDelta))
        if not self.request.show_reasoning:
            new = [d for d in new if not isinstance(d, ReasoningDelta)]
        self.deltas += new
        return new

    @property
    def reply(self) -> Reply:
        return collect(self.said, thinking=self._thinks and self.request.show_reasoning)

    @property
    def said(self) -> list[Delta]:
        """The deltas of a whole reply: without a call that a stop string cut off, whose reason would not say so."""
        if self.reason != "stop" or self._num(ToolCallStart) == self._num(ToolCallEnd):
            return self.deltas
        return self.deltas[: max(i for i, d in enumerate(self.deltas) if isinstance(d, ToolCallStart))]

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def has_calls(self) -> bool:
        """Whether tools are called, and every call is whole."""
        return 0 < self._num(ToolCallStart) == self._num(ToolCallEnd)

    def _num(self, kind: type[Delta]) -> int:
        return sum(isinstance(d, kind) for d in self.deltas)


def parsed_arguments(text: str) -> Any:
    """The arguments of a call; of one that was cut off what is certain. The parser that reads halves gives up at a
    depth of 200."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text or "{}")
    try:
        return from_json(text, allow_partial=True)
    except ValueError:
        return {}


def usage_of(answers: Sequence[Answer], divergence: Json | None = None) -> Usage:
    """The sum over a request's answers; a prompt that was answered several times counts once."""
    firsts = {id(a.prompt): a for a in reversed(answers)}.values()
    closed = {a.thinking_closed for a in answers}
    return Usage(
        prompt_tokens=sum(len(a.prompt) for a in firsts),
        completion_tokens=sum(a.completion_tokens for a in answers),
        cached_tokens=sum(a.cached_tokens for a in firsts),
        reasoning_tokens=sum(a.reasoning_tokens for a in answers),
        thinking_closed="hard" if "hard" in closed else "soft" if "soft" in closed else None,
        divergence=divergence,
    )


def in_order_of_calls(messages: list[Json]) -> list[Json]:
    """The messages, with each run of tools' results in the order of the calls before it, which is all that the template
    tells them apart by. A run with an id that no call has, or two have, is left as it is."""
    out = list(messages)
    for at, message in enumerate(messages):
        calls = message.get("tool_calls") or ()
        run = list(takewhile(lambda m: m.get("role") == "tool", messages[at + 1 :])) if len(calls) > 1 else []
        places = {c["id"]: place for place, c in enumerate(calls) if isinstance(c.get("id"), str)}
        ids = [m.get("tool_call_id") for m in run]
        if len(places) == len(calls) and all(isinstance(i, str) and i in places for i in ids):
            out[at + 1 : at + 1 + len(run)] = sorted(run, key=lambda m: places[m["tool_call_id"]])
    return out


# ── What a dialect is ────────────────────────────────────────────────────────────────────────────────────────────

# A server-sent event: its name, or None where the dialect names none, and its data, encoded or not.
Frame = tuple[str | None, Json | str]
encoded = json.JSONEncoder(ensure_ascii=False).encode
_HOLE = "\ufdd0"  # no text has it: Unicode keeps it for uses like this


class Template:
    """The data of events that differ in one text, encoded but for that. make: the data around a text."""

    def __init__(self, make: Callable[[str], Json]) -> None:
        self._around = encoded(make(_HOLE)).split(encoded(_HOLE))

    def filled(self, text: str) -> str:
        return encoded(text).join(self._around)
