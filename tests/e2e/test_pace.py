"""Events that come fast are joined, and every dialect says the same with fewer of them."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from glm52.engine import AsyncEngine, Event
from tests.scripted import END_THINK, THINK, TOKENIZER, ScriptedModel
from tests.serving import PATHS, WEATHER, running, scripted_service, sse, streamed

CALL = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>"
IDS = TOKENIZER.encode(f"A thought: 雨 and 🌧.</think>It rains: 雨🌧, and so on.{CALL}{CALL}<|observation|>")
STEP_S = 0.001


class Reciter:
    """Says IDS after ``<think>``."""

    start = 0

    def __call__(self, token: int, position: int) -> np.ndarray:
        if token == THINK:
            self.start = position
        out = np.zeros(4096)
        out[IDS[min(position - self.start, len(IDS) - 1)]] = 20.0
        return out


@pytest.fixture(scope="module")
def clients() -> Iterator[list[httpx.Client]]:
    """Of a server that holds nothing back, and of one that does."""
    backends = [AsyncEngine(ScriptedModel(Reciter()).engine(), interval_s=s) for s in (0.0, 0.02)]
    for backend in backends:
        step = backend.engine.step

        def slow(step: Any = step) -> list[Event]:
            time.sleep(STEP_S)
            events: list[Event] = step()
            return events

        backend.engine.step = slow  # type: ignore[method-assign]
    with (
        running(scripted_service(backends[0])) as a, running(scripted_service(backends[1])) as b,
        httpx.Client(base_url=a, timeout=60) as every, httpx.Client(base_url=b, timeout=60) as few,
    ):  # fmt: skip
        yield [every, few]
    for backend in backends:
        backend.close()


def events(client: httpx.Client, path: str, body: Any) -> list[tuple[str | None, str]]:
    reply = client.post(path, json={"temperature": 0.0, "stream": True, **body})
    assert reply.status_code == 200, reply.text
    return sse(reply.text)


@pytest.mark.parametrize("dialect", PATHS)
def test_a_dialect_says_the_same_in_fewer_events(clients: list[httpx.Client], dialect: str) -> None:
    function = WEATHER["function"]
    tool = {"messages": {"name": function["name"], "input_schema": function["parameters"]},
            "responses": {"type": "function", **function}}.get(dialect, WEATHER)  # fmt: skip
    body: Any = {
        "tools": [tool],
        "input" if dialect == "responses" else "messages": [{"role": "user", "content": "Hi"}],
    }
    body |= {"stream_options": {"include_usage": True}} if dialect == "chat" else {}
    body |= {"max_output_tokens" if dialect == "responses" else "max_tokens": 200}
    frames = [events(client, PATHS[dialect], body) for client in clients]
    every, few = (streamed(dialect, f) for f in frames)
    for usage in (every.usage, few.usage):
        usage.pop("input_tokens", None), usage.pop("cache_read_input_tokens", None)
    assert every == few and every.content == "It rains: 雨🌧, and so on." and len(every.calls) == 2
    assert len(frames[1]) < len(frames[0])


def test_log_probabilities_of_joined_events_are_all_told(clients: list[httpx.Client]) -> None:
    """Also those of a token that is only a part of a character: its event has no text, and once it told none of them."""
    told = []
    for client in clients:
        chat = events(client, PATHS["chat"], {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True})
        entries = [choice["logprobs"]["content"] for _, data in chat[:-1] for choice in json.loads(data)["choices"]
                   if choice.get("logprobs")]  # fmt: skip
        body = {"prompt": [THINK], "logprobs": 1, "max_tokens": 40}
        text = events(client, "/v1/completions", body)
        choices = [json.loads(data)["choices"][0] for _, data in text[:-1]]
        said = [c["logprobs"] for c in choices if c["logprobs"]]
        four = {k: [x for one in said for x in one[k]] for k in said[0]}
        assert [len(x) for x in four.values()] == [40] * 4
        assert "".join(c["text"] for c in choices) == TOKENIZER.decode(IDS[:40])
        told.append(([e for one in entries for e in one], four))
    assert told[0] == told[1] and len(told[0][0]) == len(IDS) - IDS.index(END_THINK) - 2, "all of the text"
