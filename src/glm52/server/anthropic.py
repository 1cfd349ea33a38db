"""The Anthropic messages dialect: a body to a ``ChatRequest``, answers to content blocks, whole or as events. Pure.

A message that is not streamed is the sum of the events that would have been, so that both are the same by construction.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Literal

from glm52.chat import ContentDelta, Delta, ReasoningDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from glm52.engine import TokenLogprob
from glm52.errors import ContextOverflow, RequestError
from glm52.grammar import Grammar
from glm52.ids import new_id
from glm52.server import thinking
from glm52.server.openai import tool_choice
from glm52.server.request import (
    Answer,
    Body,
    ChatRequest,
    Defaults,
    Frame,
    Json,
    Known,
    Sampling,
    Template,
    Usage,
    left_out,
    parsed_arguments,
    sampling,
    unknown_fields,
    validated,
)
from glm52.tokenizer import Tokenizer


class _Message(Body):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Json] | None = None


class _Tool(Body):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: Json | None = None
    defer_loading: bool | None = None


class MessagesBody(Sampling, thinking.ThinkingFields):
    """What a client may send; max_tokens may be missing. metadata and cache_control are accepted and mean nothing."""

    model: str | None = None
    messages: list[_Message]
    system: str | list[Json] | None = None
    max_tokens: int | None = None
    tools: list[_Tool] | None = None
    tool_choice: Annotated[Json | None, Known("type", "name", "disable_parallel_tool_use")] = None
    stop_sequences: list[str] | None = None
    repetition_detection: bool | None = None
    output_format: Annotated[Json | None, Known(*thinking.FORM)] = None
    stream: bool | None = None
    metadata: Json | None = None


def read(body: Any, defaults: Defaults) -> ChatRequest:
    """A decoded JSON body as a request; RequestError names the field at fault."""
    b = validated(MessagesBody, body)
    if not b.messages:
        raise RequestError("messages: expected at least one message, found none", param="messages")
    tools, skipped = _tools(b.tools or [])
    choice = tool_choice(b.tool_choice, tools)
    system = [{"role": "system", "content": text}] if (text := _text(b.system, "\n\n")) else []
    unsaid = [(f"messages.{i}.content.{j}", str(kind)) for i, m in enumerate(b.messages) for j, kind in _unsaid(m)]
    if b.messages[-1].role == "assistant":  # whose client puts the reply behind it
        unsaid.append((f"messages.{len(b.messages) - 1}", "not continued"))
    return ChatRequest(
        model=b.model or "",
        messages=[*system, *(m for i, given in enumerate(b.messages) for m in _messages(given, f"messages.{i}"))],
        params=sampling(b, defaults, coding=b.mode == "coding", max_tokens=b.max_tokens,
                        stop=tuple(b.stop_sequences or ()), names={"stop": "stop_sequences"}),
        thinking=thinking.read(b),
        show_reasoning=thinking.is_shown(b),
        tools=tools,
        tool_choice=choice,
        parallel_calls=not (b.tool_choice or {}).get("disable_parallel_tool_use"),
        structure=_structure(b),
        stream=bool(b.stream),
        ends_loops=b.repetition_detection is not False,
        ignored=(*unknown_fields(b), *thinking.unmade_edits(b), *skipped, *left_out(unsaid)),
    )  # fmt: skip


def _tools(given: Sequence[_Tool]) -> tuple[list[Json] | None, list[str]]:
    """Definitions in the form the template knows, and which tools only Anthropic's own servers could run."""
    kept, skipped = [], []
    for i, tool in enumerate(given):
        if tool.type not in (None, "custom"):
            skipped.append(f"tools.{i} ({tool.type})")
            continue
        schema = {k: v for k, v in (tool.input_schema or {"type": "object"}).items() if k != "$schema"}
        function: Json = {"name": tool.name, "description": tool.description or "", "parameters": schema}
        if tool.defer_loading:
            function["defer_loading"] = True
        kept.append({"type": "function", "function": function})
    return kept or None, skipped


def _structure(body: MessagesBody) -> Grammar | None:
    form = body.output_format or (body.output_config and body.output_config.format)
    if not form:
        return None
    at = "output_format" if body.output_format else "output_config.format"
    if form.get("type") != "json_schema":
        raise RequestError(f"{at}: expected type json_schema with a schema", param=at)
    return Grammar.structured("json_schema", form.get("schema"), param=f"{at}.schema")


# ── Messages ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _text(content: str | list[Json] | None, between: str = "") -> str:
    if isinstance(content, str):
        return content
    return between.join(str(b["text"]) for b in content or [] if b.get("type") == "text" and b.get("text"))


def _messages(message: _Message, where: str) -> list[Json]:
    """One message as those of the chat template: results of tools stand before the text that came with them."""
    content = [{"type": "text", "text": message.content}] if isinstance(message.content, str) else message.content or []
    if message.role in ("system", "developer"):
        return [{"role": "system", "content": _text(content, "\n\n")}]
    if message.role == "assistant":
        return [_assistant(content, where)]
    results = [_result(b, f"{where}.content.{i}") for i, b in enumerate(content) if b.get("type") == "tool_result"]
    parts = [p for b in content if b.get("type") != "tool_result" for p in _parts(b)]
    if results and parts and all(_is_reminder(p) for p in parts):  # a remark on the results opens no turn of the user
        results[-1]["content"] += parts
        parts = []
    user = [{"role": "user", "content": parts}] if parts or not results else []
    return [*results, *user]


def _is_reminder(part: Json) -> bool:
    text = str(part.get("text") or "").strip()
    return part["type"] == "text" and text.startswith("<system-reminder>") and text.endswith("</system-reminder>")


def _parts(block: Json) -> list[Json]:
    match block.get("type"):
        case "text":
            return [{"type": "text", "text": str(block.get("text") or "")}]
        case "image":
            return [{"type": "image"}]
        case "search_result":
            found = [f"{block[k]}\n" for k in ("title", "source") if isinstance(block.get(k), str)]
            return [{"type": "text", "text": "".join(found) + _text(_blocks(block.get("content")))}]
        case "document":
            source = block.get("source")
            if not isinstance(source, dict):
                return [_left_out("A document")]
            if source.get("type") == "text":
                return [{"type": "text", "text": str(source.get("data") or "")}]
            if source.get("type") == "content":
                inner = source.get("content")
                return [p for b in inner if isinstance(b, dict) for p in _parts(b)] if isinstance(inner, list) else [
                    {"type": "text", "text": str(inner or "")}
                ]  # fmt: skip
            return [_left_out("A document that is not text")]
        case kind:
            return [_left_out(f"A block of the type {kind}")]


def _left_out(what: str) -> Json:
    return {"type": "text", "text": f"<reminder>{what} was left out.</reminder>"}


def _blocks(content: Any) -> list[Json]:
    return [b for b in content if isinstance(b, dict)] if isinstance(content, list) else []


def _result(block: Json, where: str) -> Json:
    """References to tools become visible as those that were deferred, which the template does. A failure is said in
    words, unless the first line of its text has that word."""
    content = block.get("content")
    if not isinstance(content, str | list | None):
        raise RequestError(f"{where}.content: expected a string or a list of blocks", param=f"{where}.content")
    inner = [{"type": "text", "text": content}] if isinstance(content, str) else _blocks(content)
    parts: list[Json] = [{"type": "tool_reference", "name": b.get("tool_name")} for b in inner]
    if not inner or any(b.get("type") != "tool_reference" for b in inner):
        parts = [p for b in inner for p in _parts(b)]
    text = _text(parts)
    if block.get("is_error") and "error" not in text.lstrip().partition("\n")[0].lower():
        parts.insert(0, {"type": "text", "text": "Error: " if text else "Error"})
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": parts}


def _unsaid(message: _Message) -> list[tuple[int, Any]]:
    """Blocks of the assistant that no template has words for: what Anthropic's own servers ran."""
    if message.role != "assistant" or not isinstance(message.content, list):
        return []
    kinds = [b.get("type") for b in message.content]
    return [(i, kind) for i, kind in enumerate(kinds) if kind not in ("text", "thinking", "tool_use")]


def _assistant(content: list[Json], where: str) -> Json:
    out: Json = {"role": "assistant", "content": _text(content)}
    thoughts = [str(b["thinking"]) for b in content if b.get("type") == "thinking" and b.get("thinking")]
    if thoughts:
        out["reasoning_content"] = "".join(thoughts)
    calls = []
    for i, block in enumerate(content):
        if block.get("type") == "tool_use":
            if not isinstance(block.get("name"), str):
                at = f"{where}.content.{i}.name"
                raise RequestError(f"{at}: expected the name of a tool", param=at)
            function = {"name": block["name"], "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
    return out | ({"tool_calls": calls} if calls else {})


# ── Responses ────────────────────────────────────────────────────────────────────────────────────────────────────


class Writer:
    """Writes one message as events, and keeps the blocks they amount to."""

    keep_alive = b'event: ping\ndata: {"type": "ping"}\n\n'

    def __init__(self, request: ChatRequest, model: str, tokenizer: Tokenizer) -> None:
        self.request = request
        self.message: Json = {
            "id": new_id("msg_", 24), "type": "message", "role": "assistant", "model": model,
            "content": [], "stop_reason": None, "stop_sequence": None,
        }  # fmt: skip
        self._open: str | None = None
        self._arguments = ""
        self._template = cache(_make_template)

    def begin(self, prompt_tokens: int, cached_tokens: int) -> list[Frame]:
        usage = usage_payload(Usage(prompt_tokens=prompt_tokens, cached_tokens=cached_tokens))
        start = {"type": "message_start", "message": self.message | {"content": [], "usage": usage}}
        return [("message_start", start), ("ping", {"type": "ping"})]

    def more(self, answer: Answer, deltas: Sequence[Delta], logprobs: Sequence[TokenLogprob]) -> list[Frame]:
        return [f for d in deltas for f in self._delta(d)]

    def end(self, answer: Answer) -> list[Frame]:
        frames = self._close_block()
        if not self.message["content"]:
            frames += [*self._open_block("text", {"type": "text", "text": ""}), *self._close_block()]
        self.message |= {"stop_reason": stop_reason(answer), "stop_sequence": answer.stop_string}
        return frames

    def close(self, answers: Sequence[Answer], usage: Usage) -> list[Frame]:
        reasons = {"stop_reason": self.message["stop_reason"], "stop_sequence": self.message["stop_sequence"]}
        delta = {"type": "message_delta", "delta": reasons, "usage": usage_payload(usage)}
        return [("message_delta", delta), ("message_stop", {"type": "message_stop"})]

    def fail(self, error: RequestError) -> list[Frame]:
        return [("error", error_payload(error) | {"request_id": self.request.request_id})]

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Json:
        for answer in answers:
            self.more(answer, answer.said, [])
            self.end(answer)
        return self.message | {"usage": usage_payload(usage)}

    def _delta(self, delta: Delta) -> list[Frame]:
        match delta:
            case ReasoningDelta(text):
                opening = self._open_block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                self._block["thinking"] += text
                return [*opening, self._more("thinking_delta", "thinking", text)]
            case ContentDelta(text):
                opening = self._open_block("text", {"type": "text", "text": ""})
                self._block["text"] += text
                return [*opening, self._more("text_delta", "text", text)]
            case ToolCallStart(index, id, name):
                self._arguments = ""
                return self._open_block(f"call {index}", {"type": "tool_use", "id": id, "name": name, "input": {}})
            case ToolCallArguments(_, text):
                self._arguments += text
                return [self._more("input_json_delta", "partial_json", text)]
            case ToolCallEnd():
                return self._close_block()
            case _:
                return []

    @property
    def _block(self) -> Json:
        block: Json = self.message["content"][-1]
        return block

    def _open_block(self, kind: str, block: Json) -> list[Frame]:
        if self._open == kind:
            return []
        frames = self._close_block()
        self._open = kind
        self.message["content"].append(block)
        return [*frames, self._event("content_block_start", content_block=dict(block))]

    def _close_block(self) -> list[Frame]:
        if self._open is None:
            return []
        frames: list[Frame] = []
        if self._open == "thinking":
            self._block["signature"] = signature(self._block["thinking"])
            delta = {"type": "signature_delta", "signature": self._block["signature"]}
            frames.append(self._event("content_block_delta", delta=delta))
        elif self._open.startswith("call"):
            # A call that was cut off keeps what is certain of it; the stop reason says that it is not whole.
            self._block["input"] = parsed_arguments(self._arguments)
        self._open = None
        return [*frames, self._event("content_block_stop")]

    def _more(self, kind: str, field: str, text: str) -> Frame:
        return "content_block_delta", self._template(len(self.message["content"]) - 1, kind, field).filled(text)

    def _event(self, kind: str, **fields: Any) -> Frame:
        return kind, {"type": kind, "index": len(self.message["content"]) - 1, **fields}


def _make_template(index: int, kind: str, field: str) -> Template:
    return Template(lambda text: {"type": "content_block_delta", "index": index, "delta": {"type": kind, field: text}})


def signature(reasoning: str) -> str:
    """Names a reasoning; clients want a signature to send the block back."""
    return base64.b64encode(hashlib.sha256(reasoning.encode()).digest()).decode()


def stop_reason(answer: Answer) -> str:
    if answer.reason == "stop":
        return "tool_use" if answer.has_calls else "stop_sequence" if answer.stop_string else "end_turn"
    return {"length": "max_tokens", "context": "model_context_window_exceeded"}.get(answer.reason, answer.reason)


def usage_payload(usage: Usage) -> Json:
    out: Json = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
    if usage.reasoning_tokens:
        out["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    if usage.thinking_closed:
        out["thinking_closed"] = usage.thinking_closed
    return out | ({"cache_divergence": usage.divergence} if usage.divergence else {})


def error_payload(error: RequestError) -> Json:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
             429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}  # fmt: skip
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    message = str(error)
    if isinstance(error, ContextOverflow):
        message = f"prompt is too long: {error.prompt_tokens} tokens > {error.limit} maximum"
    return {"type": "error", "error": {"type": kind, "message": message}}
