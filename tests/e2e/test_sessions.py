"""Sessions as three agents hold them: from the second request on nearly everything is found in the cache, and where it is
not, the explanation says why."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from glm52.engine import AsyncEngine
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
        usage = reply.json()["usage"]
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or usage
        cached = details.get("cached_tokens", details.get("cache_read_input_tokens"))
        divergence = details.get("divergence") or details.get("cache_divergence")
        assert (cached >= held - PAGE) is expect_hit, (cached, held, divergence)
        assert divergence["cause"].startswith(("nothing changed", "no earlier")) is expect_hit, divergence
        fresh = usage["input_tokens"] if "cache_read_input_tokens" in usage else 0
        prompt = fresh + cached if fresh else usage.get("prompt_tokens") or usage["input_tokens"]
        held = prompt + (usage.get("completion_tokens") or usage["output_tokens"])
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
