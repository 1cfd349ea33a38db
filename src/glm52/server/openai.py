"""The OpenAI chat-completions dialect: a body to a ``ChatRequest``, answers to chunks or one completion. Pure.

Reasoning goes out as ``reasoning_content`` and as ``reasoning``, since clients read one or the other.
"""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field

from glm52.chat import (
    CALL,
    END_CALL,
    END_THINK,
    THINK,
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from glm52.engine import TokenLogprob
from glm52.errors import RequestError
from glm52.grammar import Grammar
from glm52.ids import new_id
from glm52.server import thinking
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
    ToolChoice,
    Usage,
    sampling,
    stop_strings,
    unknown_fields,
    validated,
)
from glm52.tokenizer import Tokenizer

MAX_ANSWERS = 8
# Parts that say nothing where they have no text: thoughts of other models are theirs.
_WORDLESS_PARTS = ("text", "thinking", "redacted_thinking", "reasoning")
# Parts without text that the template has words for.
_TEMPLATE_PARTS = ("image", "image_url", "input_image", "video", "video_url", "audio", "input_audio", "tool_reference")
# What tool_choice may hold, nested as in chat completions, flat as in responses.
CHOICE = ("type", "function.name", "allowed_tools.mode", "allowed_tools.tools", "name", "mode", "tools")
SCHEMA = ("name", "description", "schema", "strict")
# Names of vLLM's for forms, and ours.
_FORMS: dict[str, Literal["json_schema", "regex", "grammar", "choice"]] = {
    "json": "json_schema", "regex": "regex", "grammar": "grammar", "choice": "choice"
}  # fmt: skip


class _StreamOptions(Body):
    include_usage: bool | None = None


class _Structured(Body):
    json_schema: Json | str | None = Field(default=None, alias="json")
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None


class SharedBody(Sampling):
    """What chat and text completions have in common. guided_*: the form of an answer as vLLM's clients ask for it, one
    by one or all in structured_outputs."""

    model: str | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: _Structured | None = None


class _Part(Body):
    type: str
    text: str | None = None


class _Function(Body):
    name: str
    arguments: str | Json | None = None


class _Call(Body):
    function: _Function


class _Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    reasoning_content: str | None = None
    reasoning: Any = None
    tool_calls: list[_Call] | None = None


class _Tool(Body):
    """function: as it came, for the template shows the model its fields in the client's order."""

    type: str = "function"
    function: Json | None = None


class _Format(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[Json | None, Known(*SCHEMA)] = None


class ChatBody(SharedBody, thinking.ThinkingFields):
    """What a client may send. Every field but messages may be missing or null."""

    messages: list[_Message]
    tools: list[_Tool] | None = None
    tool_choice: Annotated[str | Json | None, Known(*CHOICE)] = None
    parallel_tool_calls: bool | None = None
    response_format: _Format | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    repetition_detection: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


def read(body: Any, defaults: Defaults) -> ChatRequest:
    """A decoded JSON body as a request; RequestError names the field at fault."""
    return translate(validated(ChatBody, body), defaults)


def translate(chat: ChatBody, defaults: Defaults) -> ChatRequest:
    if not chat.messages:
        raise RequestError("messages: expected at least one message, found none", param="messages")
    length = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
    tools, skipped = _tools(chat)
    choice = tool_choice(chat.tool_choice, tools)
    unused = ["top_logprobs (without logprobs)"] if chat.top_logprobs and not chat.logprobs else []
    return ChatRequest(
        model=chat.model or "",
        messages=[_message(m, f"messages.{i}") for i, m in enumerate(chat.messages)],
        params=sampling(
            chat, defaults, coding=chat.mode == "coding", max_tokens=getattr(chat, length),
            stop=stop_strings(chat.stop), logit_bias=token_bias(chat),
            logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
            names={"max_tokens": length, "logprobs": "top_logprobs"},
        ),
        thinking=thinking.read(chat),
        show_reasoning=thinking.is_shown(chat),
        tools=tools,
        tool_choice=choice,
        parallel_calls=chat.parallel_tool_calls is not False,
        structure=_structure(chat),
        stream=bool(chat.stream),
        ends_loops=chat.repetition_detection is not False,
        include_usage=wants_usage(chat),
        n=num_answers(chat),
        ignored=(*unknown_fields(chat), *unused, *thinking.unmade_edits(chat), *skipped),
    )  # fmt: skip


def _message(message: _Message, where: str) -> Json:
    out = message.model_dump(exclude_none=True)
    reasoning = out.pop("reasoning", None)
    if isinstance(reasoning, str):
        out["reasoning_content"] = out.get("reasoning_content") or reasoning
    refusal = out.pop("refusal", None)
    if isinstance(out.get("content"), list):
        out["content"] = [_part(p, f"{where}.content.{i}") for i, p in enumerate(out["content"])]
    elif isinstance(refusal, str):
        out["content"] = out.get("content") or refusal
    return out


def _part(part: Json, where: str) -> Json:
    text = part.get("text", part.get("refusal"))
    if isinstance(text, str):
        return {"type": "text", "text": text}
    if part["type"] in _WORDLESS_PARTS:
        return {"type": "text", "text": ""}
    if part["type"] not in _TEMPLATE_PARTS:
        raise RequestError(f"{where}: expected text, found a part of the type {part['type']!r}; send its text",
                           param=where)  # fmt: skip
    return part


def _tools(chat: ChatBody) -> tuple[list[Json] | None, list[str]]:
    """Definitions of functions, and which tools were something else."""
    kept, skipped = [], []
    for i, tool in enumerate(chat.tools or ()):
        if tool.type != "function":
            skipped.append(f"tools.{i} ({tool.type})")
        elif tool.function is None:
            raise RequestError(f"tools.{i}.function: Field required", param=f"tools.{i}.function")
        else:
            function = {k: v for k, v in tool.function.items() if v is not None}
            _check_definition(function, f"tools.{i}.function")
            kept.append(tool.model_dump(exclude_none=True) | {"function": function})
    return kept or None, skipped


def _check_definition(function: Json, where: str) -> None:
    if not isinstance(function.get("name"), str):
        raise RequestError(f"{where}.name: expected the name of a function", param=f"{where}.name")
    if not isinstance(function.get("parameters", {}), dict):
        raise RequestError(f"{where}.parameters: expected a JSON schema", param=f"{where}.parameters")


def tool_choice(given: str | Json | None, tools: Sequence[Json] | None) -> ToolChoice:
    """auto, none, required or any; an object with the name of one of the tools, or with those that are allowed."""
    names = [t["function"]["name"] for t in tools or ()]
    kind = given.get("type") if isinstance(given, dict) else given
    if kind in (None, "auto", "none"):
        return ToolChoice("none" if kind == "none" else "auto")
    if kind in ("required", "any"):
        if not names:
            raise RequestError("tool_choice: a call is required, but tools has no function", param="tool_choice")
        return ToolChoice("required")
    if isinstance(given, dict) and kind == "allowed_tools":
        return _allowed_tools(given, names)
    if isinstance(given, dict):
        inner = given.get("function") or given
        name = inner.get("name") if isinstance(inner, dict) else inner
        if name in names:
            return ToolChoice("named", name)
        raise RequestError(f"tool_choice: expected the name of one of the tools, found {name!r}", param="tool_choice")
    raise RequestError(
        f"tool_choice: expected auto, none, required or an object with a tool's name, found {json.dumps(given)}",
        param="tool_choice",
    )


def _allowed_tools(given: Json, names: Sequence[str]) -> ToolChoice:
    """As chat completions write it, or flat as responses do. Tools that are no functions were left out before."""
    at = "tool_choice.allowed_tools" if "allowed_tools" in given else "tool_choice"
    inner = given.get("allowed_tools", given)
    mode, tools = (inner.get("mode"), inner.get("tools")) if isinstance(inner, dict) else (None, None)
    tools = [t for t in tools if isinstance(t, dict)] if isinstance(tools, list) else []
    if mode not in ("auto", "required"):
        raise RequestError(f"{at}.mode: expected auto or required, found {mode!r}", param=f"{at}.mode")
    functions = [t.get("function", t) for t in tools if t.get("type") == "function"]
    allowed: list[Any] = [f.get("name") if isinstance(f, dict) else f for f in functions]
    if not allowed or any(name not in names for name in allowed):
        raise RequestError(f"{at}.tools: expected functions by the names they have in tools, found {allowed}",
                           param=f"{at}.tools")  # fmt: skip
    return ToolChoice(mode, allowed=frozenset(allowed))


def _structure(chat: ChatBody) -> Grammar | None:
    """response_format, or what vLLM's clients send."""
    form = chat.response_format
    if form is None or form.type == "text":
        return guided_structure(chat)
    given = form.json_schema or {}
    return Grammar.structured(
        form.type, given.get("schema"), strict=bool(given.get("strict")), param="response_format.json_schema.schema"
    )


def guided_structure(body: SharedBody) -> Grammar | None:
    given = body.structured_outputs
    for name, kind in _FORMS.items():
        for param, value in (
            (f"guided_{name}", getattr(body, f"guided_{name}")),
            (f"structured_outputs.{name}", getattr(given, kind, None)),
        ):
            if value is not None:
                value = _parsed(value, param) if kind == "json_schema" else value
                return Grammar.structured(kind, value, strict=False, param=param)
    if given is None:
        return None
    if given.json_object:
        return Grammar.structured("json_object", param="structured_outputs.json_object")
    if given.model_extra:  # no form at all would be a surprise
        raise RequestError(f"structured_outputs: expected {', '.join(_FORMS)} or json_object, found "
                           f"{', '.join(sorted(given.model_extra))}", param="structured_outputs")  # fmt: skip
    return None


def _parsed(schema: Json | str, param: str) -> Any:
    """A schema may come as its text."""
    try:
        return json.loads(schema) if isinstance(schema, str) else schema
    except ValueError as error:
        raise RequestError(f"{param}: expected a JSON schema, found text that is no JSON ({error})",
                           param=param) from error  # fmt: skip


def num_answers(body: SharedBody) -> int:
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MAX_ANSWERS:
        raise RequestError(f"n: expected 1 to {MAX_ANSWERS}, found {n}", param="n")
    return n


def wants_usage(body: SharedBody) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def token_bias(body: SharedBody) -> dict[int, float]:
    try:
        return {int(k): v for k, v in (body.logit_bias or {}).items()}
    except ValueError as error:
        raise RequestError("logit_bias: expected token ids as keys", param="logit_bias") from error


# ── Responses ────────────────────────────────────────────────────────────────────────────────────────────────────


class TextTokens:
    """Tells tokens of a reply's text from those of reasoning, calls and the marks around them, which have no log
    probabilities in OpenAI's dialects. num_calls: how many calls began so far."""

    def __init__(self, request: ChatRequest, tokenizer: Tokenizer) -> None:
        self._closing = END_THINK if request.thinking.enabled else None
        self._marks = {tokenizer.id(mark): mark for mark in (THINK, END_THINK, CALL, END_CALL)}
        self._left_out = () if request.structure else (THINK, END_THINK)  # by the parser, outside the reasoning
        self._may_call = bool(request.callable_tools)
        self.num_calls = 0

    def has(self, token: TokenLogprob) -> bool:
        """Whether the next token is one of the text."""
        mark = self._marks.get(token.token_id)
        if self._closing:
            self._closing = None if mark == self._closing else self._closing
            return False
        if mark == CALL and self._may_call:
            self._closing = END_CALL
            self.num_calls += 1
            return False
        return mark not in self._left_out


class Writer:
    """Writes one response: its id and time are drawn once."""

    keep_alive = b": still working\n\n"
    usage_in_last_chunk = False

    def __init__(self, request: ChatRequest, model: str, tokenizer: Tokenizer) -> None:
        self.request, self.model, self._tokenizer = request, model, tokenizer
        self.id, self.created = new_id("chatcmpl-"), int(time.time())
        self._held: dict[tuple[int, int], Json] = {}
        self._template = cache(self._make_template)
        self._texts = defaultdict[int, TextTokens](lambda: TextTokens(request, tokenizer))
        self._untold: defaultdict[int, list[TokenLogprob]] = defaultdict(list)  # until their text is said

    def begin(self, prompt_tokens: int, cached_tokens: int) -> list[Frame]:
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(self.request.n)]

    def more(self, answer: Answer, deltas: Sequence[Delta], logprobs: Sequence[TokenLogprob]) -> list[Frame]:
        index = answer.index
        match deltas:
            case [ReasoningDelta(text) | ContentDelta(text)] if self.request.params.logprobs is None:
                return [(None, self._template(index, isinstance(deltas[0], ReasoningDelta)).filled(text))]
        if self.request.params.logprobs is not None:
            self._untold[index] += filter(self._texts[index].has, logprobs)
        payloads = [p for d in deltas for p in self._payloads(index, d)]
        return [self._chunk(index, p, logprobs=self._told(index) if "content" in p else None) for p in payloads]

    def end(self, answer: Answer) -> list[Frame]:
        """A call that was cut off goes out as it stands, if the reason says that it was; then the reason."""
        cut = [self._held.pop(key) for key in list(self._held) if key[0] == answer.index]
        frames = [self._chunk(answer.index, call) for call in cut if answer.reason != "stop"]
        if not self.usage_in_last_chunk:
            frames.append(self._chunk(answer.index, {}, self._ending(answer), logprobs=self._told(answer.index)))
        return frames

    def close(self, answers: Sequence[Answer], usage: Usage) -> list[Frame]:
        frames: list[Frame] = []
        if self.usage_in_last_chunk:
            frames += [
                self._chunk(a.index, {}, self._ending(a), usage=usage, logprobs=self._told(a.index)) for a in answers
            ]
        elif self.request.include_usage:
            frames.append((None, self._envelope("chat.completion.chunk") | {"choices": [], **_usage(usage)}))
        return [*frames, (None, "[DONE]")]

    def fail(self, error: RequestError) -> list[Frame]:
        return [(None, error_payload(error))]

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Json:
        choices = [self._choice(a) for a in answers]
        return self._envelope("chat.completion") | {"choices": choices, **_usage(usage)}

    def _told(self, index: int) -> Json | None:
        """The log probabilities that were not told yet."""
        untold = self._untold.pop(index, None)
        return logprobs_payload(self._tokenizer, untold) if untold else None

    def finish_reason(self, answer: Answer) -> str:
        if answer.reason == "context":
            return "length"
        return "tool_calls" if answer.has_calls and answer.reason == "stop" else answer.reason

    def _ending(self, answer: Answer) -> Json:
        """Why an answer ended and, where the budget did that, how its thinking ended."""
        closed = {"thinking_closed": answer.thinking_closed} if answer.thinking_closed else {}
        return {"finish_reason": self.finish_reason(answer), **closed}

    def _choice(self, answer: Answer) -> Json:
        reply = answer.reply
        message: Json = {"role": "assistant", "content": reply.content or (None if reply.tool_calls else "")}
        if reply.reasoning:
            message |= {"reasoning_content": reply.reasoning, "reasoning": reply.reasoning}
        if reply.tool_calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in reply.tool_calls
            ]
        said = None
        if self.request.params.logprobs is not None:
            text = TextTokens(self.request, self._tokenizer)
            said = logprobs_payload(self._tokenizer, list(filter(text.has, answer.logprobs)))
        return {"index": answer.index, "message": message, **self._ending(answer), "logprobs": said}

    def _payloads(self, choice: int, delta: Delta) -> list[Json]:
        """``delta`` objects. The name of a call comes once and whole, its arguments as growing JSON text, or the call
        complete where the client wants that. Diagnostics are not part of this dialect."""
        match delta:
            case ReasoningDelta(text):
                return [{"reasoning_content": text, "reasoning": text}]
            case ContentDelta(text):
                return [{"content": text}]
            case ToolCallStart(index, id, name):
                call = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
                if self.request.whole_calls:
                    self._held[choice, index] = {"tool_calls": [call]}
                    return []
                return [{"tool_calls": [call]}]
            case ToolCallArguments(index, text):
                if self.request.whole_calls:
                    self._held[choice, index]["tool_calls"][0]["function"]["arguments"] += text
                    return []
                return [{"tool_calls": [{"index": index, "function": {"arguments": text}}]}]
            case ToolCallEnd(index) if self.request.whole_calls:
                return [self._held.pop((choice, index))]
            case _:
                return []

    def _make_template(self, choice: int, is_reasoning: bool) -> Template:
        kind = ReasoningDelta if is_reasoning else ContentDelta
        return Template(lambda text: self._data(choice, *self._payloads(choice, kind(text))))

    def _chunk(self, index: int, delta: Json, ending: Json | None = None, **more: Any) -> Frame:
        return None, self._data(index, delta, ending, **more)

    def _data(
        self, index: int, delta: Json, ending: Json | None = None, *, logprobs: Json | None = None,
        usage: Usage | None = None,
    ) -> Json:  # fmt: skip
        choice: Json = {"index": index, "delta": delta, "finish_reason": None} | (ending or {})
        if logprobs is not None:
            choice["logprobs"] = logprobs
        return self._envelope("chat.completion.chunk") | {"choices": [choice]} | (_usage(usage) if usage else {})

    def _envelope(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _usage(usage: Usage) -> Json:
    return {"usage": usage_payload(usage)}


def usage_payload(usage: Usage) -> Json:
    cached, reasoning = usage_details(usage)
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": cached,
        "completion_tokens_details": reasoning,
    }


def usage_details(usage: Usage) -> tuple[Json, Json]:
    """Of the prompt, with the divergence from an earlier one if asked for; and of the reply, with how the budget ended
    its thinking if it did."""
    divergence = {"divergence": usage.divergence} if usage.divergence else {}
    closed = {"thinking_closed": usage.thinking_closed} if usage.thinking_closed else {}
    return {"cached_tokens": usage.cached_tokens} | divergence, {"reasoning_tokens": usage.reasoning_tokens} | closed


def logprobs_payload(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> Json:
    def entry(token: int, logprob: float) -> Json:
        return {"token": tokenizer.piece(token), "logprob": logprob, "bytes": list(tokenizer.to_bytes(token))}

    return {"content": [
        entry(t.token_id, t.logprob) | {"top_logprobs": [entry(i, p) for i, p in t.top.items()]} for t in logprobs
    ]}  # fmt: skip


def error_payload(error: RequestError) -> Json:
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def models_payload(names: Sequence[str], created: int, context_length: int) -> Json:
    """The union of what OpenAI's and Anthropic's clients read."""
    data = [model_payload(n, created, context_length) for n in names]
    return {"object": "list", "data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]}


def model_payload(name: str, created: int, context_length: int) -> Json:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created))
    return {
        "id": name, "object": "model", "created": created, "owned_by": "glm52", "max_model_len": context_length,
        "type": "model", "display_name": name, "created_at": when, "context_length": context_length,
        "max_input_tokens": context_length, "max_tokens": context_length,
    }  # fmt: skip
