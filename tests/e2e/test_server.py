"""The server, driven by the official ``openai`` client: a scripted backend for the protocol, a tiny model for the rest."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from glm52.engine import AsyncEngine
from glm52.hub import NANO
from glm52.server.service import Service
from glm52.session import Session
from glm52.tokenizer import Tokenizer
from tests.fixtures import write_tiny
from tests.serving import Script, running, scripted_service

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}]  # fmt: skip
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[Script, str]]:
    script = Script()
    with running(scripted_service(script)) as url:
        yield script, url


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[AsyncEngine, str]]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    session = Session.open(folder, context=1024, num_drafts=2)
    backend = AsyncEngine(session.engine)
    service = Service(backend, session.tokenizer, session.template, name="tiny",
                      context_length=session.engine.context_length, defaults=session.defaults)  # fmt: skip
    with running(service) as url:
        yield backend, url
    backend.close()


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def test_reasoning_and_answer_are_kept_apart(scripted) -> None:
    script, url = scripted
    script.text = "Let me see.</think>Hello!"
    reply = client(url).chat.completions.create(model="nano", messages=USER)
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Hello!", "Let me see.", "Let me see.")
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    reasoning = len(Tokenizer.read(NANO).encode("Let me see."))
    assert reply.usage.completion_tokens_details.reasoning_tokens == reasoning
    assert reply.usage.completion_tokens == len(Tokenizer.read(NANO).encode(script.text))


def test_streamed_equals_whole_with_tools(scripted) -> None:
    script, url = scripted
    script.text = ("I look.</think>Wait.<tool_call>get_weather<arg_key>city</arg_key><arg_value>São \"P\"</arg_value>"
                   "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>")  # fmt: skip
    whole = client(url).chat.completions.create(model="nano", messages=USER, tools=TOOLS).choices[0]
    stream = client(url).chat.completions.create(
        model="nano", messages=USER, tools=TOOLS, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert deltas[0].role == "assistant" and all(d.role is None for d in deltas[1:])
    assert "".join(d.content or "" for d in deltas) == whole.message.content == "Wait."
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == whole.message.reasoning_content
    calls = [c for d in deltas for c in d.tool_calls or []]
    arguments = "".join(c.function.arguments or "" for c in calls)
    assert [c.function.name for c in calls if c.function.name] == ["get_weather"]
    assert arguments == whole.message.tool_calls[0].function.arguments
    assert json.loads(arguments) == {"city": 'São "P"', "days": 3}
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.finish_reason == "tool_calls"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens > 0


@pytest.mark.parametrize(
    ("extra", "prompt_end"),
    [
        ({}, "Effort: Max<|user|>Hi<|assistant|><think>"),
        ({"reasoning_effort": "low"}, "Effort: High<|user|>Hi<|assistant|><think>"),
        ({"reasoning_effort": "none"}, "<sop><|user|>Hi<|assistant|><think></think>"),
        ({"thinking": {"type": "disabled"}}, "<sop><|user|>Hi<|assistant|><think></think>"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<sop><|user|>Hi<|assistant|><think></think>"),
        ({"thinking": None, "stop": None, "tools": None}, "Effort: Max<|user|>Hi<|assistant|><think>"),
    ],
)
def test_thinking_fields(scripted, extra: dict[str, Any], prompt_end: str) -> None:
    script, url = scripted
    script.text = "ok"
    client(url).chat.completions.create(model="nano", messages=USER, extra_body=extra)
    assert script.prompts[-1].endswith(prompt_end)


def test_unknown_fields_are_accepted_and_named(scripted) -> None:
    script, url = scripted
    script.text = "ok"
    reply = httpx.post(f"{url}/v1/chat/completions", json={"messages": USER, "store": False, "frobnicate": 1})
    assert reply.status_code == 200 and reply.headers["x-glm52-ignored"] == "frobnicate, store"


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        (b"{", None, 400),
        (b"[]", None, 400),
        ({}, "messages", 400),
        ({"messages": []}, "messages", 400),
        ({"messages": "Hi"}, "messages", 400),
        ({"messages": USER, "temperature": "warm"}, "temperature", 400),
        ({"messages": USER, "temperature": 9}, "temperature", 400),
        ({"messages": USER, "max_tokens": 0}, "max_tokens", 400),
        ({"messages": USER, "n": 99}, "n", 400),
        ({"messages": USER, "tool_choice": "required"}, "tool_choice", 400),
        ({"messages": USER, "reasoning_effort": "huge"}, "reasoning_effort", 400),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages.0.role", 400),
        ({"messages": USER, "tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", 400),
        ({"messages": USER, "model": "other"}, "model", 404),
    ],
)
def test_bad_bodies_are_answered_in_the_envelope(scripted, body: Any, param: str | None, status: int) -> None:
    script, url = scripted
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = httpx.post(f"{url}/v1/chat/completions", content=content)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_routes_that_do_not_exist(scripted) -> None:
    _, url = scripted
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["message"]
    assert httpx.get(f"{url}/v1/chat/completions").status_code == 405
    assert [m.id for m in client(url).models.list()] == ["nano"]
    assert client(url).models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError):
        client(url).models.retrieve("other")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_its_reply(scripted, stream: bool) -> None:
    script, url = scripted
    script.text, script.delay_s = "word " * 200, 0.02
    ended = script.ended
    try:
        with pytest.raises(httpx.ReadTimeout), httpx.stream(
            "POST", f"{url}/v1/chat/completions", json={"messages": USER, "stream": stream}, timeout=0.3
        ) as reply:  # fmt: skip
            began = time.monotonic()
            for _ in reply.iter_lines():
                if time.monotonic() - began > 0.3:
                    raise httpx.ReadTimeout("enough")
        deadline = time.monotonic() + 20
        while script.ended == ended and time.monotonic() < deadline:
            time.sleep(0.02)
        assert script.ended == ended + 1
    finally:
        script.delay_s = 0.0


def test_a_real_model_streams_what_it_says_whole(tiny) -> None:
    backend, url = tiny
    fields: Any = {"model": "tiny", "messages": USER, "max_tokens": 24, "temperature": 0,
                   "logprobs": True, "top_logprobs": 2}  # fmt: skip
    whole = client(url).chat.completions.create(**fields)
    assert whole.usage.completion_tokens == 24 and whole.choices[0].finish_reason == "length"
    reasoning = whole.usage.completion_tokens_details.reasoning_tokens
    assert len(whole.choices[0].logprobs.content) == 24 - reasoning - 1, "those of the text"
    assert all(len(t.top_logprobs) == 2 for t in whole.choices[0].logprobs.content)
    deltas = [c.choices[0].delta for c in client(url).chat.completions.create(**fields, stream=True)]
    said = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    assert said == whole.choices[0].message.reasoning_content
    assert not backend.engine.has_work


def test_a_second_turn_hits_the_cache(tiny) -> None:
    _, url = tiny
    messages: list[Any] = [{"role": "user", "content": "word " * 100}]
    first = client(url).chat.completions.create(model="tiny", messages=messages, max_tokens=4, temperature=0)
    again = client(url).chat.completions.create(model="tiny", messages=messages, max_tokens=4, temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens >= 64
    assert again.choices[0].message.reasoning_content == first.choices[0].message.reasoning_content


def test_overflow_says_the_numbers(tiny) -> None:
    _, url = tiny
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client(url).chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "word " * 600}], stream=stream
            )
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
        assert "512" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        client(url).completions.create(model="tiny", prompt=[5] * 600)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert "512" in str(caught.value)


def test_many_at_once(tiny) -> None:
    backend, url = tiny

    def ask(i: int, out: list[str]) -> None:
        message = {"role": "user", "content": f"number {i % 3}"}
        reply = client(url).chat.completions.create(model="tiny", messages=[message], max_tokens=12, temperature=0)
        out.append(f"{i % 3}{reply.choices[0].message.reasoning_content}")

    out: list[str] = []
    threads = [threading.Thread(target=ask, args=(i, out)) for i in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(out) == 12 and len(set(out)) == 3
    assert not backend.engine.has_work
    backend.engine.check()


def test_two_servers_on_one_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run([sys.executable, "-m", "glm52.cli", "serve", "--port", str(port)],
                              capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 2 and f"127.0.0.1:{port}" in done.stderr and "--port" in done.stderr
