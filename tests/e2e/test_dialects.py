"""Every dialect as its official client meets it, over a scripted model: streamed or not, tools, thinking, errors."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.scripted import TOKENIZER
from tests.serving import USER, WEATHER, Script, ask, running, scripted_service, sse

CALL = ("<tool_call>get_weather<arg_key>city</arg_key><arg_value>São \"P\"</arg_value>"
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>")  # fmt: skip
SECOND = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>"
ARGUMENTS = {"city": 'São "P"', "days": 3}
FUNCTION = WEATHER["function"]
RESPONSES_TOOL: Any = {"type": "function", "strict": False, **FUNCTION}
ANTHROPIC_TOOL: Any = {"name": "get_weather", "description": "", "input_schema": FUNCTION["parameters"]}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Script, str]]:
    script = Script()
    with running(scripted_service(script)) as url:
        yield script, url


@pytest.fixture(autouse=True)
def script(server: tuple[Script, str]) -> Script:
    script, _ = server
    script.text, script.stride, script.error = "Let me see.</think>Hello!", 1, None
    return script


@pytest.fixture(scope="module")
def gpt(server: tuple[Script, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: tuple[Script, str]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server[1], api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: tuple[Script, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[1], timeout=60) as client:
        yield client


# ── OpenAI chat completions ──────────────────────────────────────────────────────────────────────────────────────


def test_chat_parallel_calls_and_their_results(script: Script, gpt: openai.OpenAI) -> None:
    script.text = f"I look.</think>{CALL}{SECOND}"
    message = gpt.chat.completions.create(model="nano", messages=USER, tools=[WEATHER]).choices[0].message
    assert message.content is None and [json.loads(c.function.arguments) for c in message.tool_calls] == [
        ARGUMENTS, {"city": "Rome"}]  # fmt: skip
    results: list[Any] = [{"role": "tool", "tool_call_id": c.id, "content": "21C"} for c in message.tool_calls]
    script.text = "Warm.</think>21 degrees."
    reply = gpt.chat.completions.create(model="nano", messages=[*USER, message, *results], tools=[WEATHER])
    assert reply.choices[0].message.content == "21 degrees."
    tail = script.prompts[-1].partition("<|user|>Hi")[2]
    assert tail == (f"<|assistant|><think>I look.</think>{CALL}{SECOND}<|observation|><tool_response>21C</tool_response>"
                    "<tool_response>21C</tool_response><|assistant|><think>")  # fmt: skip


def test_chat_logprobs_and_several_answers(script: Script, gpt: openai.OpenAI) -> None:
    fields: Any = {"model": "nano", "messages": USER, "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 5}
    whole = gpt.chat.completions.create(**fields)
    assert [p.seed for p in script.params[-2:]] == [5, 6]
    assert [c.message.content for c in whole.choices] == ["Hello!", "Hello!"]
    chunks = [c.choices[0] for c in gpt.chat.completions.create(**fields, stream=True)]
    for choice in whole.choices:
        tokens = choice.logprobs.content
        assert "".join(t.token for t in tokens) == "Hello!" and len(tokens[0].top_logprobs) == 2
        mine = [c for c in chunks if c.index == choice.index]
        assert [t.token for c in mine if c.logprobs for t in c.logprobs.content] == [t.token for t in tokens]
        assert [c.finish_reason for c in mine if c.finish_reason] == ["stop"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/paas/v4/chat/completions"])
@pytest.mark.parametrize("fields", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}, {}])
@pytest.mark.parametrize("stride", [1, 3, 99])
def test_chat_tells_log_probabilities_of_the_content_only(
    script: Script, http: httpx.Client, path: str, fields: Any, stride: int
) -> None:
    """They spelled the thought that was left out, in a stream as chunks of nothing else."""
    script.text, script.stride = f"I look.</think>It is</think> 雨.{CALL}", stride
    body = {"messages": USER, "tools": [WEATHER], "logprobs": True, **fields}
    whole = http.post(path, json=body).json()["choices"][0]
    assert whole["message"]["content"] == "It is 雨."
    told = b"".join(bytes(t["bytes"]) for t in whole["logprobs"]["content"]).decode()
    assert told == "It is 雨."
    frames = [json.loads(d) for _, d in sse(http.post(path, json=body | {"stream": True}).text)[:-1]]
    choices = [c for f in frames for c in f["choices"]]
    entries = [t for c in choices if c.get("logprobs") for t in c["logprobs"]["content"]]
    assert entries == whole["logprobs"]["content"]
    assert all(c["delta"] or c["finish_reason"] for c in choices), "no chunk is empty"
    assert all("content" in c["delta"] for c in choices if c.get("logprobs"))


def test_chat_takes_reasoning_by_either_name(script: Script, http: httpx.Client) -> None:
    """An empty one hid the other."""
    for said in ({"reasoning": "Aha."}, {"reasoning": "Aha.", "reasoning_content": ""}, {"reasoning_content": "Aha."}):
        turns = [*USER, {"role": "assistant", "content": "Yes.", **said}, *USER]
        http.post("/v1/chat/completions", json={"messages": turns, "clear_thinking": False})
        assert "<think>Aha.</think>Yes." in script.prompts[-1]


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("at", ["guided_json", "structured_outputs"])
def test_a_schema_may_come_as_text(script: Script, http: httpx.Client, path: str, at: str) -> None:
    """As vLLM takes it."""
    sources = []
    for schema in (SCHEMA, json.dumps(SCHEMA), "{oops", "[]"):
        given = {at: schema if at == "guided_json" else {"json": schema}}
        reply = http.post(path, json={"messages": USER, "prompt": "Hi", **given})
        if schema in ("{oops", "[]"):
            param = at if at == "guided_json" else f"{at}.json"
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        else:
            assert reply.status_code == 200, reply.text
            sources.append(script.params[-1].grammar)
    assert sources[0] == sources[1] is not None


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_structured_outputs_are_held_or_refused(script: Script, http: httpx.Client, path: str) -> None:
    """A form with a name that is not known was no form, in silence."""
    body = {"messages": USER, "prompt": "Hi"}
    assert http.post(path, json=body | {"structured_outputs": {"json_object": True}}).status_code == 200
    assert script.params[-1].grammar is not None and '"object"' in script.params[-1].grammar.source
    refused = http.post(path, json=body | {"structured_outputs": {"structural_tag": "x"}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "structured_outputs")
    assert "structural_tag" in refused.json()["error"]["message"]
    for nothing in ({}, {"json_object": False}, {"json": None}):
        assert http.post(path, json=body | {"structured_outputs": nothing}).status_code == 200
        assert script.params[-1].grammar is None


def test_chat_parses_into_a_schema(script: Script, gpt: openai.OpenAI) -> None:
    from pydantic import BaseModel

    class City(BaseModel):
        name: str
        size: int

    script.text = '</think>{"name": "Rome", "size": 3}'
    reply = gpt.chat.completions.parse(model="nano", messages=USER, response_format=City)
    assert reply.choices[0].message.parsed == City(name="Rome", size=3)
    assert script.params[-1].grammar is not None and '"size"' in script.params[-1].grammar.source


@pytest.mark.parametrize(
    ("choice", "start"),
    [("auto", "T0 (r"), ("required", "r"), ("none", "T0"), ({"type": "function", "function": {"name": "get_weather"}}, "r")],
)  # fmt: skip
def test_chat_tool_choices_become_grammars(script: Script, gpt: openai.OpenAI, choice: Any, start: str) -> None:
    """tools stand in the prompt whatever the choice, so that prefixes hit."""
    script.text = f"</think>{CALL}"
    reply = gpt.chat.completions.create(model="nano", messages=USER, tools=[WEATHER], tool_choice=choice)
    assert bool(reply.choices[0].message.tool_calls) is (choice != "none")
    grammar = script.params[-1].grammar
    assert grammar is not None and grammar.source.startswith(f"start: {start}")
    assert "get_weather" in script.prompts[-1]


def test_only_allowed_tools_can_be_called(script: Script, http: httpx.Client) -> None:
    """The prompt shows all of them, so that prefixes hit; the grammar has those that are allowed."""
    other: Any = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
    for path, said, nested in (("chat/completions", {"messages": USER}, True), ("responses", {"input": "Hi"}, False)):
        write = (lambda t: t) if nested else (lambda t: {"type": "function", **t["function"]})

        def chosen(mode: str, *names: str, nested: bool = nested) -> Any:
            named = [{"name": n} for n in names]
            inner = {"mode": mode, "tools": [{"type": "function", **({"function": n} if nested else n)} for n in named]}
            return {"type": "allowed_tools", **({"allowed_tools": inner} if nested else inner)}

        body = said | {"tools": [write(WEATHER), write(other)]}
        for mode in ("auto", "required"):
            script.text = f"</think>{CALL}"
            reply = http.post(f"/v1/{path}", json=body | {"tool_choice": chosen(mode, "get_weather")})
            grammar = script.params[-1].grammar
            assert reply.status_code == 200 and "get_weather" in reply.text and "get_time" in script.prompts[-1]
            assert grammar is not None and "get_weather" in grammar.source and "get_time" not in grammar.source
            assert grammar.source.startswith("start: T0 (r" if mode == "auto" else "start: r")
        at = "tool_choice.allowed_tools" if nested else "tool_choice"
        for choice, param in ((chosen("any", "get_time"), f"{at}.mode"), (chosen("auto", "gone"), f"{at}.tools"),
                              (chosen("auto"), f"{at}.tools")):  # fmt: skip
            error = http.post(f"/v1/{path}", json=body | {"tool_choice": choice}).json()["error"]
            assert error["param"] == param and error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({"response_format": {"type": "json_object"}}, '%json {"type": "object"'),
        ({"guided_json": {"type": "integer"}}, '%json {"type": "integer"'),
        ({"guided_regex": "[a-z]+"}, "/"),
        ({"guided_choice": ["yes", "no"]}, '"yes" | "no"'),
        ({"structured_outputs": {"choice": ["yes"], "regex": None}}, '"yes"'),
        ({"guided_grammar": 'start: "a"'}, '"a"'),
        ({"response_format": {"type": "text"}}, None),
    ],
)
def test_chat_structures_become_grammars(script: Script, http: httpx.Client, fields: Any, source: str | None) -> None:
    for path, said in (("chat/completions", {"messages": USER}), ("completions", {"prompt": "x"})):
        if "response_format" not in fields or "messages" in said:
            assert http.post(f"/v1/{path}", json=said | fields).status_code == 200
            grammar = script.params[-1].grammar
            assert (grammar and grammar.source.partition("start: ")[2][: len(source or "")]) == source


def test_what_a_schema_says_and_nobody_holds_is_named(script: Script, http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    reply = http.post("/v1/chat/completions", json={"messages": USER, "tools": [tool]})
    assert reply.headers["x-glm52-unheld"] == "f.day: format is not held for a string"


def test_stop_strings_do_not_end_thinking(script: Script, gpt: openai.OpenAI) -> None:
    script.text = "One. STOP. Two STO</think>P three STOP four"
    message = gpt.chat.completions.create(model="nano", messages=USER, stop=["STOP"]).choices[0].message
    assert (message.reasoning_content, message.content) == ("One. STOP. Two STO", "P three")


@pytest.mark.parametrize("before", ["", SECOND])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_inside_a_call_leaves_no_half_of_it(
    script: Script, http: httpx.Client, before: str, stream: bool
) -> None:
    """It came with arguments that were cut off and a reason that did not say so."""
    script.text = f"</think>{before}{CALL}"
    tools = {"chat": [WEATHER], "zai": [WEATHER], "responses": [RESPONSES_TOOL], "messages": [ANTHROPIC_TOOL]}
    reasons = {"chat": "stop", "zai": "stop", "messages": "stop_sequence"}
    for dialect, reason in reasons.items():
        stop = {"stop_sequences" if dialect == "messages" else "stop": ["days"]}
        said = ask(http, dialect, "Hi", max_tokens=200, stream=stream, tools=tools[dialect], **stop)
        halves = [a for _, a in said.calls if not a.endswith("}")]
        assert said.finish == reason and len(halves) == (stream and dialect != "zai"), dialect
        assert len(said.calls) - len(halves) == bool(before)


def test_coding_mode_is_one_switch(script: Script, http: httpx.Client) -> None:
    turns = [*USER, {"role": "assistant", "content": "Hello!", "reasoning_content": "Thought."}, *USER]
    for path in ("/v1/chat/completions", "/v1/messages", "/api/paas/v4/chat/completions"):
        given: Any = turns if "chat" in path else [
            turns[0], {"role": "assistant", "content": [{"type": "thinking", "thinking": "Thought.", "signature": ""},
                                                        {"type": "text", "text": "Hello!"}]}, turns[2]]  # fmt: skip
        for fields, headers in (({"mode": "coding"}, {}), ({}, {"x-glm52-mode": "coding"})):
            assert http.post(path, json={"messages": given, **fields}, headers=headers).status_code == 200
            assert "<think>Thought.</think>Hello!" in script.prompts[-1] and "Effort: Max" in script.prompts[-1]
            assert (script.params[-1].temperature, script.params[-1].top_p) == (0.7, 1.0)
        http.post(path, json={"messages": given, "mode": "coding", "temperature": 0.2, "clear_thinking": True})
        assert "Thought." not in script.prompts[-1] and script.params[-1].temperature == 0.2


# ── OpenAI text completions ──────────────────────────────────────────────────────────────────────────────────────


def test_completions_of_texts_and_ids(script: Script, gpt: openai.OpenAI) -> None:
    script.text = " one two three"
    ids = TOKENIZER.encode("count:")
    for prompt in ("count:", ids, ["count:", "count:"], [ids, ids]):
        reply = gpt.completions.create(model="nano", prompt=prompt, max_tokens=50, logprobs=1)
        assert {c.text for c in reply.choices} == {script.text} and script.prompts[-1] == "count:"
        assert reply.choices[0].logprobs.text_offset[:2] == [0, len(reply.choices[0].logprobs.tokens[0])]
    assert len(reply.choices) == 2 and reply.usage.prompt_tokens == 2 * len(ids)
    chunks = list(gpt.completions.create(model="nano", prompt=["a", "b"], stream=True, stop=" three"))
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert "".join(c.text for c in mine) == " one two" and mine[-1].finish_reason == "stop"
    fields: Any = {"model": "nano", "prompt": "count:", "extra_body": {"return_token_ids": True}}
    whole = gpt.completions.create(**fields).choices[0].model_dump()
    assert (whole["prompt_token_ids"], whole["token_ids"]) == (ids, TOKENIZER.encode(script.text))
    parts = [c.choices[0].model_dump() for c in gpt.completions.create(**fields, stream=True)]
    assert parts[0]["prompt_token_ids"] == ids and [t for p in parts for t in p["token_ids"]] == whole["token_ids"]


# ── OpenAI responses ─────────────────────────────────────────────────────────────────────────────────────────────


def test_responses_whole_and_streamed(script: Script, gpt: openai.OpenAI) -> None:
    script.text = f"I look.</think>Wait.{CALL}{SECOND}"
    fields: Any = {"model": "nano", "input": "Hi", "tools": [RESPONSES_TOOL], "instructions": "Be brief."}
    whole = gpt.responses.create(**fields)
    assert "<|system|>Be brief.<|user|>Hi<|assistant|>" in script.prompts[-1]
    assert [i.type for i in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    assert whole.output_text == "Wait." and whole.output[0].content[0].text == "I look."
    assert json.loads(whole.output[2].arguments) == ARGUMENTS and whole.status == "completed"
    assert whole.usage.output_tokens_details.reasoning_tokens == len(TOKENIZER.encode("I look."))
    events = list(gpt.responses.create(**fields, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    last = events[-1].response
    assert [_anonymous(i) for i in last.output] == [_anonymous(i) for i in whole.output]
    assert last.usage == whole.usage
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert [_anonymous(i) for i in done] == [_anonymous(i) for i in whole.output]
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta" and e.output_index == 2]
    assert json.loads("".join(deltas)) == ARGUMENTS
    with gpt.responses.stream(**fields) as stream:  # the client keeps a snapshot of its own and checks it
        assert stream.get_final_response().output_text == "Wait."


def _anonymous(item: Any) -> dict[str, Any]:
    return {k: v for k, v in item.model_dump().items() if k not in ("id", "call_id", "parsed_arguments")}


def test_responses_take_their_own_output_back(script: Script, gpt: openai.OpenAI) -> None:
    script.text = f"I look.</think>{CALL}"
    include: Any = ["reasoning.encrypted_content"]
    first = gpt.responses.create(
        model="nano", input=USER, tools=[RESPONSES_TOOL], include=include, store=False, reasoning={"summary": "auto"}
    )
    assert first.output[0].summary[0].text == "I look."
    items = [i.model_dump(exclude_none=True) for i in first.output]
    items[0] = {"type": "reasoning", "summary": [], "encrypted_content": items[0]["encrypted_content"]}
    result: Any = {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "21C"}
    gpt.responses.create(model="nano", input=[*USER, *items, result], tools=[RESPONSES_TOOL])
    assert script.prompts[-1].endswith(f"<|assistant|><think>I look.</think>{CALL}<|observation|><tool_response>21C"
                                       "</tool_response><|assistant|><think>")  # fmt: skip


def test_responses_leave_nothing_out_in_silence(script: Script, http: httpx.Client) -> None:
    file = {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="}
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
    for fields, param in (
        ({"input": [*USER, {"type": "compaction", "encrypted_content": "x"}]}, "input.1"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}, file]}]}, "input.0.content.1"),
        ({"input": [*USER, {"type": "function_call_output", "call_id": "c", "output": [file]}]}, "input.1.output.0"),
        ({"conversation": "conv_1"}, "conversation"), ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ):  # fmt: skip
        reply = http.post("/v1/responses", json={"input": "Hi", **fields})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, param) and error["message"].startswith(f"{param}: ")
    for searches, named in (([search], "web_search_call"), ([search] * 3, "web_search_call and 2 more")):
        body = {"input": [*USER, *searches, {"role": "user", "content": "More."}], "truncation": "auto"}
        assert http.post("/v1/responses", json=body).headers["x-glm52-ignored"] == f"truncation, input.1 ({named})"
    custom = [{"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": "a\nb"},
              {"type": "custom_tool_call_output", "call_id": "c", "output": "done"}]  # fmt: skip
    assert http.post("/v1/responses", json={"input": [*USER, *custom]}).status_code == 200
    assert "<arg_key>input</arg_key><arg_value>a\nb</arg_value></tool_call>" in script.prompts[-1]
    assert "<tool_response>done</tool_response>" in script.prompts[-1]


@pytest.mark.parametrize("stride", [1, 3, 99])
def test_responses_tell_log_probabilities_with_their_texts(script: Script, gpt: openai.OpenAI, stride: int) -> None:
    """They came whole at the end only, and not at all where a call stood before or after the text."""
    script.text, script.stride = f"I look.</think>Wait for it.{CALL} And so on.\n", stride
    fields: Any = {"model": "nano", "input": "Hi", "tools": [RESPONSES_TOOL], "top_logprobs": 2,
                   "include": ["message.output_text.logprobs"]}  # fmt: skip
    whole = gpt.responses.create(**fields)
    events = list(gpt.responses.create(**fields, stream=True))
    texts = [i.content[0] for i in whole.output if i.type == "message"]
    assert [t.text for t in texts] == ["Wait for it.", " And so on."]
    assert ["".join(p.token for p in t.logprobs) for t in texts] == ["Wait for it.", " And so on.\n"]
    assert len(texts[0].logprobs[0].top_logprobs) == 2 and texts[0].logprobs[0].bytes == list(b"W")
    assert [i.content[0] for i in events[-1].response.output if i.type == "message"] == texts
    for text, place in zip(texts, (1, 3), strict=True):
        mine = [e for e in events if getattr(e, "output_index", None) == place and "output_text" in e.type]
        told = [p.token for e in mine if e.type.endswith("delta") for p in e.logprobs]
        assert told == [p.token for p in text.logprobs] == [p.token for p in mine[-1].logprobs]
    with gpt.responses.stream(**fields) as stream:
        assert stream.get_final_response().output_text == "Wait for it. And so on."


def test_responses_that_are_cut(script: Script, gpt: openai.OpenAI) -> None:
    script.text = "</think>one two three four five six"
    cut = gpt.responses.create(model="nano", input="Hi", max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert [i.status for i in cut.output] == ["incomplete"]
    hidden: Any = {"model": "nano", "input": "Hi", "max_output_tokens": 3, "extra_body": {"include_reasoning": False}}
    script.text = (
        "One two three four five six"  # nothing of it is shown, and the message that stands for it is not whole
    )
    for cut in (gpt.responses.create(**hidden), list(gpt.responses.create(**hidden, stream=True))[-1].response):
        assert (cut.status, [i.status for i in cut.output], cut.output_text) == ("incomplete", ["incomplete"], "")


NOTES: Any = {"type": "namespace", "name": "mcp__notes", "description": "Notes of a team.", "tools": [
    {**RESPONSES_TOOL, "description": "Read it."}, {"type": "function", "name": "list", "parameters": None}]}  # fmt: skip
NOTES_CALL = CALL.replace("get_weather", "mcp__notes__get_weather")


def test_tools_of_a_namespace_keep_their_two_names(script: Script, gpt: openai.OpenAI, http: httpx.Client) -> None:
    """Codex sends those of MCP servers and sub-agents so, and runs only what is called by name and namespace; they were
    dropped."""
    script.text = f"I look.</think>{NOTES_CALL}"
    fields: Any = {"model": "nano", "input": USER, "tools": [RESPONSES_TOOL, NOTES]}
    whole = gpt.responses.create(**fields).output[1]
    assert (whole.name, whole.namespace, json.loads(whole.arguments)) == ("get_weather", "mcp__notes", ARGUMENTS)
    assert '"name": "mcp__notes__get_weather", "description": "Notes of a team.\\n\\nRead it."' in script.prompts[-1]
    assert '"name": "mcp__notes__list", "description": ""' in script.prompts[-1]
    events = list(gpt.responses.create(**fields, stream=True))
    items = [e.item for e in events if e.type.startswith("response.output_item") and e.item.type == "function_call"]
    items.append(events[-1].response.output[1])
    assert [(i.name, i.namespace) for i in items] == [("get_weather", "mcp__notes")] * 3
    result = {"type": "function_call_output", "call_id": whole.call_id, "output": "21C"}
    body = fields | {"input": [*USER, whole.model_dump(exclude_none=True), result]}
    assert "x-glm52-ignored" not in http.post("/v1/responses", json=body).headers
    assert f"{NOTES_CALL}<|observation|><tool_response>21C" in script.prompts[-1]


@pytest.mark.parametrize(
    ("chosen", "called"),
    [
        ({"name": "get_weather"}, ["get_weather"]),
        ({"name": "get_weather", "namespace": "mcp__notes"}, ["mcp__notes__get_weather"]),
        ({"name": "mcp__notes__get_weather"}, ["mcp__notes__get_weather"]),
        ({"name": "list"}, ["mcp__notes__list"]),
        ({"type": "namespace", "name": "mcp__notes"}, ["mcp__notes__get_weather", "mcp__notes__list"]),
        ({"name": "get_weather", "namespace": "gone"}, None),
        ({"type": "namespace", "name": "gone"}, None),
        ({"name": "gone"}, None),
    ],
)
def test_tools_of_a_namespace_can_be_chosen(
    script: Script, http: httpx.Client, chosen: Any, called: list[str] | None
) -> None:
    chosen = {"type": "function", **chosen}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [chosen]}
    for choice in (allowed, *([chosen] if called is None or len(called) == 1 else [])):
        script.text = f"</think>{NOTES_CALL}"
        body = {"input": "Hi", "tools": [RESPONSES_TOOL, NOTES], "tool_choice": choice}
        reply = http.post("/v1/responses", json=body)
        assert reply.status_code == (200 if called else 400), reply.text
        if called:
            grammar = script.params[-1].grammar
            assert grammar is not None
            names = ["get_weather", "mcp__notes__get_weather", "mcp__notes__list"]
            assert [n for n in names if f'"{n}"' in grammar.source] == called


def test_two_tools_by_one_name_are_an_error(http: httpx.Client) -> None:
    same = {"type": "function", "name": "mcp__notes__list"}
    error = http.post("/v1/responses", json={"input": "Hi", "tools": [NOTES, same]}).json()["error"]
    assert error["param"] == "tools.1.name" and "'mcp__notes__list'" in error["message"]
    unnamed = {"type": "namespace", "tools": [same]}
    error = http.post("/v1/responses", json={"input": "Hi", "tools": [unnamed]}).json()["error"]
    assert error["param"] == "tools.0.name"
    inner = {"type": "namespace", "name": "n", "tools": [{"type": "function"}]}
    error = http.post("/v1/responses", json={"input": "Hi", "tools": [inner]}).json()["error"]
    assert error["param"] == "tools.0.tools.0.name"


PATCH_GRAMMAR = 'start: "+" LINE LF\nLINE: /.*/\n%import common.LF\n'
PATCH: Any = {"type": "custom", "name": "patch", "description": "D", "format": {
    "type": "grammar", "syntax": "lark", "definition": PATCH_GRAMMAR}}  # fmt: skip
PATCH_CALL = '<tool_call>patch<arg_key>input</arg_key><arg_value>+say "é\\n"\n</arg_value></tool_call>'


@pytest.mark.parametrize("stride", [1, 3, 99])
def test_custom_tools_take_free_text(script: Script, gpt: openai.OpenAI, stride: int) -> None:
    """Codex's apply_patch was dropped, though its calls were understood in a history."""
    script.text, script.stride = f"I look.</think>{PATCH_CALL}", stride
    fields: Any = {"model": "nano", "tools": [PATCH], "tool_choice": {"type": "custom", "name": "patch"}}
    whole = gpt.responses.create(**fields, input=USER).output[1]
    expected = ("custom_tool_call", "patch", '+say "é\\n"\n')
    assert (whole.type, whole.name, whole.input) == expected and whole.namespace is None
    grammar = script.params[-1].grammar
    assert grammar is not None and PATCH_GRAMMAR in grammar.source and grammar.source.startswith("start: r")
    events = list(gpt.responses.create(**fields, input=USER, stream=True))
    deltas = [e.delta for e in events if e.type == "response.custom_tool_call_input.delta"]
    done = [e.input for e in events if e.type == "response.custom_tool_call_input.done"]
    assert done == ["".join(deltas)] == [whole.input] and (stride > 1 or len(deltas) > 5)
    item = events[-1].response.output[1]
    assert (item.type, item.name, item.input) == expected and item.status == "completed"
    assert not any("function_call" in e.type for e in events)
    result: Any = {"type": "custom_tool_call_output", "call_id": whole.call_id, "output": "done"}
    gpt.responses.create(**fields, input=[*USER, whole.model_dump(exclude_none=True), result])
    assert f"{PATCH_CALL}<|observation|><tool_response>done" in script.prompts[-1]


def test_forms_of_free_text_are_held(script: Script, http: httpx.Client) -> None:
    def post(form: Any) -> httpx.Response:
        script.text = "</think>Hi"
        return http.post("/v1/responses", json={"input": "Hi", "tools": [PATCH | {"format": form}]})

    for form in (None, {"type": "text"}, {"type": "grammar", "syntax": "regex", "definition": "^[a-z]+$"}):
        reply = post(form)
        assert reply.status_code == 200 and not {"x-glm52-ignored", "x-glm52-unheld"} & set(reply.headers)
    grammar = script.params[-1].grammar
    assert grammar is not None and "[a-z]+" in grammar.source
    unheld = post({"type": "grammar", "syntax": "lark", "definition": "start: <"}).headers["x-glm52-unheld"]
    assert unheld == "patch.input: its grammar is not held"
    for wrong in (
        {"type": "grammar", "syntax": "lark"},
        {"type": "grammar", "syntax": "abnf", "definition": ""},
        {"type": 5},
    ):
        assert post(wrong).json()["error"]["param"] == "tools.0.format"


SEARCH: Any = {"type": "tool_search", "execution": "client", "description": "Find tools.", "parameters": {
    "type": "object", "properties": {"query": {"type": "string"}, "limit": {"type": "integer"}}}}  # fmt: skip
SEARCH_CALL = ("<tool_call>tool_search<arg_key>query</arg_key><arg_value>weather</arg_value>"
               "<arg_key>limit</arg_key><arg_value>3</arg_value></tool_call>")  # fmt: skip


@pytest.mark.parametrize("stride", [1, 99])
def test_the_search_for_tools_is_the_clients(script: Script, gpt: openai.OpenAI, stride: int) -> None:
    """Codex under the name of a model of OpenAI's: the search was dropped, and what it had found an error."""
    script.text, script.stride = f"I look.</think>{SEARCH_CALL}", stride
    later = {**RESPONSES_TOOL, "name": "later", "defer_loading": True}
    fields: Any = {"model": "nano", "input": USER, "tools": [SEARCH, later]}
    whole = gpt.responses.create(**fields).output[1]
    assert (whole.type, whole.execution, whole.status) == ("tool_search_call", "client", "completed")
    assert whole.arguments == {"query": "weather", "limit": 3} and whole.call_id
    assert '"name": "tool_search", "description": "Find tools."' in script.prompts[-1]
    assert '"name": "later"' not in script.prompts[-1]
    events = list(gpt.responses.create(**fields, stream=True))
    items = [e.item for e in events if e.type.startswith("response.output_item") and e.item.type == "tool_search_call"]
    assert [i.arguments for i in items] == [{}, whole.arguments]
    assert not any("arguments" in e.type for e in events) and events[-1].response.output[1] == items[1]
    found: Any = {"type": "tool_search_output", "call_id": whole.call_id, "execution": "client", "status": "completed",
                  "tools": [NOTES, {"type": "mcp", "server_label": "x"}]}  # fmt: skip
    script.text = f"</think>{NOTES_CALL}"
    fields["input"] = [*USER, whole.model_dump(exclude_none=True), found]
    reply = gpt.responses.with_raw_response.create(**fields)
    call = reply.parse().output[-1]
    assert (call.name, call.namespace) == ("get_weather", "mcp__notes")
    assert reply.headers["x-glm52-ignored"] == "input.2.tools.1 (mcp)"
    head, shown = script.prompts[-1].split(f"{SEARCH_CALL}<|observation|><tool_response><tools>\n")
    assert "mcp__notes__list" not in head and "tool_search" in head and shown.count('"name": "mcp__notes__') == 2


def test_the_search_for_tools_can_be_chosen(script: Script, http: httpx.Client) -> None:
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "tool_search"}]}
    for choice in (allowed, {"type": "tool_search"}):
        script.text = f"</think>{SEARCH_CALL}"
        body = {"input": "Hi", "tools": [SEARCH, RESPONSES_TOOL], "tool_choice": choice}
        assert http.post("/v1/responses", json=body).json()["output"][0]["type"] == "tool_search_call"
        grammar = script.params[-1].grammar
        assert grammar is not None and '"tool_search"' in grammar.source and "get_weather" not in grammar.source


def test_tools_may_come_in_the_input(script: Script, http: httpx.Client) -> None:
    """Those that OpenAI's servers searched for are named; what they found can be called all the same."""
    call = {"type": "tool_search_call", "execution": "server", "arguments": {"paths": ["x"]}}
    found = {"type": "tool_search_output", "execution": "server", "tools": [RESPONSES_TOOL]}
    more = {"type": "additional_tools", "role": "developer", "tools": [NOTES, SEARCH]}
    script.text = f"</think>{NOTES_CALL}"
    reply = http.post("/v1/responses", json={"input": [more, *USER, call, found, more]})
    assert reply.json()["output"][0]["namespace"] == "mcp__notes"
    assert reply.headers["x-glm52-ignored"] == "input.2 (tool_search_call)"
    for name in ("get_weather", "mcp__notes__get_weather", "mcp__notes__list", "tool_search"):
        assert script.prompts[-1].count(f'"name": "{name}"') == 1
    hosted = {"tools": [{"type": "tool_search"}, {**RESPONSES_TOOL, "defer_loading": True}]}
    reply = http.post("/v1/responses", json={"input": "Hi", **hosted})
    assert reply.headers["x-glm52-ignored"] == "tools.0 (tool_search)" and '"get_weather"' in script.prompts[-1]
    for wrong, param in (({"tools": [{"type": "function"}]}, "input.0.tools.0.name"), ({"tools": 5}, "input.0.tools"),
                         ({"tools": [{"type": "custom", "name": "get_weather"}]}, "input.0.tools.0.name")):  # fmt: skip
        body = {"input": [{"type": "additional_tools", **wrong}, *USER], "tools": [RESPONSES_TOOL]}
        error = http.post("/v1/responses", json=body).json()["error"]
        assert error["param"] == param and error["message"].startswith(f"{param}: ")


# ── Anthropic messages ───────────────────────────────────────────────────────────────────────────────────────────


def test_messages_whole_and_streamed(script: Script, claude: anthropic.Anthropic) -> None:
    script.text = f"I look.</think>Wait.{CALL}{SECOND}"
    fields: Any = {"model": "claude-sonnet-4-5", "max_tokens": 400, "messages": USER, "tools": [ANTHROPIC_TOOL],
                   "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]}  # fmt: skip
    whole = claude.messages.create(**fields)
    assert [b.type for b in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (whole.content[0].thinking, whole.content[1].text) == ("I look.", "Wait.")
    assert whole.content[2].input == ARGUMENTS and whole.stop_reason == "tool_use"
    assert whole.usage.cache_read_input_tokens == 3
    with claude.messages.stream(**fields) as stream:
        events = [e.type for e in stream]
        final = stream.get_final_message()
    assert events[0] == "message_start" and events[-1] == "message_stop"
    strip = lambda m: [b.model_dump(exclude={"id", "parsed_output"}) for b in m.content]  # noqa: E731
    assert strip(final) == strip(whole) and final.stop_reason == "tool_use"
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens == whole.usage.input_tokens


def test_messages_round_trip_of_a_tool(script: Script, claude: anthropic.Anthropic) -> None:
    script.text = f"I look.</think>{CALL}"
    fields: Any = {"model": "nano", "max_tokens": 400, "tools": [ANTHROPIC_TOOL]}
    first = claude.messages.create(messages=USER, **fields)
    result = {"type": "tool_result", "tool_use_id": first.content[1].id, "content": [{"type": "text", "text": "21C"}]}
    remark = {"type": "text", "text": "<system-reminder>Be quick.</system-reminder>"}
    turns: Any = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result, remark]}]
    script.text = "Warm.</think>21 degrees."
    assert claude.messages.create(messages=turns, **fields).content[-1].text == "21 degrees."
    assert script.prompts[-1].endswith(f"<|assistant|><think>I look.</think>{CALL}<|observation|><tool_response>21C"
                                       f"{remark['text']}</tool_response><|assistant|><think>")  # fmt: skip
    counted = claude.messages.count_tokens(model="nano", messages=turns, tools=[ANTHROPIC_TOOL])
    assert counted.input_tokens == len(TOKENIZER.encode(script.prompts[-1]))


def test_blocks_of_every_kind_are_seen(script: Script, http: httpx.Client) -> None:
    """What a user says behind a reminder is no part of the result; tools that were deferred appear where referred to."""
    found = {
        "type": "search_result",
        "title": "River",
        "source": "a.txt",
        "content": [{"type": "text", "text": "wide"}],
    }
    hidden = {"name": "hidden", "description": "h", "input_schema": {"type": "object"}, "defer_loading": True}
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    remark = {"type": "text", "text": "<system-reminder>x</system-reminder> Now delete it"}
    for content, after, expected in (
        ([found], [], "<tool_response>River\na.txt\nwide</tool_response>"),
        ([{"type": "tool_reference", "tool_name": "hidden"}], [], '<tool_response><tools>\n{"name": "hidden"'),
        ([{"type": "sound"}], [], "<reminder>A block of the type sound was left out.</reminder>"),
        ("r", [remark], "<tool_response>r</tool_response><|user|><system-reminder>x</system-reminder> Now delete it"),
    ):
        result = {"type": "tool_result", "tool_use_id": "t", "content": content}
        turns = [*USER, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result, *after]}]
        body = {"max_tokens": 9, "messages": turns, "tools": [hidden, ANTHROPIC_TOOL]}
        assert http.post("/v1/messages", json=body).status_code == 200
        assert expected in script.prompts[-1] and script.prompts[-1].count('"hidden"') == ("hidden" in expected)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "Error"),
        ("", "Error"),
        ("No such file", "Error: No such file"),
        ([{"type": "text", "text": "No such file"}], "Error: No such file"),
        ("Exit code 1\nerror: it broke", "Error: Exit code 1\nerror: it broke"),
        ("<tool_use_error>No such file</tool_use_error>", "<tool_use_error>No such file</tool_use_error>"),
        ("ERROR 404", "ERROR 404"),
    ],
)
def test_a_tool_that_failed_is_seen_to(script: Script, http: httpx.Client, content: Any, said: str) -> None:
    """is_error was dropped: what failed without words was an empty success."""
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    for is_error in (True, False):
        result = {"type": "tool_result", "tool_use_id": "t", "is_error": is_error, "content": content}
        turns = [*USER, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
        assert http.post("/v1/messages", json={"max_tokens": 9, "messages": turns}).status_code == 200
        text = content[0]["text"] if isinstance(content, list) else content or ""
        assert f"<tool_response>{said if is_error else text}</tool_response>" in script.prompts[-1]


def test_blocks_of_the_assistant_are_not_left_out_in_silence(script: Script, http: httpx.Client) -> None:
    search = [{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
              {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}]  # fmt: skip
    said = [{"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "text", "text": "It is 5."}]
    turns = [*USER, {"role": "assistant", "content": [*search, *search, *said]}, *USER]
    reply = http.post("/v1/messages", json={"max_tokens": 9, "messages": turns})
    assert reply.headers["x-glm52-ignored"] == (
        "messages.1.content.0 (server_tool_use and 1 more), messages.1.content.1 (web_search_tool_result and 1 more)")  # fmt: skip
    assert "It is 5." in script.prompts[-1]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": 5}]}]}, "messages.0.content.0.content"),
        ("/v1/responses", {"input": [{"type": "reasoning", "summary": 5}, {"type": "function_call"}]}, "input"),
        ("/v1/chat/completions", {"tools": [{"type": "function", "function": {"description": "d"}}]}, "tools.0.function.name"),
        ("/v1/chat/completions", {"messages": None}, '"messages: Field required"'),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"text": "hi"}]}]}, "messages.0.content.0.type"),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]}, "messages.0.content.1"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]}, "messages.0.content.0"),
        ("/v1/chat/completions", {"tools": [{"function": {"name": "f", "parameters": 5}}]}, "tools.0.function.parameters"),
        ("/v1/chat/completions", {"tools": [{"function": {"name": "f"}}], "tool_choice": {"type": "function", "function": "g"}}, "tool_choice"),
    ],
)  # fmt: skip
def test_what_has_the_wrong_shape_is_named(http: httpx.Client, path: str, fields: Any, param: str) -> None:
    reply = http.post(path, json={"messages": USER, "max_tokens": 9, **fields})
    assert reply.status_code == 400 and param in reply.text, reply.text


def test_refusals_are_what_was_said(script: Script, http: httpx.Client) -> None:
    for said in ({"content": [{"type": "refusal", "refusal": "no way"}]}, {"content": None, "refusal": "no way"}):
        turns = [*USER, {"role": "assistant", **said}, *USER]
        assert http.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 9}).status_code == 200
        assert "</think>no way<|user|>" in script.prompts[-1]


@pytest.mark.parametrize("kind", ["thinking", "redacted_thinking", "text"])
def test_parts_without_words_say_nothing(script: Script, http: httpx.Client, kind: str) -> None:
    parts = [{"type": kind, "thinking": "another model's", "text": None}, {"type": "text", "text": "no way"}]
    turns = [*USER, {"role": "assistant", "content": parts}, *USER]
    assert http.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 9}).status_code == 200
    assert "</think>no way<|user|>" in script.prompts[-1]


def test_line_ends_of_unicode_end_no_line_of_an_event(script: Script, http: httpx.Client) -> None:
    script.text = "</think>a\u2028b\u2029c\x85d"
    body = {"messages": USER, "max_tokens": 99, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    said = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
    assert said == "a\u2028b\u2029c\x85d"


def test_tools_are_shown_as_the_client_wrote_them(script: Script, http: httpx.Client) -> None:
    function = {
        "name": "f",
        "description": "D",
        "parameters": {"type": "object", "properties": {"a": {"default": None}}},
    }
    body = {"messages": USER, "max_tokens": 9, "tools": [{"type": "function", "function": function | {"strict": None}}]}
    for path in ("/v1/chat/completions", "/api/paas/v4/chat/completions"):
        assert http.post(path, json=body).status_code == 200
        assert f"\n{json.dumps(function)}\n" in script.prompts[-1]


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, "Effort: Max"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, "Effort: High"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "Effort: Max"),
        ({"thinking": {"type": "disabled"}}, None),
    ],
)
def test_messages_thinking(script: Script, http: httpx.Client, fields: Any, effort: str | None) -> None:
    script.text = "Let me see.</think>Hello!" if effort else "Hello!"
    reply = http.post("/v1/messages?beta=true", json={"max_tokens": 99, "messages": USER, **fields}).json()
    assert [b["type"] for b in reply["content"]] == (["thinking", "text"] if effort else ["text"])
    assert (effort or "<think></think>") in script.prompts[-1]
    assert script.params[-1].thinking_budget == (fields.get("thinking", {}).get("budget_tokens") or
                                                 {"Effort: Max": 32768, "Effort: High": 4096, None: None}[effort])  # fmt: skip


def test_messages_stop_reasons(script: Script, claude: anthropic.Anthropic) -> None:
    script.text = "</think>one two three"
    assert claude.messages.create(model="nano", messages=USER, max_tokens=2).stop_reason == "max_tokens"
    stopped = claude.messages.create(model="nano", messages=USER, max_tokens=99, stop_sequences=[" three"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[-1].text) == (
        "stop_sequence", " three", "one two")  # fmt: skip


def test_what_claude_code_sends(script: Script, http: httpx.Client) -> None:
    body = {
        "model": "glm-5.2[1m]", "max_tokens": 32000, "stream": True, "metadata": {"user_id": "{}"},
        "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=ab12;"},
                   {"type": "text", "text": "You are an agent."}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
                     {"role": "system", "content": "More."}],
        "tools": [{"name": "Bash", "description": "d", "input_schema": {
            "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object",
            "properties": {"command": {"type": "string"}}, "required": ["command"], "additionalProperties": False}}],
        "thinking": {"type": "adaptive"}, "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }  # fmt: skip
    assert http.head("/").status_code == 200
    body["model"] = "nano[1m]"
    reply = http.post("/v1/messages?beta=true", json=body, headers={"anthropic-version": "2026-10-21"})
    events = sse(reply.text)
    assert reply.status_code == 200 and "x-glm52-ignored" not in reply.headers, reply.text
    assert reply.headers["x-glm52-prompt"] == "billing" and "billing" not in script.prompts[-1]
    assert [n for n, _ in events] == [json.loads(d)["type"] for _, d in events]
    assert [n for n, _ in events][:3] == ["message_start", "ping", "content_block_start"]
    assert [n for n, _ in events][-2:] == ["message_delta", "message_stop"]


# ── Results of parallel calls ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ids", [["a", "b"], ["b", "a"], ["b", "x"], ["b"]])
def test_results_stand_in_the_order_of_their_calls(script: Script, http: httpx.Client, ids: list[str]) -> None:
    """The template shows no ids: the model read each result under another call. Unknown ids leave all as it came."""
    calls = {"a": {"city": "Rome"}, "b": {"city": "Oslo"}}
    chat = [{"role": "assistant", "tool_calls": [
        {"id": i, "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(c)}} for i, c in calls.items()
    ]}, *({"role": "tool", "tool_call_id": i, "content": f"of {i}"} for i in ids)]  # fmt: skip
    items = [
        *({"type": "function_call", "call_id": i, "name": "get_weather", "arguments": json.dumps(c)} for i, c in calls.items()),
        *({"type": "function_call_output", "call_id": i, "output": f"of {i}"} for i in ids),
    ]  # fmt: skip
    blocks = [
        {"role": "assistant", "content": [{"type": "tool_use", "id": i, "name": "get_weather", "input": c} for i, c in calls.items()]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": i, "content": f"of {i}"} for i in ids]},
    ]  # fmt: skip
    shown = ids if "x" in ids else sorted(ids)
    for path, body in (
        ("/v1/chat/completions", {"messages": [*USER, *chat], "tools": [WEATHER]}),
        ("/v1/responses", {"input": [*USER, *items], "tools": [RESPONSES_TOOL]}),
        ("/v1/messages", {"messages": [*USER, *blocks], "tools": [ANTHROPIC_TOOL], "max_tokens": 99}),
    ):
        reply = http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        results = "".join(f"<tool_response>of {i}</tool_response>" for i in shown)
        assert f"<|observation|>{results}<|assistant|>" in script.prompts[-1]
        assert ("results sorted" in reply.headers.get("x-glm52-prompt", "")) is (shown != ids)


# ── Z.ai ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tool_stream", [False, True])
def test_zai_streams_calls_as_asked(script: Script, http: httpx.Client, tool_stream: bool) -> None:
    script.text = f"I look.</think>{CALL}"
    body = {"model": "nano", "messages": USER, "tools": [WEATHER], "stream": True, "tool_stream": tool_stream,
            "thinking": {"type": "enabled", "clear_thinking": False}, "do_sample": False, "request_id": "mine-1234",
            "user_id": "someone", "response_format": None, "reasoning_effort": "xhigh"}  # fmt: skip
    reply = http.post("/api/paas/v4/chat/completions", json=body)
    *frames, done = [d for _, d in sse(reply.text)]
    chunks = [json.loads(f) for f in frames]
    calls = [c for x in chunks for c in x["choices"][0]["delta"].get("tool_calls", ())]
    assert json.loads("".join(c["function"]["arguments"] for c in calls)) == ARGUMENTS
    assert (len(calls) > 1) is tool_stream
    assert done == "[DONE]" and {x["request_id"] for x in chunks} == {"mine-1234"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    assert [bool("usage" in x) for x in chunks].count(True) == 1
    assert script.params[-1].is_greedy and "x-glm52-ignored" not in reply.headers


def test_zai_keeps_reasoning_on_the_coding_path(script: Script, http: httpx.Client) -> None:
    turns = [*USER, {"role": "assistant", "content": "Hello!", "reasoning_content": "Thought."}, *USER]
    for path, kept in (("paas", False), ("coding/paas", True)):
        assert http.post(f"/api/{path}/v4/chat/completions", json={"messages": turns}).status_code == 200
        assert ("Thought." in script.prompts[-1]) is kept


# ── Models ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_clients_find_the_model(gpt: openai.OpenAI, claude: anthropic.Anthropic, http: httpx.Client) -> None:
    assert [m.id for m in gpt.models.list()] == [m.id for m in claude.models.list()] == ["nano"]
    assert claude.models.retrieve("nano").display_name == "nano" and gpt.models.retrieve("nano").owned_by == "glm52"
    for path, envelope in (
        ("/v1/messages", "type"),
        ("/v1/chat/completions", "error"),
        ("/api/paas/v4/nothing", "error"),
    ):
        assert envelope in http.get(path).json()


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────

PATHS = {"/v1/chat/completions": {"messages": USER}, "/v1/completions": {"prompt": "Hi"}, "/v1/responses": {"input": "Hi"},
         "/v1/messages": {"messages": USER, "max_tokens": 9}, "/api/paas/v4/chat/completions": {"messages": USER}}  # fmt: skip


def _said(path: str, error: Any) -> tuple[str, str]:
    """Message and kind, from the dialect's own envelope."""
    if "messages" in path:
        assert error["type"] == "error"
        return error["error"]["message"], error["error"]["type"]
    return error["error"]["message"], error["error"].get("type", error["error"]["code"])


@pytest.mark.parametrize("path", PATHS)
def test_errors_come_in_the_envelope_of_the_dialect(script: Script, http: httpx.Client, path: str) -> None:
    is_zai = path.startswith("/api")
    for fields, word, status in (
        ({"temperature": "warm"}, "temperature", 400), ({"temperature": 9.0}, "temperature", 400),
        ({"model": "other"}, "other", 404), ({"messages": [], "prompt": [], "input": [] if "resp" in path else 1}, "", 400),
    ):  # fmt: skip
        reply = http.post(path, json=PATHS[path] | fields)
        message, kind = _said(path, reply.json())
        assert reply.status_code == status and word in message, (path, fields)
        assert kind in (("1214", "1211") if is_zai else ("invalid_request_error", "not_found_error"))
    script.text, script.error = "", "broken"
    for stream in (False, True):
        reply = http.post(path, json=PATHS[path] | {"stream": stream})
        assert reply.status_code == 500 and "broken" in _said(path, reply.json())[0]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/messages", {"stop_sequences": ["a", ""]}, "stop_sequences"),
        ("/v1/messages", {"max_tokens": 0}, "max_tokens"),
        ("/v1/messages", {"output_format": {"type": "text"}}, "output_format"),
        ("/v1/messages", {"output_config": {"format": {"type": "text"}}}, "output_config.format"),
        ("/v1/chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens"),
        ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", {"logit_bias": {"5": 101}}, "logit_bias"),
        ("/v1/chat/completions", {"logit_bias": {"five": 1}}, "logit_bias"),
        ("/v1/chat/completions", {"stop": ""}, "stop"),
        ("/api/paas/v4/chat/completions", {"stop": [""]}, "stop"),
        ("/v1/responses", {"max_output_tokens": 0}, "max_output_tokens"),
        ("/v1/responses", {"top_logprobs": 21}, "top_logprobs"),
        ("/v1/completions", {"logprobs": 21, "echo": True}, "logprobs"),
        ("/v1/completions", {"prompt": ["Hi", ""]}, "prompt"),
    ],
)
def test_a_wrong_field_is_named_as_the_client_wrote_it(http: httpx.Client, path: str, fields: Any, param: str) -> None:
    """They were called what the engine calls them."""
    reply = http.post(path, json=PATHS[path] | fields)
    message, _ = _said(path, reply.json())
    assert reply.status_code == 400 and message.startswith(f"{param}: expected ")
    assert reply.json()["error"].get("param") == (None if "messages" in path else param)


DEEP = "[" * 300 + "]" * 300


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", ["</arg_value></tool_call>", "</arg_value><arg_key>b</arg_key><arg_value>cut"])
def test_arguments_may_be_deep(script: Script, http: httpx.Client, stream: bool, end: str) -> None:
    """What reads halves of JSON gives up at a depth of 200: a call that was whole ended as a 500. Of one that was cut
    there, nothing is certain."""
    schema = {"type": "object", "properties": {"a": {"type": "array"}, "b": {"type": "string"}}}
    given = {"stream": stream, "tools": [{"name": "f", "input_schema": schema}]}
    script.text, script.stride = f"</think><tool_call>f<arg_key>a</arg_key><arg_value>{DEEP}{end}", 50
    limit = len(TOKENIZER.encode(script.text)) - end.endswith("cut")
    reply = http.post("/v1/messages", json=PATHS["/v1/messages"] | given | {"max_tokens": limit})
    assert reply.status_code == 200 and "event: error" not in reply.text
    search = SEARCH | {"parameters": schema}
    script.text = script.text.replace(">f<", ">tool_search<")
    limit = len(TOKENIZER.encode(script.text)) - end.endswith("cut")
    body = {"input": "Hi", "stream": stream, "tools": [search], "max_output_tokens": limit}
    reply = http.post("/v1/responses", json=body)
    response = json.loads(sse(reply.text)[-1][1])["response"] if stream else reply.json()
    assert response["output"][-1]["arguments"] == (json.loads(f'{{"a": {DEEP}}}') if end.endswith("call>") else {})


@pytest.mark.parametrize("name", [" get", "get\n", "a</tool_call>", "<arg_key>"])
def test_names_that_no_call_can_say(http: httpx.Client, name: str) -> None:
    """Their calls came as text, though one was required."""
    for path, tool in (
        ("/v1/chat/completions", {"type": "function", "function": {"name": name}}),
        ("/v1/responses", {"type": "function", "name": name}), ("/v1/messages", {"name": name, "input_schema": {}}),
    ):  # fmt: skip
        reply = http.post(path, json=PATHS[path] | {"tools": [tool]})
        assert reply.status_code == 400 and _said(path, reply.json())[0].startswith("tools: no call can name a tool")


@pytest.mark.parametrize("path", [p for p in PATHS if p != "/v1/completions"])
def test_a_client_may_want_its_loops(script: Script, http: httpx.Client, path: str) -> None:
    for fields, ends in (({}, True), ({"repetition_detection": True}, True), ({"repetition_detection": False}, False)):
        reply = http.post(path, json=PATHS[path] | fields)
        assert reply.status_code == 200 and "x-glm52-ignored" not in reply.headers
        assert (script.params[-1].repetition is not None) is ends


def test_errors_of_messages_name_their_request(script: Script, http: httpx.Client) -> None:
    """As Anthropic's own do, whole, in a stream and of the routes beside."""
    wrong = PATHS["/v1/messages"] | {"temperature": 9.0}
    for path in ("/v1/messages", "/v1/messages/count_tokens", "/api/anthropic/v1/nothing"):
        reply = http.post(path, json=wrong)
        assert list(reply.json()) == ["type", "error", "request_id"]
        assert reply.json()["request_id"] == reply.headers["request-id"] != ""
    script.text, script.error = "</think>Half a", "broken"
    reply = http.post("/v1/messages", json=PATHS["/v1/messages"] | {"stream": True}, headers={"x-request-id": "mine"})
    assert json.loads(sse(reply.text)[-1][1])["request_id"] == reply.headers["request-id"] == "mine"
    assert "request_id" not in http.post("/v1/chat/completions", json=wrong).json()


@pytest.mark.parametrize("path", PATHS)
def test_an_error_in_mid_stream_is_an_event(script: Script, http: httpx.Client, path: str) -> None:
    script.text, script.error = "</think>Half a", "broken"
    name, data = sse(http.post(path, json=PATHS[path] | {"stream": True}).text)[-1]
    if path == "/v1/responses":
        failed = json.loads(data)["response"]
        assert (name, failed["status"], failed["error"]["message"]) == ("response.failed", "failed", "broken")
    else:
        assert _said(path, json.loads(data))[0] == "broken" and name == ("error" if "messages" in path else None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_overflow_says_the_numbers(script: Script, http: httpx.Client, path: str, stream: bool) -> None:
    prompts = len(script.prompts)
    text = "word " * 600
    long = {"messages": [{"role": "user", "content": text}], "prompt": text, "input": text}
    reply = http.post(path, json={k: long.get(k, v) for k, v in PATHS[path].items()} | {"stream": stream})
    chat = {"messages": long["messages"]}
    count = (
        len(TOKENIZER.encode(text)) if "prompt" in PATHS[path] else http.post("/tokenize", json=chat).json()["count"]
    )
    if path == "/v1/responses" and stream:  # its clients look for an event
        name, data = sse(reply.text)[-1]
        error = json.loads(data)["response"]["error"]
        assert (name, error["code"]) == ("response.failed", "context_length_exceeded")
        message = error["message"]
    else:
        message, _ = _said(path, reply.json())
        assert reply.status_code == 400
    begins = {"/v1/messages": f"prompt is too long: {count} tokens > 512 maximum",
              "/api/paas/v4/chat/completions": "Prompt exceeds max length."}  # fmt: skip
    assert message.startswith(begins.get(path, "")) and f"{count} tokens" in message and "512" in message
    assert len(script.prompts) == prompts


CHOSEN: Any = {"type": "function", "function": {"name": "get_weather"}}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "x", "foo": 1, "schema": {
    "type": "object", "x-mine": {"a": 1}}}}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        (
            "/v1/chat/completions",
            {"chat_template_kwargs": {"enable_thinkin": False}},
            "chat_template_kwargs.enable_thinkin",
        ),
        ("/v1/chat/completions", {"structured_outputs": {"regex": "a", "x": 1}, "b": 1}, "b, structured_outputs.x"),
        ("/v1/chat/completions", {"chat_template_kwargs": {"enable_thinking": False, "x": None}}, None),
        ("/api/paas/v4/chat/completions", {"thinking": {"type": "enabled", "budget": 9}}, "thinking.budget"),
        ("/v1/completions", {"stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        (
            "/v1/responses",
            {"text": {"verbosity": "low", "x": 1}, "reasoning": {"efort": "low"}},
            "reasoning.efort, text.x",
        ),
        ("/v1/messages", {"output_config": {"efort": "low"}}, "output_config.efort"),
        ("/v1/chat/completions", {"response_format": FORM}, "response_format.json_schema.foo"),
        ("/v1/chat/completions", {"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        (
            "/v1/chat/completions",
            {"tools": [WEATHER], "tool_choice": {**CHOSEN, "foo": 1, "function": {"name": "get_weather", "bar": 1}}},
            "tool_choice.foo, tool_choice.function.bar",
        ),
        ("/api/paas/v4/chat/completions", {"response_format": FORM}, "response_format.json_schema.foo"),
        ("/v1/chat/completions", {"top_logprobs": 3}, "top_logprobs (without logprobs)"),
        ("/v1/chat/completions", {"top_logprobs": 0, "logprobs": False}, None),
        ("/v1/responses", {"text": {"format": {**FORM["json_schema"], "type": "json_schema"}}}, "text.format.foo"),
        (
            "/v1/responses",
            {"tools": [RESPONSES_TOOL], "tool_choice": {"type": "function", "name": "get_weather", "foo": 1}},
            "tool_choice.foo",
        ),
        ("/v1/messages", {"tool_choice": {"type": "auto", "foo": 1}}, "tool_choice.foo"),
        ("/v1/messages", {"output_format": {"type": "json_schema", "schema": {}, "foo": 1}}, "output_format.foo"),
        (
            "/v1/messages",
            {"output_config": {"format": {"type": "json_schema", "schema": {}, "foo": 1, "bar": None}}},
            "output_config.format.foo",
        ),
        (
            "/v1/messages",
            {
                "context_management": {
                    "edits": [{"type": "clear_thinking_20251015"}, {"type": "clear_tool_uses_20250919"}]
                }
            },
            "context_management.edits.1 (clear_tool_uses_20250919)",
        ),
        ("/v1/responses", {"context_management": [{"type": "compaction"}]}, "context_management.0 (compaction)"),
        ("/v1/messages", {"metadata": {"user_id": "x", "foo": 1}}, None),
        ("/v1/messages", {"messages": [*USER, {"role": "assistant", "content": "{"}]}, "messages.1 (not continued)"),
        ("/v1/messages/count_tokens", {"foo": 1, "thinking": {"type": "adaptive", "x": 1}}, "foo, thinking.x"),
        ("/tokenize", {"bogus": 1, "chat_template_kwargs": {"x": 1}}, "bogus, chat_template_kwargs.x"),
        ("/tokenize", {"prompt": "Hi", "messages": None, "foo": 1}, "foo"),
        ("/tokenize", {"prompt": "Hi", "tools": []}, "messages, tools"),
        ("/tokenize", {"add_generation_prompt": False, "return_token_strs": True, "add_special_tokens": False}, None),
        ("/detokenize", {"tokens": [5], "foo": 1}, "foo, messages"),
    ],
)
def test_unknown_fields_are_named_wherever_they_are(
    script: Script, http: httpx.Client, path: str, fields: Any, named: str | None
) -> None:
    """Those inside of others were ignored in silence, and everything on the small routes, strict=1 or not."""
    body = PATHS.get(path, {"messages": USER}) | fields
    reply = http.post(path, json=body)
    assert (reply.status_code, reply.headers.get("x-glm52-ignored")) == (200, named), reply.text
    strict = http.post(f"{path}?strict=1", json=body)
    assert strict.status_code == (400 if named else 200)
    assert not named or named.split(", ")[0] in strict.text


def test_tokenize_leaves_out_the_generation_prompt(http: httpx.Client) -> None:
    ids = [
        http.post("/tokenize", json={"messages": USER, "add_generation_prompt": a}).json()["tokens"]
        for a in (None, True, False)
    ]
    assert ids[0] == ids[1] and TOKENIZER.decode(ids[0]) == TOKENIZER.decode(ids[2]) + "<|assistant|><think>"


@pytest.mark.parametrize("path", PATHS)
def test_unknown_fields_are_named_and_nulls_are_absent(script: Script, http: httpx.Client, path: str) -> None:
    nulls = dict.fromkeys(("temperature", "top_p", "stream", "seed", "model", "stop", "reasoning_effort", "tools"))
    body = PATHS[path] | nulls | {"frobnicate": {"a": 1}}
    reply = http.post(path, json=body)
    assert reply.status_code == 200 and reply.headers["x-glm52-ignored"] == "frobnicate"
    strict = http.post(f"{path}?strict=1", json=body)
    assert strict.status_code == 400 and "frobnicate" in _said(path, strict.json())[0]
