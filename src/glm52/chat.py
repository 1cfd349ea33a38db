"""The chat format of GLM-5.2: messages to prompt tokens, and the model's reply back to reasoning, text and tool calls.

Two inverses. ``ChatTemplate`` renders with the checkpoint's own Jinja template. ``ReplyParser`` reads a reply as it
arrives; whatever the split, the deltas joined equal the parse of the whole. It repairs or reports, and drops nothing
silently. Diagnostics, by their stable codes:

    unknown_tool       a call names no given tool: its text is passed on as content
    truncated_call     the reply ended inside a call: an unstarted call is content, started arguments stay unterminated
    json_style_call    a call written as JSON was read as one
    malformed_call     text where none belongs inside a call was left out (quoted in the message)
    missing_value      an argument key without a value was left out
    unclosed_value     an argument value ended with the call instead of </arg_value>
    duplicate_key      an argument given twice: the first stands
    argument_repaired  a value that was not JSON (True, None, 'x') was read as what it means
    argument_type      a value that fits no type of its schema was kept as a string
    stray_think        a <think> or </think> outside its place was left out of the content
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glm52 import ids
from glm52.errors import CheckpointError, RequestError
from glm52.tokenizer import Tokenizer

Message = Mapping[str, Any]
THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
KEY, END_KEY = "<arg_key>", "</arg_key>"
VALUE, END_VALUE = "<arg_value>", "</arg_value>"

# Reasoning tokens that an effort stands for where no budget is given.
BUDGETS = {"high": 4096, "max": 32_768}


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """How to think. budget: reasoning tokens, None = no limit. clear: drop the reasoning of earlier turns (None: the
    template's default, which drops it)."""

    enabled: bool = True
    effort: Literal["high", "max"] = "max"
    budget: int | None = None
    clear: bool | None = None


@dataclass(frozen=True)
class ToolCall:
    """One call. arguments: the text of a JSON object (unterminated if the reply was cut inside it)."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True)
class ContentDelta:
    text: str


@dataclass(frozen=True)
class ToolCallStart:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of the JSON text of call ``index``."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    index: int


@dataclass(frozen=True)
class Diagnostic:
    code: str
    message: str


Delta = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | Diagnostic


# A parser state: yields deltas, returns the state that follows or None for 'more text, please'.
Run = Generator[Delta, None, "Callable[[], Run] | None"]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A whole reply. reasoning None: there was none to read."""

    content: str
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    diagnostics: list[Diagnostic] = field(default_factory=list)


class ChatTemplate:
    """A folder's chat_template.jinja, compiled in a sandbox."""

    def __init__(self, source: str) -> None:
        self._template = _compile(source)

    @staticmethod
    def read(folder: Path) -> "ChatTemplate":
        file = folder / "chat_template.jinja"
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: expected a chat_template.jinja, found none; copy it from the model's repository"
            )
        try:
            return ChatTemplate(file.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: expected text in UTF-8 ({error}); fetch the file again") from error

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: Thinking | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt as text. Special-token strings inside messages are not neutralised: see ``render_ids``."""
        return self._render([_normalize(m) for m in messages], tools, thinking or Thinking(), add_generation_prompt)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, thinking: Thinking, generate: bool
    ) -> str:
        variables: dict[str, Any] = {"enable_thinking": thinking.enabled, "reasoning_effort": thinking.effort}
        if thinking.clear is not None:
            variables["clear_thinking"] = thinking.clear
        try:
            return self._template.render(
                messages=messages, tools=tools or None, add_generation_prompt=generate, **variables
            )
        except Exception as error:  # jinja2's own, or whatever an expression of the template raises
            found = f"{type(error).__name__}: {error}"
            raise RequestError(f"messages: the chat template rejects them ({found})", param="messages") from error

    def render_ids(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: Thinking | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt as token ids, in which only the template itself can open a turn, a thought or a call.

        A special token's string inside a message is cut by a Unicode noncharacter before rendering; the pieces are
        tokenised apart, so that the text is kept and no special id appears.
        """
        normal: list[Any] = [_normalize(m) for m in messages]
        held, cut = normal, None
        given = json.dumps([normal, tools], ensure_ascii=False)
        if any(token in given for token in tokenizer.special_tokens):
            cut = _unused_noncharacter(given)
            pattern = re.compile("|".join(map(re.escape, tokenizer.special_tokens)))
            held, tools = _cut_leaves([normal, tools], pattern, cut)
        text = self._render(held, tools, thinking or Thinking(), add_generation_prompt)
        pieces = [text] if cut is None else text.split(cut)
        return [i for piece in pieces for i in tokenizer.encode(piece)]

    def render_training(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: Thinking | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and which of them the assistant must produce.

        Supervised: reasoning, ``</think>``, content, calls, and the role token that ends the turn (``<|endoftext|>``
        or, after a call, ``<|observation|>`` where nothing follows). Not supervised: the opening ``<think>``, the empty
        pair when thinking is off, and turns whose reasoning the template left out.
        """
        thinking = thinking or Thinking()
        ids = self.render_ids(tokenizer, messages, tools, thinking, add_generation_prompt=False)
        stop = "<|observation|>" if messages[-1].get("tool_calls") else "<|endoftext|>"
        ids.append(_id(tokenizer, stop))
        begin_turn, think, end_think = (_id(tokenizer, t) for t in ("<|assistant|>", THINK, END_THINK))
        ends = {_id(tokenizer, t) for t in ("<|user|>", "<|observation|>", "<|endoftext|>")}
        mask = [False] * len(ids)
        at = 0
        while begin_turn in ids[at:]:
            at = ids.index(begin_turn, at) + 1
            end = next(i for i in range(at, len(ids)) if ids[i] in ends)
            empty = ids[at : at + 2] == [think, end_think]
            if not (empty and thinking.enabled):
                for i in range(at + (2 if empty else 1), end + 1):
                    mask[i] = True
            at = end
        return ids, mask


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.id(token)
    if found is None:
        raise CheckpointError(f"tokenizer.json: expected the special token {token}, found none; not a GLM tokenizer")
    return found


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"chat_template.jinja, line {error.lineno}: {error.message}") from error
    except (RecursionError, SyntaxError) as error:  # from Python, into which it is compiled
        raise CheckpointError(f"chat_template.jinja: nested too deep ({error}); fetch the file again") from error


def _normalize(message: Message) -> dict[str, Any]:
    """An OpenAI-style message as the template wants it: known roles, objects for arguments, reasoning apart."""
    out = dict(message)
    if out.get("role") == "developer":
        out["role"] = "system"
    if out.get("role") not in ("system", "user", "assistant", "tool"):
        raise RequestError(
            f"messages: expected role system, user, assistant or tool, found {out.get('role')!r}", param="messages"
        )
    content = out["content"] = _joined(out.get("content"))
    if out["role"] == "assistant":
        if isinstance(content, str) and END_THINK in content and not isinstance(out.get("reasoning_content"), str):
            out["reasoning_content"] = content.split(END_THINK)[0].split(THINK)[-1]
            out["content"] = content.split(END_THINK)[-1]
        out["tool_calls"] = [_normalize_call(call) for call in out.get("tool_calls") or []]
    return out


def _joined(content: Any) -> Any:
    """Adjacent texts as one: the template would put them together, and with them what must stay apart."""
    if not isinstance(content, list):
        return "" if content is None else content
    out: list[Any] = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if is_text and out and isinstance(out[-1], str):
            out[-1] += part["text"]
        else:
            out.append(part["text"] if is_text else part)
    parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in out]
    return out[0] if len(out) == 1 and isinstance(out[0], str) else parts


def _normalize_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function", call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            function["arguments"] = {"arguments": arguments}
    if not isinstance(function.get("arguments") or {}, dict):
        function["arguments"] = {"arguments": function["arguments"]}
    return {"function": function}


def _unused_noncharacter(text: str) -> str:
    unused = next((chr(c) for c in range(0xFDD0, 0xFDF0) if chr(c) not in text), None)
    if unused is None:
        raise RequestError(
            "messages: a text with all of U+FDD0 to U+FDEF may not name special tokens too", param="messages"
        )
    return unused


def _cut_leaves(value: Any, pattern: re.Pattern[str], cut: str) -> Any:
    """The same structure with a cut inside every match of the pattern in its strings."""
    if isinstance(value, str):
        return pattern.sub(lambda m: m.group()[0] + cut + m.group()[1:], value)
    if isinstance(value, Mapping):
        return {_cut_leaves(k, pattern, cut): _cut_leaves(v, pattern, cut) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_cut_leaves(v, pattern, cut) for v in value]
    return value


# ── Reading a reply ──────────────────────────────────────────────────────────────────────────────────────────────


def parse_reply(
    text: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    thinking: bool,
    new_id: Callable[[], str] | None = None,
) -> Reply:
    """Parse a whole reply; see ``ReplyParser``."""
    parser = ReplyParser(tools, thinking=thinking, new_id=new_id)
    return collect([*parser.feed(text), *parser.close()], thinking=thinking)


def collect(deltas: Sequence[Delta], *, thinking: bool) -> Reply:
    """Join the deltas of a reply."""
    calls: list[ToolCall] = []
    for d in deltas:
        if isinstance(d, ToolCallStart):
            calls.append(ToolCall(d.id, d.name, ""))
        elif isinstance(d, ToolCallArguments):
            old = calls[d.index]
            calls[d.index] = ToolCall(old.id, old.name, old.arguments + d.text)
    return Reply(
        reasoning="".join(d.text for d in deltas if isinstance(d, ReasoningDelta)) if thinking else None,
        content="".join(d.text for d in deltas if isinstance(d, ContentDelta)),
        tool_calls=calls,
        diagnostics=[d for d in deltas if isinstance(d, Diagnostic)],
    )


class ReplyParser:
    """An incremental parser of ``reasoning</think>content<tool_call>name<arg_key>k</arg_key><arg_value>v…``.

    thinking: the prompt ended inside ``<think>``. tools: OpenAI-style definitions; without any, calls are plain text.
    Content is stripped like the template strips it; reasoning is verbatim. Values of string type stream as they arrive,
    others when complete. verbatim: content is held to a form, so it is passed on to the letter; calls come before it or
    not at all.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        thinking: bool,
        new_id: Callable[[], str] | None = None,
        verbatim: bool = False,
    ) -> None:
        definitions = [t.get("function", t) for t in tools or []]
        self._schemas = {d["name"]: d.get("parameters") or {} for d in definitions}
        self._new_id = new_id or (lambda: ids.new_id("call_", 24))
        self._buffer = ""
        self._state = self._opening if thinking else self._content
        self._closed, self._verbatim = False, verbatim
        self._space = ""
        self._has_content = False
        self._index = -1
        self._name = self._key = self._value = ""
        self._seen: set[str] = set()
        self._string = False

    def feed(self, text: str) -> list[Delta]:
        """Deltas that ``text`` makes certain."""
        self._buffer += text
        return list(self._run())

    def close(self) -> list[Delta]:
        """Deltas of what was held back; the reply has ended."""
        self._closed = True
        return list(self._run())

    def _run(self) -> Generator[Delta, None, None]:
        """Run states until one needs more text. A state is a generator that returns the next state or None."""
        while True:
            following = yield from self._state()
            if following is None:
                return
            self._state = following

    def _until(self, *markers: str) -> tuple[str, str | None]:
        """Consume text up to the first marker -> (text before, marker); without one, all that cannot begin a marker."""
        last = self._buffer.rfind("<")  # every marker begins with one and has no other
        if last < 0:
            text, self._buffer = self._buffer, ""
            return text, None
        found = min(((self._buffer.find(m), m) for m in markers if m in self._buffer), default=None)
        if found is not None:
            at, marker = found
            before, self._buffer = self._buffer[:at], self._buffer[at + len(marker) :]
            return before, marker
        is_begun = any(m.startswith(self._buffer[last:]) for m in markers)
        split = last if is_begun and not self._closed else len(self._buffer)
        before, self._buffer = self._buffer[:split], self._buffer[split:]
        return before, None

    def _opening(self) -> Run:
        """The start of the reasoning, where a model may repeat the <think> of the prompt."""
        if not self._closed and len(self._buffer) < len(THINK) and THINK.startswith(self._buffer):
            return None
        if self._buffer.startswith(THINK):
            self._buffer = self._buffer[len(THINK) :]
            yield Diagnostic("stray_think", "the reply opened <think> again")
        return self._reasoning

    def _reasoning(self) -> Run:
        text, marker = self._until(END_THINK)
        if text:
            yield ReasoningDelta(text)
        return self._content if marker else None

    def _content(self) -> Run:
        calls = (CALL,) if self._schemas and not (self._verbatim and self._has_content) else ()
        text, marker = self._until(*calls) if self._verbatim else self._until(THINK, END_THINK, *calls)
        yield from self._emit(text)
        if marker == CALL:
            self._name = ""
            return self._call_name
        if marker:
            yield Diagnostic("stray_think", f"{marker} outside the reasoning was left out")
            return self._content
        return None

    def _emit(self, text: str) -> Generator[Delta, None, None]:
        """Content without white space at either end of the reply: white space waits until text follows it."""
        if self._verbatim:
            self._has_content |= bool(text)
            yield from [ContentDelta(text)] if text else []
            return
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if not self._has_content:
            kept = kept.lstrip()
        if kept:
            self._has_content = True
            yield ContentDelta(kept)
        elif not self._has_content:
            self._space = ""

    def _call_name(self) -> Run:
        text, marker = self._until(KEY, END_CALL, CALL)
        self._name += text
        if marker is None:
            if self._closed:
                yield Diagnostic("truncated_call", f"the reply ended inside the call {self._name[:80]!r}")
                yield from self._emit(CALL + self._name)
                self._name = ""
                self._state = self._content
            return None
        name = self._name.strip()
        if marker == END_CALL and "{" in name and name not in self._schemas:
            call = _json_call(name)
            if call and call[0] in self._schemas:
                yield Diagnostic("json_style_call", f"the call of {call[0]} was written as JSON")
                yield from self._start(call[0])
                yield ToolCallArguments(self._index, json.dumps(call[1], ensure_ascii=False))
                yield ToolCallEnd(self._index)
                return self._content
        if marker == CALL or name not in self._schemas:
            code = "malformed_call" if marker == CALL else "unknown_tool"
            yield Diagnostic(code, f"no tool is called {name[:80]!r}; its text was passed on as content")
            yield from self._emit(CALL + self._name + ("" if marker == CALL else marker))
            self._name = ""
            return self._call_name if marker == CALL else self._content
        yield from self._start(name)
        if marker == KEY:
            self._key = ""
            return self._arg_key
        return (yield from self._end_call())

    def _start(self, name: str) -> Generator[Delta, None, None]:
        self._index += 1
        self._name, self._seen = name, set()
        yield ToolCallStart(self._index, self._new_id(), name)

    def _end_call(self) -> Run:
        yield ToolCallArguments(self._index, "}" if self._seen else "{}")
        yield ToolCallEnd(self._index)
        return self._content

    def _truncated(self) -> Run:
        """The reply ended inside the arguments. They stay unterminated: half a command must not look like a whole."""
        if self._closed and self._state != self._ended:
            yield Diagnostic("truncated_call", f"the reply ended inside the arguments of {self._name}")
            return self._ended
        return None

    def _ended(self) -> Run:
        yield from ()
        return None

    def _arg_key(self) -> Run:
        text, marker = self._until(END_KEY, END_CALL)
        self._key += text
        if marker is None:
            return (yield from self._truncated())
        if marker == END_CALL:
            yield Diagnostic("missing_value", f"argument {self._key.strip()[:80]!r} has no value and was left out")
            return (yield from self._end_call())
        self._key, self._value = self._key.strip(), ""
        return self._after_key

    def _after_key(self) -> Run:
        text, marker = self._until(VALUE, KEY, END_CALL)
        self._value += text
        if marker is None:
            return (yield from self._truncated())
        if self._value.strip():
            yield Diagnostic("malformed_call", f"text between key and value was left out: {self._value.strip()[:80]!r}")
        self._value = ""
        if marker == VALUE:
            yield from self._begin_value()
            return self._arg_value
        yield Diagnostic("missing_value", f"argument {self._key[:80]!r} has no value and was left out")
        if marker == KEY:
            self._key = ""
            return self._arg_key
        return (yield from self._end_call())

    def _begin_value(self) -> Generator[Delta, None, None]:
        self._duplicate = self._key in self._seen
        self._string = _types(self._schemas[self._name], self._key) == {"string"} and not self._duplicate
        if self._duplicate:
            yield Diagnostic("duplicate_key", f"argument {self._key[:80]!r} was given twice; the first stands")
        else:
            lead = ", " if self._seen else "{"
            self._seen.add(self._key)
            opening = '"' if self._string else ""
            yield ToolCallArguments(self._index, f"{lead}{json.dumps(self._key, ensure_ascii=False)}: {opening}")

    def _arg_value(self) -> Run:
        """A value ends with </arg_value>; see ``_maybe_unclosed`` for one that ends with the call."""
        text, marker = self._until(END_VALUE, END_CALL)
        yield from self._more_value(text)
        if marker == END_VALUE:
            yield from self._finish_value()
            return self._after_value
        if marker == END_CALL:
            return self._maybe_unclosed
        return (yield from self._truncated())

    def _maybe_unclosed(self) -> Run:
        """A </tool_call> was read inside a value: part of it if </arg_value> follows before the next call begins."""
        found = {m: self._buffer.find(m) for m in (END_VALUE, CALL) if m in self._buffer}
        following = min(found, key=lambda m: found[m], default=None)
        if following == END_VALUE:
            yield from self._more_value(END_CALL)
            return self._arg_value
        if following is None and not self._closed:
            return None
        yield Diagnostic("unclosed_value", f"the value of {self._key[:80]!r} ended with the call")
        yield from self._finish_value()
        return (yield from self._end_call())

    def _more_value(self, text: str) -> Generator[Delta, None, None]:
        if self._string and text:
            yield ToolCallArguments(self._index, json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._value += text

    def _finish_value(self) -> Generator[Delta, None, None]:
        if self._string:
            yield ToolCallArguments(self._index, '"')
        elif not self._duplicate:
            value, diagnostic = read_value(self._value, _types(self._schemas[self._name], self._key))
            if diagnostic:
                yield Diagnostic(diagnostic, f"argument {self._key[:80]!r}: {self._value[:80]!r}")
            yield ToolCallArguments(self._index, json.dumps(value, ensure_ascii=False))
        self._value = ""

    def _after_value(self) -> Run:
        text, marker = self._until(KEY, END_CALL)
        self._value += text
        if marker is None:
            return (yield from self._truncated())
        if self._value.strip():
            yield Diagnostic("malformed_call", f"text after a value was left out: {self._value.strip()[:80]!r}")
        self._value = self._key = ""
        return self._arg_key if marker == KEY else (yield from self._end_call())


def _json_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """``{"name": n, "arguments": {...}}`` or ``n{...}`` -> name and arguments."""
    lead, _, rest = text.partition("{")
    try:
        data = json.loads("{" + rest)
    except ValueError:
        return None
    if lead.strip():
        return lead.strip(), data
    arguments = data.get("arguments", data.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    return (data["name"], arguments) if isinstance(data.get("name"), str) and isinstance(arguments, dict) else None


def _types(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """JSON types a property may have; empty = anything."""
    top = resolve_reference(schema, schema)
    if not isinstance(top, Mapping):
        return frozenset()
    properties = top.get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return argument_types(top.get("additionalProperties") if found is None else found, schema)


def argument_types(node: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """JSON types that a schema admits; empty = anything. root: the schema that its references start from."""
    return frozenset(_schema_types(node, root, 0))


def resolve_reference(node: Any, root: Mapping[str, Any]) -> Any:
    """The schema itself, or the one that its local ``$ref`` leads to."""
    for _ in range(8):
        reference = node.get("$ref") if isinstance(node, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return node
        node = root
        for part in reference[2:].split("/"):
            node = node.get(part) if isinstance(node, Mapping) else None
    return None


def _schema_types(node: Any, root: Mapping[str, Any], depth: int) -> set[str]:
    node = resolve_reference(node, root)
    if not isinstance(node, Mapping) or depth > 8:
        return set()
    kind = node.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {k for k in kind if isinstance(k, str)}
    if "const" in node:
        return {_type_of(node["const"])}
    if isinstance(node.get("enum"), list):
        return {_type_of(v) for v in node["enum"]}
    either = [_schema_types(b, root, depth + 1) for b in branches(node, "anyOf", "oneOf")]
    if either:
        return set().union(*either) if all(either) else set()
    every = [kinds for b in branches(node, "allOf") if (kinds := _schema_types(b, root, depth + 1))]
    return set.intersection(*every) if every else set()


def branches(schema: Mapping[str, Any], *words: str) -> list[Any]:
    """The schemas listed under some keywords; what is no list has none."""
    return [b for word in words if isinstance(schema.get(word), list) for b in schema[word]]


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}
    return names[type(value)]


_SURROGATE = re.compile("[\ud800-\udfff]")


def read_value(text: str, types: frozenset[str]) -> tuple[Any, str | None]:
    """The value a text stands for under a set of JSON types, and the code of a diagnostic if it had to be bent."""
    candidates: list[tuple[Any, str | None]] = []
    stripped = text.strip()
    try:
        candidates.append((json.loads(stripped, parse_constant=_reject, parse_float=_finite), None))
    except (ValueError, RecursionError):
        literal = _literal(stripped)
        if literal is not _NOTHING:
            candidates.append((literal, "argument_repaired"))
    for value, code in candidates:
        if _SURROGATE.search(json.dumps(value, ensure_ascii=False)):  # half a character: no client could read it
            continue
        kind = _type_of(value)
        if not types and kind != "string":
            return value, code if code is None else "argument_repaired"
        if kind in types or (kind == "integer" and "number" in types):
            return (text, None) if kind == "string" and "string" in types else (value, code)
        if kind == "number" and "integer" in types and float(value).is_integer():
            return int(value), "argument_repaired"
    return text, None if not types or "string" in types else "argument_type"


def _reject(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    """JSON can write numbers that no float holds; what is written on from them must stay JSON."""
    return min(max(float(digits), -sys.float_info.max), sys.float_info.max)


_NOTHING = object()


def _literal(text: str) -> Any:
    """What Python-style text means, if it is plain data; _NOTHING otherwise."""
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
        return json.loads(json.dumps(value, allow_nan=False))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return _NOTHING
