"""Any reply text, any split, any dialect: what is streamed is what is said whole."""

import itertools
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from glm52.engine import Event, SamplingParams, Sequence
from glm52.server import http
from glm52.server.app import CHAT, MESSAGES, RESPONSES, TEXT, ZAI, Dialect
from glm52.server.request import Answer, usage_of
from tests.property.test_reply_parser import TOOLS, replies
from tests.scripted import TOKENIZER
from tests.serving import USER, sse, streamed, whole

BODIES: dict[str, Any] = {
    "chat": {"messages": USER, "tools": TOOLS, "stream_options": {"include_usage": True}},
    "zai": {"messages": USER, "tools": TOOLS},
    "responses": {"input": "Hi", "tools": [{"type": "function", **t["function"]} for t in TOOLS]},
    "messages": {"messages": USER, "tools": [
        {"name": t["function"]["name"], "input_schema": t["function"]["parameters"]} for t in TOOLS]},
    "completions": {"prompt": "Hi"},
}  # fmt: skip
DIALECTS = {d.name: d for d in (CHAT, ZAI, RESPONSES, MESSAGES, TEXT)}
REASONS = st.sampled_from(("stop", "length", "repetition"))


def replied(dialect: Dialect, body: Any, pieces: list[str], reason: Any) -> tuple[list[tuple[str | None, str]], Any]:
    """The frames of a stream that came in pieces, and the body of the same reply whole."""
    request = dialect.read(body, {})
    answer, other = (Answer(request, [1], 0, context_length=1 << 20) for _ in range(2))
    seq = Sequence(id=0, prompt=[1], params=SamplingParams(), seed=0, max_tokens=99, tokens=[1])
    writer = dialect.writer(request, "nano", TOKENIZER)
    frames = writer.begin(1, 0)
    for i, piece in enumerate(pieces):
        ends = i == len(pieces) - 1
        event = Event(seq=seq, token_ids=[7], text=piece, finish_reason=reason if ends else None)
        frames += writer.more(answer, answer.take(event), event.logprobs)
    frames += [*writer.end(answer), *writer.close([answer], usage_of([answer]))]
    other.take(Event(seq=seq, token_ids=[7] * len(pieces), text="".join(pieces), finish_reason=reason))
    return sse(http.sse(frames).decode()), dialect.writer(request, "nano", TOKENIZER).whole([other], usage_of([other]))


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def split(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(replies, st.text(max_size=60)), cuts=st.lists(st.integers(0, 1 << 16), max_size=8), reason=REASONS,
       thinking=st.booleans(), whole_calls=st.booleans())  # fmt: skip
def test_streamed_equals_whole(text: str, cuts: list[int], reason: str, thinking: bool, whole_calls: bool) -> None:
    for name, body in BODIES.items():
        fields = {"enable_thinking": thinking, "tool_stream": not whole_calls} if name != "completions" else {}
        frames, body = replied(DIALECTS[name], body | fields, split(text, cuts), reason)
        if name == "completions":
            said = "".join(json.loads(d)["choices"][0]["text"] for _, d in frames[:-1])
            assert said == body["choices"][0]["text"] == text.encode("utf-8", "replace").decode()
            continue
        said = streamed(name, frames)
        if reason == "stop" and said.calls and not is_json(said.calls[-1][1]):  # a half, which a whole reply leaves out
            said.calls.pop()
        if name == "messages":  # a call that was cut off: its text in a stream, what is certain of it in a message
            said.calls = [
                [n, json.dumps(from_json(a or "{}", allow_partial=True), ensure_ascii=False)] for n, a in said.calls
            ]
        assert said == whole(name, body), name


@settings(max_examples=300, deadline=None)
@given(text=replies, cuts=st.lists(st.integers(0, 1 << 16), max_size=8))
def test_streamed_equals_whole_for_tools_of_other_forms(text: str, cuts: list[int]) -> None:
    """Custom tools and those of a namespace, in responses."""
    tools = [{"type": "custom", "name": "f"}, {"type": "namespace", "name": "n", "tools": [
        {"type": "function", **TOOLS[1]["function"]}]}]  # fmt: skip
    text = text.replace("get_weather", "n__get_weather").replace("<arg_key>s<", "<arg_key>input<")
    frames, said = replied(RESPONSES, {"input": "Hi", "tools": tools}, split(text, cuts), "length")
    inputs: dict[int, str] = {}
    for event in (json.loads(data) for _, data in frames):
        if event["type"] == "response.custom_tool_call_input.delta":
            inputs[event["output_index"]] = inputs.get(event["output_index"], "") + event["delta"]
    items = json.loads(frames[-1][1])["response"]["output"]
    without_ids = [
        [{k: v for k, v in i.items() if k not in ("id", "call_id")} for i in o] for o in (items, said["output"])
    ]
    assert without_ids[0] == without_ids[1]
    assert {i: item["input"] for i, item in enumerate(items) if item.get("input")} == inputs
    assert all(item["namespace"] == "n" for item in items if item.get("name") == "get_weather")
