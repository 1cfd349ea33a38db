"""The OpenAI responses dialect: a body to a ``ChatRequest``, answers to typed events, the last with the whole. Pure.

Nothing is stored: a client sends its whole conversation. Reasoning goes out as text or, where the client asks for a
summary, as that; where it asks for it encrypted, also as an opaque string that it can send back. The model knows a
namespace's tools as ``namespace__name``, custom tools as functions of one string and the client's search for tools as a
function; the client reads its own forms.
"""

import base64
import binascii
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic_core import from_json

from glm52.chat import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from glm52.engine import TokenLogprob
from glm52.errors import ContextOverflow, RequestError
from glm52.grammar import LARK, Grammar
from glm52.ids import new_id
from glm52.server import thinking
from glm52.server.openai import CHOICE, SCHEMA, TextTokens, logprobs_payload, tool_choice, usage_details
from glm52.server.request import (
    Answer,
    Body,
    ChatRequest,
    Defaults,
    Frame,
    Json,
    Known,
    Sampling,
    Usage,
    left_out,
    parsed_arguments,
    sampling,
    unknown_fields,
    validated,
)
from glm52.tokenizer import Tokenizer

_OPAQUE = "glm52:"
# Ends of a reply that is not whole, and what the dialect calls them.
_CUT = {"length": "max_output_tokens", "context": "max_output_tokens", "repetition": "repetition",
        "grammar": "grammar"}  # fmt: skip
# Types of tools, and of the items of their calls.
_ITEMS = {"function": "function_call", "custom": "custom_tool_call", "tool_search": "tool_search_call"}
# Items of calls whose text grows: where each has it, and the events that tell it.
_CALLS = {"function_call": ("arguments", "response.function_call_arguments"),
          "custom_tool_call": ("input", "response.custom_tool_call_input")}  # fmt: skip
_PREFIXES = {"function_call": "fc", "custom_tool_call": "ctc", "tool_search_call": "tsc"}
_SEARCH = "tool_search"  # what the model calls the client's search


class _Tool(Body):
    """tools: of a namespace. format: of the text that a custom tool takes. execution: of a search for tools."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: Json | None = None
    tools: list["_Tool"] | None = None
    format: Json | None = None
    execution: str | None = None
    defer_loading: bool | None = None

    @property
    def is_search(self) -> bool:
        """Whether it is the client that searches."""
        return self.type == "tool_search" and self.execution == "client"


class _Loading(Body):
    """An item of the input that brings tools."""

    tools: list[_Tool] | None = None


@dataclass(frozen=True)
class _Called:
    """What a client calls a tool. The model knows it by one name, see ``_flat``, and calls every tool with arguments:
    a custom one takes free text, which is its only argument, ``input``. item: the type of its calls."""

    name: str
    namespace: str | None = None
    item: str = "function_call"


class _Text(Body):
    format: Annotated[Json | None, Known("type", *SCHEMA)] = None
    verbosity: str | None = None


class ResponsesBody(Sampling, thinking.ThinkingFields):
    """What a client may send; several fields are only said back in the response."""

    model: str | None = None
    input: str | list[Json]
    instructions: str | None = None
    max_output_tokens: int | None = None
    repetition_detection: bool | None = None
    tools: list[_Tool] | None = None
    tool_choice: Annotated[str | Json | None, Known(*CHOICE, "namespace")] = None
    parallel_tool_calls: bool | None = None
    text: _Text | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    metadata: Json | None = None
    previous_response_id: str | None = None
    conversation: str | Json | None = None
    prompt: Json | None = None
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None


def read(body: Any, defaults: Defaults) -> ChatRequest:
    """A decoded JSON body as a request; RequestError names the field at fault."""
    b = validated(ResponsesBody, body)
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(b, name):
            raise RequestError(f"{name}: nothing is stored here; send the whole conversation as input", param=name)
    if b.background:
        raise RequestError("background: responses are not stored here; use stream", param="background")
    tools, called, skipped = _tools(b.tools or [], b.input)
    choice = tool_choice(_choice(b.tool_choice, called), tools)
    first = [{"role": "system", "content": b.instructions}] if b.instructions else []
    said, unsaid = _messages(b.input)
    messages = [*first, *said]
    if len(messages) == len(first):
        raise RequestError("input: expected at least one message, found none", param="input")
    include = b.include or []
    wanted = "message.output_text.logprobs" in include or b.top_logprobs
    return ChatRequest(
        model=b.model or "",
        messages=messages,
        params=sampling(b, defaults, coding=b.mode == "coding", max_tokens=b.max_output_tokens,
                        logprobs=(b.top_logprobs or 0) if wanted else None,
                        names={"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}),
        thinking=thinking.read(b),
        show_reasoning=thinking.is_shown(b),
        tools=tools,
        tool_choice=choice,
        parallel_calls=b.parallel_tool_calls is not False,
        structure=_structure(b),
        stream=bool(b.stream),
        ends_loops=b.repetition_detection is not False,
        ignored=(*unknown_fields(b), *thinking.unmade_edits(b), *skipped, *unsaid),
        raw=body | {"encrypted": "reasoning.encrypted_content" in include, "called": called},
    )  # fmt: skip


# ── Tools ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tools(
    given: Sequence[_Tool], items: str | list[Json]
) -> tuple[list[Json] | None, dict[str, _Called], list[str]]:  # fmt: skip
    """Definitions in the form the template knows, what the client calls those it names, and which tools only OpenAI's
    own servers could run. Tools also come inside the input: those that a search found are shown where it did."""
    kept: list[Json] = []
    called: dict[str, _Called] = {}
    skipped = []
    sources = [("tools", given, False), *_loaded(items)]
    hides = any(tool.is_search for _, tools, _ in sources for tool in tools)
    for place, tools, is_found in sources:
        for at, namespace, tool in _each(tools, place):
            if tool.type not in ("function", "custom") and not tool.is_search:
                skipped.append(f"{at} ({tool.type})")
                continue
            name = _SEARCH if tool.is_search else tool.name
            if not name:
                raise RequestError(f"{at}.name: Field required", param=f"{at}.name")
            flat, own = _flat(name, namespace), _Called(name, namespace, _ITEMS[tool.type])
            is_known = flat in called and place != "tools"
            if called.setdefault(flat, own) != own:
                raise RequestError(f"{at}.name: the model knows this tool as {flat!r}, and another by the same name; "
                                   "call one of them otherwise", param=f"{at}.name")  # fmt: skip
            if not is_known:
                is_deferred = is_found or (hides and bool(tool.defer_loading))
                kept.append({"type": "function", "function": _function(tool, flat, at, is_deferred=is_deferred)})
    return kept or None, called, skipped


def _function(tool: _Tool, name: str, at: str, *, is_deferred: bool) -> Json:
    function: Json = {"name": name, "description": tool.description or ""}
    if tool.type == "custom":
        properties = {"input": _free_text(tool.format or {}, f"{at}.format")}
        function["parameters"] = {"type": "object", "properties": properties, "required": ["input"],
                                  "additionalProperties": False}  # fmt: skip
    elif tool.parameters is not None:
        function["parameters"] = tool.parameters
    return function | ({"defer_loading": True} if is_deferred else {})


def _each(given: Sequence[_Tool], place: str) -> Iterator[tuple[str, str | None, _Tool]]:
    """Where a tool stands, its namespace, and it. What a namespace says of itself is said by its first tool."""
    for i, outer in enumerate(given):
        at = f"{place}.{i}"
        if outer.type != "namespace":
            yield at, None, outer
            continue
        if not outer.name:
            raise RequestError(f"{at}.name: Field required", param=f"{at}.name")
        for j, tool in enumerate(outer.tools or []):
            said = [t for t in (None if j else outer.description, tool.description) if t]
            yield f"{at}.tools.{j}", outer.name, tool.model_copy(update={"description": "\n\n".join(said)})


def _loaded(items: str | list[Json]) -> Iterator[tuple[str, Sequence[_Tool], bool]]:
    """Where the input brings tools, they, and whether a search of the client's found them."""
    for i, item in enumerate(items if isinstance(items, list) else ()):
        if item.get("type") in ("additional_tools", "tool_search_output"):
            yield f"input.{i}.tools", _tools_of(item, f"input.{i}"), _is_answer(item)


def _tools_of(item: Json, at: str) -> Sequence[_Tool]:
    try:
        return validated(_Loading, item).tools or []
    except RequestError as error:
        raise RequestError(f"{at}.{error}", param=f"{at}.{error.param}") from error


def _is_answer(item: Json) -> bool:
    """Whether an item of a search is of one that the client ran; what OpenAI's servers searched answers no call."""
    return item["type"] != "additional_tools" and item.get("execution") != "server" and bool(item.get("call_id"))


def _flat(name: str, namespace: str | None) -> str:
    """The one name by which the model knows a tool."""
    return f"{namespace}__{name}" if namespace else name


def _free_text(form: Json, at: str) -> Json:
    """The schema of a custom tool's input."""
    text: Json = {"type": "string", "description": "The whole input, as it stands"}
    if form.get("type", "text") == "text":
        return text
    syntax, definition = form.get("syntax"), form.get("definition")
    if form["type"] != "grammar" or syntax not in ("lark", "regex") or not isinstance(definition, str):
        raise RequestError(
            f"{at}: expected text, or a grammar with a syntax (lark or regex) and a definition", param=at
        )
    if syntax == "lark":
        return text | {LARK: definition}
    return text | {"pattern": f"^({definition.removeprefix('^').removesuffix('$')})$"}


def _choice(given: str | Json | None, called: Mapping[str, _Called]) -> str | Json | None:
    """tool_choice with the names that the model knows."""
    if not isinstance(given, dict):
        return given
    if given.get("type") == "allowed_tools" and isinstance(given.get("tools"), list):
        return given | {"tools": [chosen for tool in given["tools"] for chosen in _chosen(tool, called)]}
    return given if given.get("type") == "namespace" else _chosen(given, called)[0]


def _chosen(given: Any, called: Mapping[str, _Called]) -> list[Any]:
    """The functions that a choice means: all of a namespace, or one, whose namespace may be missing where no other tool
    has its name."""
    name, kind = (given.get("name"), given.get("type")) if isinstance(given, dict) else (None, None)
    if kind == "tool_search" and _SEARCH in called:
        return [{"type": "function", "name": _SEARCH}]
    if not isinstance(name, str) or kind not in ("function", "custom", "namespace"):
        return [given]
    if kind == "namespace":
        flat = [f for f, tool in called.items() if tool.namespace == name]
    else:
        flat = [_flat(name, given.get("namespace"))]
        alike = [f for f, tool in called.items() if tool.name == name]
        if given.get("namespace") is None and name not in called and len(alike) == 1:
            flat = alike
    return [{"type": "function", "name": f} for f in flat]


def _structure(body: ResponsesBody) -> Grammar | None:
    form = (body.text and body.text.format) or {"type": "text"}
    if form.get("type") == "text":
        return None
    if form.get("type") not in ("json_object", "json_schema"):
        raise RequestError("text.format: expected text, json_object, or json_schema with a schema", param="text.format")
    return Grammar.structured(
        form["type"], form.get("schema"), strict=bool(form.get("strict")), param="text.format.schema"
    )


# ── Input items ──────────────────────────────────────────────────────────────────────────────────────────────────


def _messages(given: str | list[Json]) -> tuple[list[Json], list[str]]:
    """Items as messages, and which were left out: reasoning, text and calls of one turn of the assistant become one
    message. A call of a custom tool is one of a function with its text as the only argument."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}], []
    out: list[Json] = []
    unsaid: list[tuple[str, str]] = []
    for i, item in enumerate(given):
        at = f"input.{i}"
        kind = item.get("type") or "message"
        if kind == "message":
            role = item.get("role")
            if role not in ("system", "developer", "user", "assistant"):
                raise RequestError(f"{at}.role: expected system, developer, user or assistant, found {role!r}",
                                   param=f"{at}.role")  # fmt: skip
            content = _content(item.get("content"), f"{at}.content")
            if role == "assistant":
                turn = _turn(out)
                turn["content"] += "".join(p.get("text", "") for p in content)
            else:
                out.append({"role": role, "content": content})
        elif kind == "reasoning":
            turn = _turn(out, begins=True)
            turn["reasoning_content"] = turn.get("reasoning_content", "") + _reasoning(item)
        elif kind == "function_call":
            _add_call(_turn(out), item, at)
        elif kind == "custom_tool_call":
            _add_call(_turn(out), item | {"arguments": json.dumps({"input": item.get("input")})}, at)
        elif kind == "tool_search_call" and _is_answer(item):
            _add_call(_turn(out), item | {"name": _SEARCH, "arguments": json.dumps(item.get("arguments"))}, at)
        elif kind == "tool_search_output" and _is_answer(item):
            names = [_flat(t.name or "", space) for _, space, t in _each(_tools_of(item, at), f"{at}.tools")]
            found = [{"type": "tool_reference", "name": name} for name in names]
            out.append({"role": "tool", "tool_call_id": item["call_id"], "content": found})
        elif kind in ("additional_tools", "tool_search_output"):  # whose tools were read before
            continue
        elif kind in ("function_call_output", "custom_tool_call_output"):
            content = _content(item.get("output"), f"{at}.output")
            out.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        elif kind == "item_reference":
            raise RequestError(f"{at}: items are not stored here; send them whole", param=at)
        elif kind in ("web_search_call", "tool_search_call"):  # what was found is said after it
            unsaid.append((at, kind))
        else:
            raise RequestError(f"{at}: expected a message, reasoning, or a call of a function or its output, found "
                               f"{kind!r}; leave it out, or say in a message what it says", param=at)  # fmt: skip
    for message in out:
        if message.get("reasoning_content") == "":
            del message["reasoning_content"]
    return out, left_out(unsaid)


def _turn(out: list[Json], *, begins: bool = False) -> Json:
    """The assistant's message that is being put together; reasoning after an answer begins another."""
    last = out[-1] if out else {}
    if last.get("role") != "assistant" or (begins and (last["content"] or last.get("tool_calls"))):
        out.append({"role": "assistant", "content": ""})
    return out[-1]


def _add_call(turn: Json, item: Json, at: str) -> None:
    if not isinstance(item.get("name"), str):
        raise RequestError(f"{at}.name: expected the name of a function", param=f"{at}.name")
    function = {"name": _flat(item["name"], item.get("namespace")), "arguments": item.get("arguments") or "{}"}
    turn.setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function", "function": function})


def _content(given: Any, at: str) -> list[Json]:
    if given is None or isinstance(given, str):
        return [{"type": "text", "text": given or ""}]
    if not isinstance(given, list) or not all(isinstance(p, dict) for p in given):
        raise RequestError(f"{at}: expected a string or a list of parts", param=at)
    parts = []
    for i, part in enumerate(given):
        text = part.get("text") if part.get("text") is not None else part.get("refusal")
        if isinstance(text, str):
            parts.append({"type": "text", "text": text})
        elif part.get("type") == "input_image":
            parts.append({"type": "image"})
        else:
            raise RequestError(f"{at}.{i}: expected text or an image, found {part.get('type')!r}; send its text",
                               param=f"{at}.{i}")  # fmt: skip
    return parts


def _reasoning(item: Json) -> str:
    """The text of a reasoning item, from the first place where it is."""
    opaque = item.get("encrypted_content")
    if isinstance(opaque, str) and opaque.startswith(_OPAQUE):
        try:
            return base64.b64decode(opaque[len(_OPAQUE) :], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            pass  # another server's, or cut off: the other places remain
    for place in ("content", "summary"):
        found = item.get(place)
        parts = found if isinstance(found, list) else []
        texts = [p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str)]
        if texts:
            return "".join(texts)
    return ""


# ── Responses ────────────────────────────────────────────────────────────────────────────────────────────────────


class Writer:
    """Writes one response as events, and keeps the items they amount to."""

    keep_alive = b": still working\n\n"

    def __init__(self, request: ChatRequest, model: str, tokenizer: Tokenizer) -> None:
        self.request, self._tokenizer = request, tokenizer
        raw = request.raw
        reasoning = raw.get("reasoning") or {}
        self._summarised = reasoning.get("summary") is not None
        self._sequence = 0
        self._open: str | None = None
        self._reason = ""
        # Log probabilities by the number of calls before their tokens: between calls each text is an item of its own.
        self._untold: defaultdict[int, list[TokenLogprob]] = defaultdict(list)
        self._calls_said = 0
        self._texts = TextTokens(request, tokenizer)
        self._arguments = ""  # of the open call of a search, or of a custom tool but for the text of its input
        self.response: Json = {
            "id": new_id("resp_"), "object": "response", "created_at": int(time.time()), "model": model,
            "status": "in_progress", "output": [], "error": None, "incomplete_details": None, "usage": None,
            "instructions": raw.get("instructions"), "metadata": raw.get("metadata") or {},
            "parallel_tool_calls": request.parallel_calls, "tool_choice": raw.get("tool_choice") or "auto",
            "tools": raw.get("tools") or [], "temperature": request.params.temperature,
            "top_p": request.params.top_p, "max_output_tokens": raw.get("max_output_tokens"),
            "previous_response_id": None, "store": False, "text": raw.get("text") or {"format": {"type": "text"}},
            "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
            "truncation": "disabled", "user": raw.get("user"),
        }  # fmt: skip

    def begin(self, prompt_tokens: int, cached_tokens: int) -> list[Frame]:
        return [self._response("response.created"), self._response("response.in_progress")]

    def more(self, answer: Answer, deltas: Sequence[Delta], logprobs: Sequence[TokenLogprob]) -> list[Frame]:
        for token in filter(self._texts.has, logprobs):
            self._untold[self._texts.num_calls].append(token)
        return [f for d in deltas for f in self._delta(d)]

    def _text_delta(self, text: str) -> Frame:
        """More of the open message, with the log probabilities of its tokens that were not told yet."""
        new = logprobs_payload(self._tokenizer, self._untold.pop(self._calls_said, []))["content"]
        self._part["text"] += text
        self._part["logprobs"] += new
        return self._event("response.output_text.delta", content_index=0, delta=text, logprobs=new)

    def end(self, answer: Answer) -> list[Frame]:
        is_cut = answer.reason in _CUT or str(self._open).startswith("call")  # whose end would have closed it
        frames = self._close_item(is_cut=is_cut)
        if not self.response["output"]:
            frames += [*self._open_message(), *self._close_item(is_cut=is_cut)]
        self._reason = answer.reason
        return frames

    def close(self, answers: Sequence[Answer], usage: Usage) -> list[Frame]:
        cut = _CUT.get(self._reason)
        self.response |= {"status": "incomplete" if cut else "completed", "usage": usage_payload(usage)}
        if cut:
            self.response["incomplete_details"] = {"reason": cut}
        return [self._response("response.incomplete" if cut else "response.completed")]

    def fail(self, error: RequestError) -> list[Frame]:
        code = error.code or ("rate_limit_exceeded" if error.status == 429 else "server_error")
        message = str(error)
        if isinstance(error, ContextOverflow):
            message = f"Your input exceeds the context window of this model. {message}"
        self.response |= {"status": "failed", "error": {"code": code, "message": message}}
        return [self._response("response.failed")]

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Json:
        for answer in answers:
            self.more(answer, answer.said, answer.logprobs)
            self.end(answer)
        self.close(answers, usage)
        return self.response

    def _delta(self, delta: Delta) -> list[Frame]:
        match delta:
            case ReasoningDelta(text):
                opening = self._open_reasoning()
                self._part["text"] += text
                return [*opening, self._event(f"{self._thought}.delta", **self._part_at, delta=text)]
            case ContentDelta(text):
                return [*self._open_message(), self._text_delta(text)]
            case ToolCallStart(_, id, name):
                return self._open_call(id, self.request.raw["called"][name])
            case ToolCallArguments(_, text):
                if self._item["type"] not in _CALLS:
                    self._arguments += text
                    return []
                place, kind = _CALLS[self._item["type"]]
                new = text if place == "arguments" else self._input_delta(text)
                self._item[place] += new
                return [self._event(f"{kind}.delta", delta=new)] if new else []
            case ToolCallEnd():
                return self._close_item()
            case _:
                return []

    # ── items and their parts ────────────────────────────────────────────────────────────────────────────────────

    @property
    def _item(self) -> Json:
        item: Json = self.response["output"][-1]
        return item

    @property
    def _place(self) -> str:
        """Where the open item keeps its text."""
        return "summary" if self._open == "reasoning" and self._summarised else "content"

    @property
    def _thought(self) -> str:
        return "response.reasoning_summary_text" if self._summarised else "response.reasoning_text"

    @property
    def _part(self) -> Json:
        part: Json = self._item[self._place][0]
        return part

    @property
    def _part_at(self) -> Json:
        return {f"{self._place}_index": 0}

    def _open_item(self, kind: str, prefix: str, item: Json) -> list[Frame]:
        if self._open == kind:
            return []
        frames = self._close_item()
        self._open = kind
        self.response["output"].append({"id": new_id(f"{prefix}_"), "status": "in_progress", **item})
        return [*frames, self._event("response.output_item.added", item=_copy(self._item))]

    def _open_call(self, id: str, tool: _Called) -> list[Frame]:
        item: Json = {"type": tool.item, "call_id": id}
        if tool.item in _CALLS:
            item |= {"name": tool.name, _CALLS[tool.item][0]: ""}
            item |= {"namespace": tool.namespace} if tool.namespace else {}
        else:
            item |= {"execution": "client", "arguments": {}}
        frames = self._open_item(f"call {id}", _PREFIXES[tool.item], item)
        self._calls_said += 1
        self._arguments = ""
        return frames

    def _input_delta(self, text: str) -> str:
        """More of a custom tool's input. Inside the string a piece has whole escapes and is read by itself: to read all
        anew with each took 18 s for an input of 30,000 pieces."""
        if self._arguments == '{"input": "' and text != '"':
            return str(json.loads(f'"{text}"'))
        self._arguments += text
        given = from_json(self._arguments.encode("utf-8", "replace"), allow_partial="trailing-strings")
        return str(given.get("input", ""))[len(self._item["input"]) :]

    def _open_reasoning(self) -> list[Frame]:
        if self._open == "reasoning":
            return []
        item = {"type": "reasoning", "summary": [], "content": []}
        frames = self._open_item("reasoning", "rs", item)
        self._item[self._place].append({"type": "summary_text" if self._summarised else "reasoning_text", "text": ""})
        kind = "response.reasoning_summary_part.added" if self._summarised else "response.content_part.added"
        return [*frames, self._event(kind, **self._part_at, part=dict(self._part))]

    def _open_message(self) -> list[Frame]:
        if self._open == "message":
            return []
        frames = self._open_item("message", "msg", {"type": "message", "role": "assistant", "content": []})
        self._item["content"].append({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
        return [*frames, self._event("response.content_part.added", content_index=0, part=_copy(self._part))]

    def _close_item(self, *, is_cut: bool = False) -> list[Frame]:
        """The done events of the open item. One that was cut off is incomplete."""
        if self._open is None:
            return []
        frames = []
        if self._open == "reasoning":
            if self.request.raw.get("encrypted"):
                text = self._part["text"].encode()
                self._item["encrypted_content"] = _OPAQUE + base64.b64encode(text).decode()
            kind = "reasoning_summary_part" if self._summarised else "content_part"
            frames.append(self._event(f"{self._thought}.done", **self._part_at, text=self._part["text"]))
            frames.append(self._event(f"response.{kind}.done", **self._part_at, part=dict(self._part)))
        elif self._open == "message":
            if self._untold[self._calls_said]:  # of white space at the end, which is no part of the text
                frames.append(self._text_delta(""))
            part = self._part
            frames.append(self._event("response.output_text.done", content_index=0, text=part["text"],
                                      logprobs=part["logprobs"]))  # fmt: skip
            frames.append(self._event("response.content_part.done", content_index=0, part=_copy(part)))
        elif self._item["type"] not in _CALLS:
            self._item["arguments"] = parsed_arguments(self._arguments)
        elif not is_cut:
            place, kind = _CALLS[self._item["type"]]
            frames.append(self._event(f"{kind}.done", **{place: self._item[place]}, name=self._item["name"]))
        self._item["status"] = "incomplete" if is_cut else "completed"
        self._open = None
        return [*frames, self._event("response.output_item.done", item=_copy(self._item))]

    def _event(self, kind: str, **fields: Any) -> Frame:
        event = {"type": kind, "sequence_number": self._sequence, "output_index": len(self.response["output"]) - 1}
        if not kind.startswith("response.output_item"):
            event["item_id"] = self._item["id"]
        self._sequence += 1
        return kind, event | fields

    def _response(self, kind: str) -> Frame:
        self._sequence += 1
        response = self.response | {"output": [_copy(i) for i in self.response["output"]]}
        return kind, {"type": kind, "sequence_number": self._sequence - 1, "response": response}


def _copy(item: Json) -> Json:
    return {
        k: [dict(p) if isinstance(p, dict) else p for p in v] if isinstance(v, list) else v for k, v in item.items()
    }


def usage_payload(usage: Usage) -> Json:
    cached, reasoning = usage_details(usage)
    return {
        "input_tokens": usage.prompt_tokens, "input_tokens_details": cached | {"cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens, "output_tokens_details": reasoning,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }  # fmt: skip
