"""What a reply is held to, whatever the model says: through HTTP, in every dialect, with the real engine."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pytest
import torch

from glm52.cache import Spans
from glm52.engine import AsyncEngine
from glm52.hub import NANO
from glm52.server.service import Service
from glm52.session import Session
from tests.scripted import ScriptedModel, always, random_logits
from tests.serving import PATHS, WEATHER, Said, ask, running, schema_fields, scripted_service, sse

YES = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"],
       "additionalProperties": False}  # fmt: skip
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2]}},
        "required": ["city"], "additionalProperties": False}  # fmt: skip
# Small enough that a model that says anything at all comes to an end.
TOOLS = [{"name": name, "parameters": CITY} for name in ("get_weather", "get_time")]
BUDGETS: dict[str, Any] = {
    "chat": lambda n: {"thinking_budget": n},
    "zai": lambda n: {"thinking_budget": n},
    "responses": lambda n: {"reasoning": {"max_tokens": n}},
    "messages": lambda n: {"thinking": {"type": "enabled", "budget_tokens": n}},
}


@contextlib.contextmanager
def serving(model: ScriptedModel, num_drafts: int) -> Iterator[httpx.Client]:
    backend = AsyncEngine(model.engine(num_drafts))
    with (
        running(scripted_service(backend, context_length=8192)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client
    backend.close()


@pytest.fixture(scope="module", params=[0, 3], ids=["plain", "drafts"])
def endless(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A model that never closes its thinking."""
    with serving(ScriptedModel(always(" and so on")), request.param) as client:
        yield client


@pytest.fixture(scope="module")
def babbling() -> Iterator[httpx.Client]:
    """A model that says anything at all."""
    favour = dict.fromkeys(("<tool_call>", "<|observation|>"), 6.0)
    with serving(ScriptedModel(random_logits(1, favour)), 2) as client:
        yield client


@pytest.fixture(scope="module")
def session() -> Session:
    return Session.open(NANO, context=2048)


@pytest.fixture(scope="module")
def nano(session: Session) -> Iterator[httpx.Client]:
    backend = AsyncEngine(session.engine)
    service = Service(backend, session.tokenizer, session.template, name="nano", defaults=session.defaults,
                      context_length=session.engine.context_length)  # fmt: skip
    with running(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
    backend.close()


def closed(usage: Any) -> Any:
    """How the budget ended the thinking, wherever a dialect says so."""
    details = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
    return usage.get("thinking_closed") or details.get("thinking_closed")


@pytest.mark.parametrize("schema", [None, YES], ids=["free", "schema"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("dialect", PATHS)
def test_thinking_that_never_ends_leaves_room_for_an_answer(
    endless: httpx.Client, dialect: str, stream: bool, schema: Any
) -> None:
    for budget in (1, 40):
        fields = BUDGETS[dialect](budget) | (schema_fields(dialect, schema) if schema else {})
        said = ask(endless, dialect, "Hi", max_tokens=budget + 32, stream=stream, temperature=0.0, **fields)
        assert said.content.strip() and said.reasoning and closed(said.usage) == "hard"
        counted = said.usage.get("completion_tokens") or said.usage["output_tokens"]
        assert counted <= budget + 32
        if schema:
            jsonschema.validate(json.loads(said.content), schema)


def test_the_close_is_said_beside_the_finish_reason(endless: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40, "thinking_budget": 5, "temperature": 0}
    choice = endless.post(PATHS["chat"], json=body).json()["choices"][0]
    assert (choice["finish_reason"], choice["thinking_closed"]) == ("length", "hard")
    lines = endless.post(PATHS["chat"], json=body | {"stream": True}).text
    assert '"finish_reason": "length", "thinking_closed": "hard"' in lines


def test_an_answer_that_goes_round_has_a_reason_of_its_own(endless: httpx.Client) -> None:
    reasons = {"chat": "repetition", "zai": "repetition", "messages": "repetition", "responses": "incomplete"}
    for dialect, reason in reasons.items():
        said = ask(endless, dialect, "Hi", max_tokens=5000, stream=True, temperature=0.0, thinking_budget=0)
        assert said.finish == reason and 4000 < len(said.content.split()) < 4200 * 3


def tool_fields(dialect: str, choice: str, parallel: bool = True) -> dict[str, Any]:
    """Tools and the choice between them in a dialect's own words. choice: auto, none, required, or a name."""
    if dialect == "messages":
        kinds = {"auto": "auto", "none": "none", "required": "any"}
        chosen = {"type": kinds[choice]} if choice in kinds else {"type": "tool", "name": choice}
        tools = [{"name": t["name"], "input_schema": t["parameters"]} for t in TOOLS]
        return {"tools": tools, "tool_choice": chosen | ({} if parallel else {"disable_parallel_tool_use": True})}
    flat = dialect == "responses"
    tools = [{"type": "function", **t} if flat else {"type": "function", "function": t} for t in TOOLS]
    named = {"type": "function", "name": choice} if flat else {"type": "function", "function": {"name": choice}}
    return {"tools": tools, "parallel_tool_calls": parallel,
            "tool_choice": choice if choice in ("auto", "none", "required") else named}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("dialect", PATHS)
def test_tool_choices_hold(babbling: httpx.Client, dialect: str, stream: bool) -> None:
    def replies(choice: str, parallel: bool = True) -> list[Said]:
        fields = tool_fields(dialect, choice, parallel) | BUDGETS[dialect](8)
        return [ask(babbling, dialect, f"Question {i}", max_tokens=400, stream=stream, seed=i, **fields)
                for i in range(3)]  # fmt: skip

    for said in (*replies("required"), *replies("get_time"), *replies("required", parallel=False)):
        assert said.calls and not said.content and said.reasoning
        for _, arguments in said.calls:
            jsonschema.validate(json.loads(arguments), CITY)
    assert {name for s in replies("get_time") for name, _ in s.calls} == {"get_time"}
    assert all(len(s.calls) == 1 for s in replies("required", parallel=False))
    assert all(not s.calls and "<tool_call>" not in s.content for s in replies("none"))


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[a-c]{3}-[0-9]{2}"}, r"[a-c]{3}-\d\d"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_grammar": 'start: ("ab" | "cd")~3'}, "(ab|cd){3}"),
        ({"guided_grammar": 'root ::= "x" [0-9] "y"'}, "x[0-9]y"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [17, "seven"]}}}},
            '17|"seven"',
        ),
    ],
)
def test_structures_hold_after_the_reasoning(babbling: httpx.Client, fields: Any, pattern: str) -> None:
    for extra in ({"thinking_budget": 12}, {"enable_thinking": False}):
        said = ask(babbling, "chat", "Hi", max_tokens=200, seed=1, **fields, **extra)
        assert re.fullmatch(pattern, said.content) and said.finish == "stop"
        assert bool(said.reasoning) is ("thinking_budget" in extra)


def test_what_cannot_be_held_is_refused_by_name(babbling: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    for fields, param in (
        ({"guided_regex": "a(?=b)"}, "guided_regex"), ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    ):  # fmt: skip
        for stream in (False, True):
            reply = babbling.post(PATHS["chat"], json={"messages": messages, "stream": stream, **fields})
            assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text


def test_one_model_says_the_same_in_every_dialect(nano: httpx.Client) -> None:
    question = "What is 3+4?"
    said = [ask(nano, d, question, max_tokens=200, stream=s, temperature=0.0) for d in PATHS for s in (False, True)]
    assert {s.content for s in said} == {said[0].content} and "7" in said[0].content
    assert {s.reasoning for s in said} == {said[0].reasoning}


def test_the_shipped_model_through_the_official_clients(nano: httpx.Client) -> None:
    url = str(nano.base_url)
    messages: Any = [{"role": "user", "content": "What is 3+4?"}]
    gpt = openai.OpenAI(base_url=f"{url}/v1", api_key="x")
    claude = anthropic.Anthropic(base_url=url, api_key="x")
    chunks = gpt.chat.completions.create(model="nano", messages=messages, temperature=0, stream=True)
    said = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert "7" in said and gpt.responses.create(model="nano", input="What is 3+4?", temperature=0).output_text == said
    fields: Any = {"model": "nano", "messages": messages, "max_tokens": 300, "extra_body": {"temperature": 0}}
    with claude.messages.stream(**fields) as stream:
        assert "".join(stream.text_stream) == said
        assert stream.get_final_message().content[0].type == "thinking"


def test_the_shipped_model_calls_a_tool(nano: httpx.Client) -> None:
    said = ask(nano, "chat", "What is the weather in Rome?", max_tokens=300, temperature=0.0, tools=[WEATHER],
               tool_choice="required")  # fmt: skip
    assert said.calls and said.finish == "tool_calls"
    assert set(json.loads(said.calls[0][1])) <= {"city", "days"}


def test_log_likelihoods_are_the_models_own(nano: httpx.Client, session: Session) -> None:
    """What evaluation harnesses read: ``echo`` with log probabilities, as texts and as batches of token ids."""
    texts = ["What is 3+4? It is 7.", "The weather in Rome is fine, and so it is in Oslo."]
    prompts = [session.tokenizer.encode(t) for t in texts]
    body = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    for prompt in (prompts, texts):
        choices = nano.post("/v1/completions", json=body | {"prompt": prompt}).json()["choices"]
        for ids, text, choice in zip(prompts, texts, choices, strict=True):
            said = choice["logprobs"]
            assert choice["text"].startswith(text) and said["token_logprobs"][0] is None
            assert len(said["tokens"]) == len(ids) + 1 and said["text_offset"][:2] == [0, len(said["tokens"][0])]
            expected = _log_likelihoods(session, ids)
            assert said["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-5)
            best = [max(t.values()) for t in said["top_logprobs"][1:]]
            assert all(b >= p for b, p in zip(best, said["token_logprobs"][1:], strict=True))


def test_an_echo_tells_every_token_and_counts_none(nano: httpx.Client, session: Session) -> None:
    """A prompt of one token told none, parts of a character were counted as one each, and the token that is computed
    after the echo was said to be in the reply."""
    for text in ("What", "x", "¿Qué 🦊 dice 狐狸?"):
        body = {"prompt": text, "max_tokens": 0, "logprobs": 1, "echo": True}
        reply = nano.post("/v1/completions", json=body).json()
        (choice,), ids = reply["choices"], session.tokenizer.encode(text)
        said, whole = choice["logprobs"], b"".join(map(session.tokenizer.to_bytes, ids))
        assert choice["text"] == text and reply["usage"]["completion_tokens"] == 0
        assert reply["usage"]["total_tokens"] == len(ids) == len(said["tokens"]) == len(said["text_offset"])
        assert said["token_logprobs"][0] is None and None not in said["token_logprobs"][1:]
        starts = [len(b"".join(map(session.tokenizer.to_bytes, ids[:i]))) for i in range(len(ids))]
        assert said["text_offset"] == [len(whole[:n].decode(errors="ignore")) for n in starts]
        streamed = sse(nano.post("/v1/completions", json=body | {"stream": True, "stream_options": {
            "include_usage": True}}).text)  # fmt: skip
        assert json.loads(streamed[-2][1])["usage"]["completion_tokens"] == 0


def _log_likelihoods(session: Session, ids: list[int]) -> list[float]:
    """Of each token after the first, by one forward of the model itself."""
    model = session.engine.model
    with torch.inference_mode():
        h = model(torch.tensor(ids), Spans.of_sequence(0, len(ids)), model.new_cache(64 * (len(ids) // 64 + 1)))
        logp = torch.log_softmax(model.logits(h[:-1]).double(), -1)
    return logp[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
