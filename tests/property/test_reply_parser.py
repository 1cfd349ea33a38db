"""However a reply is cut into pieces, the deltas joined are the parse of the whole. And nothing makes the parser raise."""

import itertools
import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from glm52.chat import Reply, ReplyParser, ToolCallEnd, collect, parse_reply

TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
        "s": {"type": "string"}, "n": {"type": "integer"}, "b": {"type": ["boolean", "null"]},
        "l": {"anyOf": [{"type": "array"}, {"type": "string"}]}}}}},
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip
FRAGMENTS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "f", "get_weather", "s", "n", "b", "l", "12", "true", "None", "[1, 2]", '{"name": "f", "arguments": {"n": 1}}',
    "<", "</", "<arg", "</tool", " ", "\n", "text", "é", "🙂", '"', "\\",
    "<tool_call>f<arg_key>s</arg_key><arg_value>", "<tool_call>f<arg_key>n</arg_key><arg_value>3</arg_value></tool_call>",
]  # fmt: skip
replies = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


def parse_in_pieces(text: str, cuts: list[int], *, thinking: bool) -> Reply:
    ids = itertools.count()
    parser = ReplyParser(TOOLS, thinking=thinking, new_id=lambda: str(next(ids)))
    bounds = [0, *sorted(cuts), len(text)]
    deltas = [d for a, b in itertools.pairwise(bounds) for d in parser.feed(text[a:b])]
    return collect([*deltas, *parser.close()], thinking=thinking)


def parse_whole(text: str, *, thinking: bool) -> Reply:
    ids = itertools.count()
    return parse_reply(text, TOOLS, thinking=thinking, new_id=lambda: str(next(ids)))


@settings(max_examples=2500, deadline=None)
@given(text=replies, thinking=st.booleans(), seed=st.integers(0, 1 << 30))
def test_streamed_equals_whole(text: str, thinking: bool, seed: int) -> None:
    whole, rng = parse_whole(text, thinking=thinking), random.Random(seed)
    for cuts in (
        list(range(len(text))),
        *([rng.randrange(len(text) + 1) for _ in range(rng.randint(1, 6))] for _ in range(4)),
    ):
        assert parse_in_pieces(text, cuts, thinking=thinking) == whole


@settings(max_examples=1500, deadline=None)
@given(text=replies, thinking=st.booleans())
def test_ended_calls_are_json_objects_and_names_are_never_invented(text: str, thinking: bool) -> None:
    parser = ReplyParser(TOOLS, thinking=thinking)
    deltas = [*parser.feed(text), *parser.close()]
    reply = collect(deltas, thinking=thinking)
    for ended in (d.index for d in deltas if isinstance(d, ToolCallEnd)):
        assert isinstance(json.loads(reply.tool_calls[ended].arguments), dict)
    assert {c.name for c in reply.tool_calls} <= {"f", "get_weather"}
    assert reply.content == reply.content.strip()


@settings(max_examples=500, deadline=None)
@given(text=st.text(), thinking=st.booleans())
def test_plain_text_is_kept(text: str, thinking: bool) -> None:
    """Without markers every character is reasoning (verbatim) or content (stripped)."""
    if "<" in text:
        return
    reply = parse_whole(text, thinking=thinking)
    assert (reply.reasoning, reply.content) == ((text, "") if thinking else (None, text.strip()))
    assert not reply.diagnostics


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=400), thinking=st.booleans())
def test_random_bytes_never_raise(data: bytes, thinking: bool) -> None:
    parse_whole(data.decode("utf-8", errors="replace"), thinking=thinking)


def test_a_million_bytes_never_raise() -> None:
    """Random bytes with markers among them, in random pieces."""
    rng = random.Random(1)
    for thinking in (True, False):
        pieces = (
            rng.choice(FRAGMENTS)
            if rng.random() < 0.05
            else rng.randbytes(rng.randrange(1, 20)).decode("utf-8", "replace")
            for _ in range(30_000)
        )
        text = "".join(pieces)
        assert len(text.encode()) > 500_000
        parser, at = ReplyParser(TOOLS, thinking=thinking), 0
        while at < len(text):
            size = rng.randrange(1, 40)
            parser.feed(text[at : at + size])
            at += size
        parser.close()
