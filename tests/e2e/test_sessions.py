"""Sessions of three agents, recorded and as they might be: from the second request on nearly everything is found in the
cache, and where it is not, the explanation says why. ``record_sessions.py`` makes the recordings."""

import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from glm52.clients.script import reply_to
from glm52.engine import AsyncEngine, Event, SamplingParams
from tests.e2e.record_sessions import SESSIONS
from tests.scripted import EOS, TOKENIZER, ScriptedModel
from tests.serving import running, scripted_service

PREAMBLE = "You are an agent that reads, writes and runs what it is asked to. " * 200
READ = {"name": "read", "description": "", "parameters": {"type": "object", "properties": {"path": {"type": "string"}},
                                                          "required": ["path"]}}  # fmt: skip
THOUGHT = "I should look at the file first, since I do not know what is in it."
CALL = f"{THOUGHT}</think><tool_call>read<arg_key>path</arg_key><arg_value>a.py</arg_value></tool_call>"
DONE = "Now I know.</think>It is empty."
PAGE = 64


class Speaker:
    """Says a text after whatever prompt comes next."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, token: int, position: int) -> np.ndarray:
        if self.text:
            self._ids, self._begin, self.text = [*TOKENIZER.encode(self.text), EOS[2]], position, ""
        out = np.zeros(4096)
        out[self._ids[position - self._begin]] = 20.0
        return out


@pytest.fixture(scope="module")
def agent() -> Iterator[tuple[Speaker, httpx.Client]]:
    speaker = Speaker()
    backend = AsyncEngine(ScriptedModel(speaker, length=16_384).engine(num_rows=65_536))
    with (
        running(scripted_service(backend, context_length=16_384)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield speaker, client
    backend.close()


def read_usage(usage: Any) -> tuple[int, int, int, Any]:
    """Tokens of the prompt, those of them that were cached, tokens of the reply, and the explanation."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or usage
    cached = details.get("cached_tokens", details.get("cache_read_input_tokens"))
    fresh = usage["input_tokens"] if "cache_read_input_tokens" in usage else 0
    prompt = fresh + cached if fresh else usage.get("prompt_tokens") or usage["input_tokens"]
    said = usage.get("completion_tokens") or usage["output_tokens"]
    return prompt, cached, said, details.get("divergence") or details.get("cache_divergence")


Ask = Callable[[str, Any], tuple[Any, int]]


@pytest.fixture
def ask(agent: tuple[Speaker, httpx.Client], request: pytest.FixtureRequest) -> Ask:
    """Sends a body, and checks that all of the last prompt and reply is found, but for a page that was not full."""
    speaker, client = agent
    held = 0
    headers = {"authorization": f"Bearer {request.node.name}", "x-glm52-explain": "cache"}

    def ask(path: str, body: Any, *, says: str, expect_hit: bool = True) -> Any:
        nonlocal held
        speaker.text = says
        reply = client.post(path, json={"temperature": 0.0, **body}, headers=headers)
        assert reply.status_code == 200, reply.text
        prompt, cached, said, divergence = read_usage(reply.json()["usage"])
        assert (cached >= held - PAGE) is expect_hit, (cached, held, divergence)
        assert divergence["cause"].startswith(("nothing changed", "no earlier")) is expect_hit, divergence
        held = prompt + said
        return reply.json(), divergence

    return ask  # type: ignore[return-value]


def test_claude_code(ask: Any) -> None:
    """The billing line changes with every request, cache marks wander, thinking blocks come back."""
    tools = [{"name": "read", "description": "", "input_schema": READ["parameters"]}]
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "What is in a.py?"}]}]
    for i, says in enumerate((CALL, CALL, CALL, DONE)):
        system = [{"type": "text", "text": f"x-anthropic-billing-header: cc=1; cch={i:04x};"},
                  {"type": "text", "text": PREAMBLE, "cache_control": {"type": "ephemeral"}}]  # fmt: skip
        body = {"messages": messages, "system": system, "tools": tools, "max_tokens": 2000,
                "thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}  # fmt: skip
        reply, _ = ask("/v1/messages?beta=true", body, says=says)
        messages.append({"role": "assistant", "content": reply["content"]})
        if reply["stop_reason"] == "tool_use":
            result = {"type": "tool_result", "tool_use_id": reply["content"][-1]["id"], "content": f"line {i}",
                      "cache_control": {"type": "ephemeral"}}  # fmt: skip
            messages.append({"role": "user", "content": [result]})


def test_an_agent_that_forgets_reasoning(ask: Any) -> None:
    """Over chat completions, with details of the environment that tell the time."""
    tools = [{"type": "function", "function": READ}]
    details = "<environment_details>\n# Current Time\n11/25/2026, 2:03:4{} PM\n</environment_details>"
    messages: list[Any] = [{"role": "system", "content": PREAMBLE}, {}]
    for i, says in enumerate((CALL, CALL, DONE)):
        parts = [{"type": "text", "text": "What is in a.py?"}, {"type": "text", "text": details.format(i)}]
        messages[1] = {"role": "user", "content": parts}
        reply, _ = ask("/v1/chat/completions", {"messages": messages, "tools": tools}, says=says)
        message = reply["choices"][0]["message"]
        messages.append({"role": "assistant", "content": message["content"], "tool_calls": message.get("tool_calls")})
        messages += [
            {"role": "tool", "tool_call_id": c["id"], "content": "ok"} for c in message.get("tool_calls") or ()
        ]


def test_codex(ask: Any) -> None:
    """Over responses, with reasoning that it sends back as it came: opaque."""
    fields = {"tools": [{"type": "function", **READ, "strict": False}], "store": False, "instructions": PREAMBLE,
              "include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}}  # fmt: skip
    items: list[Any] = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is in a.py?"}]}
    ]
    for says in (CALL, CALL, DONE):
        reply, _ = ask("/v1/responses", {"input": items, **fields}, says=says)
        for item in reply["output"]:
            items.append({k: v for k, v in item.items() if k not in ("id", "status", "content")}
                         if item["type"] == "reasoning" else item)  # fmt: skip
            if item["type"] == "function_call":
                items.append({"type": "function_call_output", "call_id": item["call_id"], "output": "ok"})


@pytest.mark.parametrize("preserved", [True, False])
def test_a_new_question_keeps_the_prefix_where_reasoning_is_preserved(ask: Any, preserved: bool) -> None:
    messages: list[Any] = [{"role": "system", "content": PREAMBLE}]
    for i in range(3):
        messages.append({"role": "user", "content": f"Question {i}?"})
        body = {"messages": messages, "clear_thinking": not preserved}
        reply, divergence = ask("/v1/chat/completions", body, says=THOUGHT + "</think>An answer." + " More." * 100,
                                expect_hit=preserved or i == 0)  # fmt: skip
        messages.append(reply["choices"][0]["message"])
        if i and not preserved:
            assert "reasoning of an earlier turn" in divergence["cause"]


class Replay(AsyncEngine):
    """Says again what the agent was told: that is a function of the prompt."""

    def __init__(self) -> None:
        self._speaker = Speaker()
        super().__init__(ScriptedModel(self._speaker, length=16_384).engine(num_rows=65_536))

    def generate(self, tokens: Iterable[int], params: SamplingParams) -> AsyncIterator[Event]:
        prompt = list(tokens)
        self._speaker.text = reply_to(TOKENIZER.decode(prompt))
        return super().generate(prompt, params)


@pytest.mark.parametrize("mode", ["chat", "coding"])
@pytest.mark.parametrize("recording", sorted(SESSIONS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_recorded(recording: Path, mode: str) -> None:
    """Of the full pages that the last prompt and its reply have filled, 99 % are found; but where a new question begins
    and the client does not ask to keep reasoning, the template drops that of the turn before."""
    head, *bodies = map(json.loads, recording.read_text("utf-8").splitlines())
    backend, held, asked = Replay(), 0, 0
    headers = {"x-glm52-explain": "cache"}
    with running(scripted_service(backend, context_length=16_384, mode=mode)) as url:
        for i, body in enumerate(bodies):
            fields = {"stream": False, "temperature": 0.0, "model": "nano"}
            reply = httpx.post(url + head["path"], json={**head["same"], **body, **fields}, headers=headers, timeout=60)
            assert reply.status_code == 200, reply.text
            prompt, cached, said, divergence = read_usage(reply.json()["usage"])
            reusable = (held - 1) // PAGE * PAGE  # the last token of a reply has not been computed with
            share = cached / reusable if i else 0.0
            if i:
                print(f"{recording.stem} {mode} {i}: {cached} of {prompt} cached, {share:.1%} of {reusable} reusable")
            questions = json.dumps(body).count("[check:")
            if i and questions > asked and mode == "chat" and "context_management" not in head["same"]:
                assert "reasoning of an earlier turn" in divergence["cause"] and "I should" not in divergence["new"]
            elif i:
                assert share >= 0.99 and divergence["cause"].startswith("nothing changed"), (share, divergence)
            held, asked = prompt + said, questions
    backend.close()
    assert len(bodies) >= 6
