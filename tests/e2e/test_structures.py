"""Forms that nothing can have, or that are too much to hold, and numbers at the ends of their ranges are the client's error
or a reason to end: never a 500."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from glm52.engine import AsyncEngine
from tests.scripted import ScriptedModel, random_logits
from tests.serving import USER, asgi, ask, running, scripted_service

NO_END = {"$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}}}
SCHEMAS: list[Any] = [
    {"enum": []}, {"anyOf": []}, {"type": []}, {"type": "banana"}, {"$ref": "#"}, {"$ref": "#/no"}, {"not": {}},
    {"type": "integer", "minimum": 5, "maximum": 3}, {"type": "integer", "multipleOf": 7919, "minimum": 1, "maximum": 5},
    {"type": "number", "multipleOf": 0}, {"type": "string", "minLength": 5, "maxLength": 3},
    {"type": "array", "minItems": 5, "maxItems": 3}, {"type": "array", "items": {"type": "null"}, "minItems": 100_000},
    {"type": "object", "properties": {"a": False}, "required": ["a"]}, {"allOf": [{"type": "string"}, {"type": "null"}]},
    {"type": "string", "pattern": "(?=a)b"}, {"type": "string", "pattern": r"[^\s\S]"},
    {"type": "string", "pattern": "^a{5}$", "maxLength": 3}, {"type": "string", "pattern": "(a|b)*a(a|b){200}"},
    {"type": "string", "pattern": r"\ud800"}, {"type": "string", "minLength": 1_000_000},
    {"const": "</think><|user|>"}, {"const": "</arg_value>"}, {"$ref": "#/$defs/a", **NO_END},
    {"type": "object", "propertyNames": {"pattern": r"[^\s\S]"}, "minProperties": 1},
]  # fmt: skip
PATTERNS = ["(?=a)b", "(a)\\1", r"\bx\b", r"[^\s\S]", "(a|b)*a(a|b){300}", "a{100000}", "(a{1000}){1000}", "[", "\\",
            "(.*a.*){20}", "</think>", r"<\|user\|>", "", "[a-z]{2,1}", "\0"]  # fmt: skip
GRAMMARS = [
    "start: start", "start: a\na: b\nb: a", "start: /a/ start", "start: A\nA: /a/ & /b/", 'start: "a" B\nB: /x/ & /y/',
    "start: a{100000}\na: /x/", "start: @x", "start: <|no|>", "start: " + "(" * 5000, "", "start: /a/\n%ignore /a*/",
    "root ::= root", 'root ::= "a" root', "root ::= x", "::=", "root ::= " + "(" * 900 + '"a"' + ")" * 900,
]  # fmt: skip


def as_schema(schema: Any, *, strict: bool) -> Any:
    form = {"name": "x", "schema": schema, "strict": strict}
    return "response_format.", {"response_format": {"type": "json_schema", "json_schema": form}}


def as_argument(schema: Any) -> Any:
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return "tool", {"tools": [tool], "tool_choice": "required"}


FORMS = {
    "schemas": [as_schema(s, strict=False) for s in SCHEMAS],
    "strict schemas": [as_schema(s, strict=True) for s in SCHEMAS],
    "arguments": [as_argument(s) for s in SCHEMAS],
    "patterns": [("guided_regex", {"guided_regex": p}) for p in PATTERNS],
    "grammars": [("guided_grammar", {"guided_grammar": g}) for g in GRAMMARS],
    "choices": [("guided_choice", {"guided_choice": c}) for c in ([], [""], ["</think>"], ["a" * 10_000], ["\0"])],
}


@pytest.mark.parametrize("num_drafts", [0, 2])
@pytest.mark.parametrize("kind", FORMS)
def test_a_form_is_held_or_refused_by_its_name_or_ends_the_reply(kind: str, num_drafts: int) -> None:
    backend = AsyncEngine(ScriptedModel(random_logits(1)).engine(num_drafts))

    async def main() -> list[httpx.Response]:
        async with asgi(scripted_service(backend, context_length=2048)) as client:
            asked = {"messages": USER, "max_tokens": 40, "thinking": {"type": "disabled"}}
            return [await client.post("/v1/chat/completions", json=asked | fields) for _, fields in FORMS[kind]]

    replies = asyncio.run(main())
    backend.close()
    for (field, fields), reply in zip(FORMS[kind], replies, strict=True):
        if reply.status_code == 200:
            reason = reply.json()["choices"][0]["finish_reason"]
            assert reason in ("stop", "length", "tool_calls", "repetition", "grammar"), fields
            assert reason != "grammar" or "B: /x/" in fields["guided_grammar"], "known before the reply"
        else:
            assert reply.status_code == 400, (fields, reply.text)
            assert reply.json()["error"]["param"].startswith(field), (fields, reply.text)


NUMBERS: list[Any] = [
    {"temperature": 5e-324}, {"temperature": 2.0, "top_p": 0.0}, {"min_p": 1.0}, {"top_p": 5e-324, "top_k": 1 << 70},
    {"repetition_penalty": 1e-6}, {"repetition_penalty": 1e6}, {"seed": 1 << 70}, {"seed": -(1 << 70)},
    {"presence_penalty": -2.0, "frequency_penalty": 2.0}, {"logit_bias": {"5": 100, "6": -100}}, {"max_tokens": 1 << 70},
    {"logprobs": True, "top_logprobs": 20},
]  # fmt: skip
TOO_FAR: list[Any] = [
    {"temperature": 2.1}, {"repetition_penalty": 1e308}, {"logit_bias": {"5": 1e308}}, {"logit_bias": {"5": -101}},
    {"top_p": -5e-324}, {"logprobs": True, "top_logprobs": 1 << 70}, {"max_tokens": 0}, {"presence_penalty": 2.1},
]  # fmt: skip


@pytest.mark.parametrize("text", [" yes ", "a</think>b", "a <think> b", "<tool_call>f</tool_call>"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", ["choice", "schema"])
def test_what_is_held_to_a_form_comes_to_the_letter(text: str, stream: bool, form: str) -> None:
    """Markers and white space are text there; with calls possible, too."""
    tool = {"type": "function", "function": {"name": "f"}}
    schema = {"type": "object", "properties": {"t": {"const": text}}, "required": ["t"], "additionalProperties": False}
    fields = as_schema(schema, strict=True)[1] if form == "schema" else {"guided_choice": [text]}
    backend = AsyncEngine(ScriptedModel(random_logits(1, {"<tool_call>": -50.0})).engine())
    try:
        with running(scripted_service(backend)) as url, httpx.Client(base_url=url) as client:
            for tools in ({}, {"tools": [tool]}) if form == "schema" else ({},):
                said = ask(
                    client, "chat", "x", max_tokens=200, stream=stream, thinking={"type": "disabled"}, **fields, **tools
                )
                assert (json.loads(said.content)["t"] if form == "schema" else said.content) == text
    finally:
        backend.close()


def test_numbers_at_the_ends_of_their_ranges_are_harmless() -> None:
    """One that made the engine's arithmetic fail would have ended it for everybody."""
    backend = AsyncEngine(ScriptedModel(random_logits(1)).engine(2))

    async def main(bodies: list[Any]) -> list[int]:
        async with asgi(scripted_service(backend, context_length=256)) as client:
            asked = {"messages": USER, "max_tokens": 20}
            replies = [await client.post("/v1/chat/completions", json=asked | fields) for fields in bodies]
            return [r.status_code for r in replies]

    assert asyncio.run(main(NUMBERS)) == [200] * len(NUMBERS)
    assert asyncio.run(main(TOO_FAR)) == [400] * len(TOO_FAR)
    assert asyncio.run(main([{}])) == [200]
    backend.close()
