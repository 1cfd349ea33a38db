"""The OpenAI chat-completions dialect: a body to a ``ChatRequest``, deltas to chunks or one completion. Pure functions.

Fields that are null are absent. Fields nobody knows are accepted and listed, so that a response header can name them.
Reasoning goes out as ``reasoning_content`` and as ``reasoning``, since clients read one or the other.
"""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from glm52.chat import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    Reply,
    Thinking,
    ToolCallArguments,
    ToolCallStart,
)
from glm52.engine import SamplingParams, TokenLogprob
from glm52.errors import RequestError
from glm52.server.request import ChatRequest, Usage
from glm52.tokenizer import Tokenizer

Json = dict[str, Any]
_OFF = {"none", "minimal"}
_HIGH = {"low", "medium", "high"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Part(_Strict):
    type: str
    text: str | None = None


class _Function(_Strict):
    name: str
    arguments: str | Json | None = None


class _Call(_Strict):
    function: _Function


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None


class _Definition(_Strict):
    name: str
    parameters: Json | None = None


class _Tool(_Strict):
    type: Literal["function"] = "function"
    function: _Definition


class _StreamOptions(_Strict):
    include_usage: bool | None = None


class _Thinking(_Strict):
    type: Literal["enabled", "disabled"] | None = None
    clear_thinking: bool | None = None


class _TemplateOptions(_Strict):
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    clear_thinking: bool | None = None


class ChatBody(_Strict):
    """What a client may send. Every field but model and messages may be missing or null."""

    model: str | None = None
    messages: list[_Message]
    tools: list[_Tool] | None = None
    tool_choice: str | Json | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    n: int | None = None
    reasoning_effort: str | None = None
    thinking: _Thinking | None = None
    chat_template_kwargs: _TemplateOptions | None = None


def read_request(body: Any, defaults: Mapping[str, Any]) -> ChatRequest:
    """A decoded JSON body as a request; RequestError names the field at fault. defaults: generation_config.json."""
    if not isinstance(body, dict):
        raise RequestError(f"expected a JSON object, found {type(body).__name__}")
    try:
        chat = ChatBody.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"] if p not in ("str", "list[_Part]", "function-after"))
        raise RequestError(f"{where}: {first['msg']}", param=where) from error
    if not chat.messages:
        raise RequestError("messages: expected at least one message, found none", param="messages")
    if chat.n is not None and not 1 <= chat.n <= 8:
        raise RequestError(f"n: expected 1 to 8, found {chat.n}", param="n")
    return ChatRequest(
        model=chat.model or "",
        messages=[_message(m) for m in chat.messages],
        params=_params(chat, defaults),
        thinking=_thinking(chat),
        tools=_tools(chat),
        stream=bool(chat.stream),
        include_usage=bool(chat.stream_options and chat.stream_options.include_usage),
        n=chat.n or 1,
        ignored=tuple(sorted(chat.model_extra or ())),
    )


def _message(message: _Message) -> Json:
    out = message.model_dump(exclude_none=True)
    if "reasoning" in out:
        out.setdefault("reasoning_content", out.pop("reasoning"))
    return out


def _tools(chat: ChatBody) -> list[Json] | None:
    choice = chat.tool_choice
    if choice not in (None, "auto", "none"):
        raise RequestError(
            f"tool_choice: 'auto' and 'none' are supported, found {json.dumps(choice)}", param="tool_choice"
        )
    if choice == "none" or not chat.tools:
        return None
    return [t.model_dump(exclude_none=True) for t in chat.tools]


def _thinking(chat: ChatBody) -> Thinking:
    """thinking.type, then chat_template_kwargs, then reasoning_effort decide; the default is on, with effort max."""
    options = chat.chat_template_kwargs or _TemplateOptions()
    given = chat.thinking or _Thinking()
    effort = chat.reasoning_effort or options.reasoning_effort
    if effort is not None and effort not in _OFF | _HIGH | {"xhigh", "max"}:
        raise RequestError(
            f"reasoning_effort: expected none, minimal, low, medium, high, xhigh or max, found {effort!r}",
            param="reasoning_effort",
        )
    enabled = effort not in _OFF
    if options.enable_thinking is not None:
        enabled = options.enable_thinking
    if given.type is not None:
        enabled = given.type == "enabled"
    clear = options.clear_thinking if given.clear_thinking is None else given.clear_thinking
    return Thinking(enabled=enabled, effort="high" if effort in _HIGH else "max", clear=clear)


def _params(chat: ChatBody, defaults: Mapping[str, Any]) -> SamplingParams:
    given: Json = {
        name: getattr(chat, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                     "repetition_penalty", "seed")
        if getattr(chat, name) is not None
    }  # fmt: skip
    for name in ("temperature", "top_p", "top_k"):
        if name not in given and defaults.get(name) is not None:
            given[name] = defaults[name]
    limit = chat.max_completion_tokens if chat.max_completion_tokens is not None else chat.max_tokens
    if limit is not None:
        given["max_tokens"] = limit
    stop = [chat.stop] if isinstance(chat.stop, str) else chat.stop or []
    try:
        bias = {int(k): v for k, v in (chat.logit_bias or {}).items()}
    except ValueError as error:
        raise RequestError("logit_bias: expected token ids as keys", param="logit_bias") from error
    return SamplingParams(
        **given, stop=tuple(stop), logit_bias=bias, logprobs=(chat.top_logprobs or 0) if chat.logprobs else None
    )


# ── Responses ────────────────────────────────────────────────────────────────────────────────────────────────────


class Writer:
    """Writes one response: its id and time are drawn once."""

    def __init__(self, request: ChatRequest, model: str) -> None:
        self.request, self.model = request, model
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def chunk(self, index: int, delta: Json, finish_reason: str | None = None, logprobs: Json | None = None) -> Json:
        choice: Json = {"index": index, "delta": delta, "finish_reason": finish_reason}
        if logprobs is not None:
            choice["logprobs"] = logprobs
        return self._envelope("chat.completion.chunk") | {"choices": [choice]}

    def chunks(self, index: int, deltas: Iterable[Delta]) -> list[Json]:
        """Stream chunks of parser deltas; diagnostics are not part of this dialect."""
        payloads = (delta_payload(d) for d in deltas)
        return [self.chunk(index, p) for p in payloads if p is not None]

    def usage_chunk(self, usage: Usage) -> Json:
        return self._envelope("chat.completion.chunk") | {"choices": [], "usage": usage_payload(usage)}

    def completion(self, choices: Sequence[Json], usage: Usage) -> Json:
        return self._envelope("chat.completion") | {"choices": list(choices), "usage": usage_payload(usage)}

    def _envelope(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def choice_payload(index: int, reply: Reply, finish_reason: str, logprobs: Json | None) -> Json:
    """One choice of a completion that is not streamed."""
    message: Json = {"role": "assistant", "content": reply.content or (None if reply.tool_calls else "")}
    if reply.reasoning:
        message |= {"reasoning_content": reply.reasoning, "reasoning": reply.reasoning}
    if reply.tool_calls:
        message["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in reply.tool_calls
        ]
    return {"index": index, "message": message, "finish_reason": finish_reason, "logprobs": logprobs}


def delta_payload(delta: Delta) -> Json | None:
    """The ``delta`` of a chunk. The name of a call comes once and whole, its arguments as growing JSON text."""
    match delta:
        case ReasoningDelta(text):
            return {"reasoning_content": text, "reasoning": text}
        case ContentDelta(text):
            return {"content": text}
        case ToolCallStart(index, id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
        case ToolCallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case _:
            return None


def finish_reason(engine_reason: str, has_calls: bool) -> str:
    return "tool_calls" if has_calls and engine_reason == "stop" else engine_reason


def usage_payload(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def logprobs_payload(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> Json:
    def entry(token: int, logprob: float) -> Json:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {"content": [
        entry(t.token_id, t.logprob) | {"top_logprobs": [entry(i, p) for i, p in t.top.items()]} for t in logprobs
    ]}  # fmt: skip


def error_payload(message: str, status: int, param: str | None = None, code: str | None = None) -> Json:
    kind = (
        "invalid_request_error"
        if status < 500 and status != 429
        else "rate_limit_error"
        if status == 429
        else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def models_payload(names: Sequence[str], created: int, context_length: int) -> Json:
    return {"object": "list", "data": [model_payload(n, created, context_length) for n in names]}


def model_payload(name: str, created: int, context_length: int) -> Json:
    return {"id": name, "object": "model", "created": created, "owned_by": "glm52", "max_model_len": context_length}
