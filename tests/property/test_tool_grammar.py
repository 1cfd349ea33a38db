"""A model that says anything at all, held by the grammar of its tools: its calls are always valid against the schemas
and read back without a remark."""

import contextlib
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm52.chat import parse_reply
from glm52.engine import SamplingParams, generate
from glm52.engine.matcher import Matchers
from glm52.errors import RequestError
from glm52.grammar import Grammar
from tests.scripted import EOS, TOKENIZER, ScriptedModel, random_logits

PROMPT = TOKENIZER.encode("<|user|>x<|assistant|><think></think>")
# Structure is favoured, so that most replies end before their length does.
FAVOUR = dict.fromkeys(("</tool_call>", "</arg_value>", "</arg_key>", '"', "}", "]", "<|user|>"), 6.0)

STRINGS = st.one_of(
    st.just({"type": "string"}),
    st.fixed_dictionaries({"type": st.just("string"), "minLength": st.integers(0, 4), "maxLength": st.integers(4, 30)}),
    st.fixed_dictionaries({"type": st.just("string"), "pattern": st.sampled_from(
        (r"^[a-z]{2,5}$", r"\d", r"^(on|off)$", r"^a|b$", r"^https?://", r"[^/]/[xy]", r"^\w+@\w+\.com$"))}),
    st.builds(lambda v: {"enum": v}, st.lists(st.sampled_from(("a", "b c", "ü", "", 'q"', "12", "null")), min_size=1, unique=True)),
    st.just({"const": "only this"}), st.just({"type": "string", "format": "color"}),
)  # fmt: skip
NUMBERS = st.one_of(
    st.builds(lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n}, st.integers(-50, 50), st.integers(0, 200)),
    st.just({"type": "number", "exclusiveMinimum": 0, "maximum": 1}), st.just({"type": "integer", "multipleOf": 3}),
)  # fmt: skip
SCALARS = st.one_of(
    STRINGS, NUMBERS, st.just({"type": "boolean"}), st.just({"type": "null"}), st.just({"enum": [1, None, "x"]})
)


def objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of their properties required, and rules for others."""
    names = st.sampled_from(("city", "days", "unit", "a b", "größe", "x", "path", "0"))
    return st.dictionaries(names, values, max_size=5).flatmap(lambda p: st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.just(p), "required": st.sets(st.sampled_from(sorted(p))).map(sorted) if p else st.just([])},
        optional={"additionalProperties": st.sampled_from((False, {"type": "integer"}, {"type": "string"}))},
    ))  # fmt: skip


NESTED = st.one_of(objects(SCALARS), st.builds(lambda i: {"type": "array", "items": i, "maxItems": 3}, SCALARS))
VALUES = st.one_of(
    SCALARS, NESTED, st.just({}), st.just(True), st.just({"$ref": "#/$defs/D"}),
    st.builds(lambda v: {"anyOf": v}, st.lists(SCALARS, min_size=2, max_size=3)),
    st.builds(lambda s: {"anyOf": [s, {"type": "null"}]}, st.one_of(STRINGS, NESTED)),
    st.lists(st.sampled_from(("string", "integer", "boolean", "null", "array")), min_size=1, unique=True).map(lambda t: {"type": t}),
)  # fmt: skip
PARAMETERS = objects(VALUES).map(lambda o: {**o, "$defs": {"D": {"type": "object", "properties": {"k": {"type": "string"}},
                                                                "required": ["k"], "additionalProperties": False}}})  # fmt: skip
TOOLS = st.lists(PARAMETERS, min_size=1, max_size=3).map(
    lambda ps: [{"type": "function", "function": {"name": f"tool_{i}", "parameters": p}} for i, p in enumerate(ps)]
)


@pytest.mark.parametrize("num_drafts", [0, 3])
@settings(max_examples=60, deadline=None)
@given(
    tools=TOOLS,
    choice=st.sampled_from(("auto", "required")),
    parallel=st.booleans(),
    seed=st.integers(0, 2**20),
    temperature=st.sampled_from((0.0, 1.0)),
)
def test_calls_are_valid_against_their_schemas(tools, choice, parallel, seed, temperature, num_drafts) -> None:  # type: ignore[no-untyped-def]
    grammar = Grammar.tool_calls(tools, choice, parallel=parallel)
    engine = ScriptedModel(random_logits(seed, FAVOUR | {"<tool_call>": 8.0}), length=1024).engine(num_drafts)
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=250, grammar=grammar)
    seq = generate(engine, [PROMPT], params)[0]
    assert seq.finish_reason in ("stop", "length")
    reply = parse_reply(TOKENIZER.decode(seq.output), tools, thinking=False)
    if seq.finish_reason == "stop":
        assert not reply.diagnostics
        assert choice == "auto" or (reply.tool_calls and not reply.content)
        assert parallel or len(reply.tool_calls) <= 1
    else:
        reply.tool_calls[-1:] = []
    for call in reply.tool_calls:
        schema = next(t["function"]["parameters"] for t in tools if t["function"]["name"] == call.name)
        jsonschema.validate(json.loads(call.arguments), schema)


@settings(max_examples=50, deadline=None)
@given(schema=objects(VALUES.filter(lambda v: "$ref" not in json.dumps(v))), seed=st.integers(0, 2**20))
def test_json_is_valid_against_its_schema(schema: dict[str, Any], seed: int) -> None:
    engine = ScriptedModel(random_logits(seed, FAVOUR), length=1024).engine()
    seq = generate(engine, [PROMPT], SamplingParams(seed=seed, max_tokens=500, grammar=Grammar.json_schema(schema)))[0]
    if seq.finish_reason == "stop":
        jsonschema.validate(json.loads(TOKENIZER.decode(seq.output)), schema)
    assert not set(seq.output) & set(EOS)


WORDS = ("type", "enum", "const", "properties", "required", "additionalProperties", "anyOf", "oneOf", "allOf", "not", "$ref", "items",
         "pattern", "minLength", "maxLength", "format", "minimum", "$defs", "x", "string", "integer", "object", "#/$defs/x", "#/x", "(")  # fmt: skip
LEAVES = st.one_of(st.sampled_from(WORDS), st.none(), st.booleans(), st.integers(-2, 9), st.just(2.5), st.just(10**6))
ANY_JSON = st.recursive(
    LEAVES,
    lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(st.sampled_from(WORDS), v, max_size=4)),
    max_leaves=12,
)
MATCHERS = Matchers(TOKENIZER, 4096, frozenset(EOS))


@settings(max_examples=400, deadline=None)
@given(parameters=ANY_JSON, value=ANY_JSON)
def test_whatever_a_client_sends_for_a_schema_makes_a_grammar(parameters: Any, value: Any) -> None:
    tools = [
        {"name": "a", "parameters": parameters},
        {"name": "b", "parameters": {"type": "object", "properties": {"x": value}}},
    ]
    MATCHERS.new(Grammar.tool_calls(tools))
    for strict in (True, False):
        if isinstance(value, dict):
            with contextlib.suppress(RequestError):
                MATCHERS.new(Grammar.json_schema(value, strict=strict))
