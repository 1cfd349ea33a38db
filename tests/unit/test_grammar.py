"""What grammars let through, text by text; and what they say they do not hold."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm52.engine.matcher import Matchers
from glm52.errors import RequestError
from glm52.grammar import LARK, Grammar, full_match, without_unknown_formats
from tests.scripted import EOS, TOKENIZER

MATCHERS = Matchers(TOKENIZER, 4096, frozenset(EOS))


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether a text is a whole reply of a grammar; every one of its tokens must be in the mask before it."""
    matcher = MATCHERS.new(grammar)
    for token in TOKENIZER.encode(text):
        allowed = matcher.allowed()
        if allowed is None or not allowed[token]:
            return False
        matcher.follow(token)
    assert matcher.error is None
    allowed = matcher.allowed()
    return matcher.is_complete or (allowed is not None and bool(allowed[list(EOS)].all()))


def call(name: str, **arguments: str) -> str:
    pairs = (f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in arguments.items())
    return f"<tool_call>{name}{''.join(pairs)}</tool_call>"


def tool(name: str, properties: object = None, **schema: object) -> dict[str, object]:
    parameters = {"type": "object", **({} if properties is None else {"properties": properties}), **schema}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = tool("weather", {
    "city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 10}, "unit": {"enum": ["c", "f"]},
    "when": {"anyOf": [{"type": "string", "pattern": "^(today|later)$"}, {"type": "null"}]},
    "id": {"type": ["string", "integer"]}, "place": {"$ref": "#/$defs/Place"}, "odd": False,
}, required=["city"], **{"$defs": {"Place": {"type": "object", "properties": {"x": {"type": "number"}},
                                             "required": ["x"], "additionalProperties": False}}})  # fmt: skip
PING = tool("ping", {})
NOTE = tool("note", {"a": {"type": "string"}}, additionalProperties={"type": "integer"})
FREE = {"name": "free", "parameters": {}}
TOOLS = [WEATHER, PING, NOTE, FREE]


def test_text_with_a_grammar_of_its_own() -> None:
    """Calls of several tools with such grammars, whose rules have names in common; what is no grammar is a warning."""
    forms = {
        "patch": 'start: line+\nline: "+" /.*/ LF\n%import common.LF',
        "sum": 'start: line\nline: /[0-9]+/ ("+" line)?',
    }
    tools = [{"name": n, "parameters": {"properties": {"input": {"type": "string", LARK: f}}, "required": ["input"]}}
             for n, f in forms.items()]  # fmt: skip
    grammar = Grammar.tool_calls(tools)
    assert not grammar.warnings and accepts(grammar, "Hi") and accepts(grammar, call("patch", input="+a}\n+\n"))
    assert accepts(grammar, call("sum", input="1+2") + call("patch", input="+\n"))
    assert not accepts(grammar, call("patch", input="a\n")) and not accepts(grammar, call("sum", input="+a\n"))
    tools[0]["parameters"]["properties"]["input"][LARK] = "start: <"
    assert Grammar.tool_calls(tools).warnings == ("patch.input: its grammar is not held",)


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("", True), ("Hello, world.", True), (call("ping"), True), ("First. " + call("ping") + call("free"), True),
        (call("ping") + "more", False), ("</think>", False), ("a <tool_call", True), (call("nothing"), False),
        (call("weather"), False), (call("weather", city="Rome"), True), (call("weather", city=""), True),
        (call("weather", days="3", city="Rome", unit="c"), True), (call("weather", city="a<b>c\n{"), True),
        (call("weather", city="a") + call("weather", city="b"), True), (call("weather", city="a", odd="1"), False),
        (call("weather", city="Rome", days="11"), False), (call("weather", city="Rome", days="x"), False),
        (call("weather", city="Rome", unit="k"), False), (call("weather", city="Rome", when="today"), True),
        (call("weather", city="Rome", when="null"), True), (call("weather", city="Rome", when="soon"), False),
        (call("weather", city="Rome", id="12"), True), (call("weather", city="Rome", id="x12"), True),
        (call("weather", city="Rome", id="[1]"), False), (call("weather", city="Rome", place='{"x": 1.5}'), True),
        (call("weather", city="Rome", place='{"y": 1}'), False), (call("weather", unit="c"), False),
        (call("weather", city="Rome", more="1"), False), (call("ping", more="1"), False),
        (call("note", a="x", n="1"), True), (call("note", n="1", m="2"), True), (call("note", n="x"), False),
        (call("free", anything="at all"), True), (call("weather", city="a", days="1").replace("</arg_key>", ""), False),
    ],
)  # fmt: skip
def test_calls(text: str, is_right: bool) -> None:
    assert accepts(Grammar.tool_calls(TOOLS), text) is is_right


def test_a_tool_without_parameters_has_no_arguments() -> None:
    for function in ({"name": "f"}, {"name": "f", "parameters": None}):
        grammar = Grammar.tool_calls([{"type": "function", "function": function}], "required")
        assert accepts(grammar, call("f")) and not accepts(grammar, call("f", a="1"))


def test_an_argument_is_given_once() -> None:
    twice = call("weather", city="a").replace("</tool_call>", "") + call("", city="b").removeprefix("<tool_call>")
    assert not accepts(Grammar.tool_calls(TOOLS), twice)
    closed = tool("t", {f"p{i}": {"type": "integer"} for i in range(70)}, required=["p3"], additionalProperties=False)
    many = Grammar.tool_calls([closed], "required")
    assert accepts(many, call("t", p3="1", p69="2")) and not accepts(many, call("t", p69="2"))
    assert not accepts(many, call("t", p3="1", p4="2", p5="x")) and not accepts(many, call("t", p3="1", q="1"))


def test_choices_of_tools() -> None:
    one = Grammar.tool_calls(TOOLS, parallel=False)
    assert accepts(one, "x" + call("ping")) and not accepts(one, call("ping") + call("ping"))
    required = Grammar.tool_calls(TOOLS, "required")
    assert (
        accepts(required, call("ping") * 3) and not accepts(required, "x") and not accepts(required, "x" + call("ping"))
    )
    named = Grammar.tool_calls(TOOLS, "named", name="ping")
    assert accepts(named, call("ping")) and not accepts(named, call("free")) and not accepts(named, call("ping") * 2)
    none = Grammar.tool_calls(TOOLS, "none")
    assert accepts(none, "just text") and not accepts(none, call("ping"))
    with pytest.raises(RequestError, match="no tool is called 'pong'"):
        Grammar.tool_calls(TOOLS, "named", name="pong")


def test_calls_or_an_answer_of_a_given_form() -> None:
    for answer, right in (
        (Grammar.json_schema({"type": "integer"}), "12"),
        (Grammar.regex("a+|b"), "aa"),
        (Grammar.choice(["x", "y"]), "y"),
    ):
        grammar = Grammar.tool_calls(TOOLS, answer=answer)
        assert accepts(grammar, right) and accepts(grammar, call("ping") * 2)
        assert not accepts(grammar, "z") and not accepts(grammar, right + call("ping"))
        assert accepts(Grammar.tool_calls(TOOLS, "none", answer=answer), right)
    with pytest.raises(RequestError, match="several rules"):
        Grammar.tool_calls(TOOLS, answer=Grammar.lark('start: A\nA: "a"'))


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("json_schema", {"type": "null"}, "null"),
        ("json_object", None, "{}"),
        ("regex", "a", "a"),
        ("grammar", 'start: "a"', "a"),
        ("choice", ["a"], "a"),
    ],
)
def test_structures_by_name(kind, value, text: str) -> None:  # type: ignore[no-untyped-def]
    assert accepts(Grammar.structured(kind, value), text)
    if kind != "json_object":
        with pytest.raises(RequestError, match=rf"it: {kind} expects"):
            Grammar.structured(kind, 5, param="it")


def test_markers_cannot_be_spelled_out() -> None:
    """Ordinary tokens that join to a marker's text would be read as the marker."""
    grammar = Grammar.tool_calls(TOOLS)
    for lead, marker in (
        ("so: ", "<tool_call>"),
        ("", "</think>"),
        ("<tool_call>weather<arg_key>city</arg_key><arg_value>", "</arg_value>"),
    ):
        matcher = MATCHERS.new(grammar)
        tokens = TOKENIZER.encode(marker, special=False)
        for token in [*TOKENIZER.encode(lead), *tokens[:-1]]:
            matcher.follow(token)
        allowed = matcher.allowed()
        assert matcher.error is None and allowed is not None and not allowed[tokens[-1]]


def test_json_patterns_and_choices() -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    assert accepts(Grammar.json_schema(schema), '{\n  "n": 3\n}') and not accepts(
        Grammar.json_schema(schema), '{"m": 3}'
    )
    assert not accepts(Grammar.json_schema(schema), '{"n":' + " " * 41 + "3}")
    assert accepts(Grammar.json_object(), '{"a": [1, null]}') and not accepts(Grammar.json_object(), "[1]")
    assert accepts(Grammar.json_schema({"type": "string", "format": "unheard-of"}), '"x"')
    assert (
        accepts(Grammar.regex("^a+|b/c$"), "aaa")
        and accepts(Grammar.regex("a+|b/c"), "b/c")
        and not accepts(Grammar.regex("a+"), "ab")
    )
    assert accepts(Grammar.choice(["yes", 'say "no"\n']), 'say "no"\n') and not accepts(Grammar.choice(["yes"]), "ye")
    assert accepts(Grammar.lark('start: "a" NUMBER\nNUMBER: /[0-9]+/'), "a12")
    assert accepts(Grammar.lark('root ::= "a" [0-9]+'), "a12") and not accepts(Grammar.lark('root ::= "a" [0-9]+'), "a")


@pytest.mark.parametrize(
    "grammar",
    [
        lambda: Grammar.json_schema({"type": "string", "not": {"const": "x"}}, param="it"), lambda: Grammar.regex("(", param="it"),
        lambda: Grammar.lark("start: <nonsense>", param="it"), lambda: Grammar.regex("a^b", param="it"),
        lambda: Grammar.choice([], param="it"), lambda: Grammar.lark("root ::= (", param="it"),
        lambda: Grammar.json_schema({"$ref": "https://example.org/x"}, param="it"),
    ],
)  # fmt: skip
def test_what_is_no_grammar_is_named(grammar) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RequestError, match=r"^it: ") as caught:
        MATCHERS.new(grammar())
    assert caught.value.param == "it"


def test_what_is_not_held_is_said() -> None:
    odd = tool("odd", {
        "s": {"type": "string", "format": "email"}, "p": {"type": "string", "pattern": r"a(?=b)"},
        "none": {"type": "string", "pattern": "^a{5}$", "maxLength": 3}, "all": {"type": "array", "items": {"$ref": "#"}},
        "n": {"type": "integer", "not": {"const": 3}}, "r": {"$ref": "https://example.org/x"},
        "l": {"type": "array", "items": {"$ref": "https://example.org/y"}},
    }, minProperties=2)  # fmt: skip
    grammar = Grammar.tool_calls([odd])
    said = " ".join(grammar.warnings)
    for word in ("odd.s: format", "odd.p: the pattern", 'Unimplemented keys: ["not"]', "odd.l", "minProperties"):
        assert word in said, (word, said)
    assert accepts(grammar, call("odd", s="x", p="ab", n="3", r="1", l="[1]"))
    assert not Grammar.json_schema({"type": "string", "not": {"const": "x"}}, strict=False).warnings
    assert not Grammar.tool_calls(TOOLS).warnings


def test_formats_are_dropped_where_they_are_keywords_only() -> None:
    schema = {
        "format": "color",
        "properties": {"format": {"type": "string", "format": "date"}},
        "enum": [{"format": "color"}],
    }
    assert without_unknown_formats(schema) == {k: v for k, v in schema.items() if k != "format"}


PIECES = st.sampled_from(["a", "b", "^", "$", "|", r"\$", r"\|", "[^a|$]", "(a|b)", "[]]", ".", "b*"])


@given(pieces=st.lists(PIECES, max_size=7), text=st.text("ab|$]", max_size=5))
def test_full_match_means_what_search_means(pieces: list[str], text: str) -> None:
    pattern = "".join(pieces)
    try:
        compiled = re.compile(pattern)
    except re.error:
        return
    whole = full_match(pattern, search=True)
    if whole is not None:
        assert bool(re.fullmatch(whole, text)) == bool(compiled.search(text))


def test_a_reference_to_what_is_no_schema_is_none() -> None:
    circular = {"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/$ref"}}}
    assert accepts(Grammar.tool_calls([circular]), call("f", x="1"))
