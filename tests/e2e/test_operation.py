"""A server under load and under attack: bounds, refusals, hang-ups, deadlines, draining, metrics and logs."""

import asyncio
import contextlib
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from glm52 import cli, ops
from glm52.engine import AsyncEngine, SamplingParams
from glm52.engine.store import Store
from glm52.errors import GLMError, RequestError
from glm52.hub import NANO
from glm52.server import command
from glm52.server.connections import Server
from glm52.server.limits import Keys
from glm52.server.metrics import Metrics
from glm52.server.service import Service
from glm52.session import Session
from tests.fixtures import write_tiny
from tests.scripted import ScriptedModel, always
from tests.serving import USER, WEATHER, Script, asgi, running, scripted_service, sse

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": USER}


@pytest.fixture(scope="module")
def script() -> Script:
    return Script("</think>one two three")


@pytest.fixture(scope="module")
def url(script: Script) -> Iterator[str]:
    with running(scripted_service(script, max_body_bytes=1 << 20, keys=Keys(["secret"]))) as url:
        yield url


HEADERS = {"authorization": "Bearer secret"}


def test_without_the_key_nothing_is_answered(url: str) -> None:
    for path in (CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize",
                 "/detokenize", "/api/paas/v4/chat/completions"):  # fmt: skip
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "secre"}):
            reply = httpx.post(url + path, json=BODY, headers=headers)
            assert reply.status_code == 401 and "API key" in str(reply.json()["error"]["message"])
    for path in ("/v1/models", "/v1/models/nano", "/metrics"):
        assert httpx.get(url + path).status_code == 401
        assert httpx.get(url + path, headers=HEADERS).status_code == 200
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.post(url + CHAT, json=BODY, headers={"x-api-key": "secret"}).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb_is_refused_and_the_next_one_is_served(url: str, chunked: bool) -> None:
    block = b" " * (1 << 20)
    content: Any = (block for _ in range(100)) if chunked else block * 100
    reply = httpx.post(url + CHAT, content=content, headers=HEADERS, timeout=30)
    assert reply.status_code == 413 and reply.json()["error"]["code"] == "body_too_large"
    assert httpx.post(url + CHAT, json=BODY, headers=HEADERS).status_code == 200


def test_a_client_that_never_ends_its_body_is_let_go() -> None:
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(running(scripted_service(Script(), body_s=0.3)))
        host, port = url.removeprefix("http://").split(":")
        slow = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
        slow.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{" % CHAT.encode())
        began = time.monotonic()
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 30


def test_half_sent_headers_hinder_nobody(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            slow = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            slow.sendall(b"POST /v1/messages HTTP/1.1\r\nhost:")
        assert httpx.post(url + CHAT, json=BODY, headers=HEADERS).status_code == 200


def test_a_wish_to_upgrade_is_left_unheard(url: str) -> None:
    """Java's client asks for HTTP/2 with every request; the body counts, and what comes behind it."""
    host, port = url.removeprefix("http://").split(":")
    key = b"".join(f"{k}: {v}\r\n".encode() for k, v in HEADERS.items())
    upgrade = key + b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
    body = b'{"prompt": "hi"}'
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\n" + upgrade + b"content-length: %d\r\n\r\n" % len(body))
        client.sendall(body + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        reply = b""
        while b'"status"' not in reply and (piece := client.recv(1 << 16)):
            reply += piece
    assert reply.count(b"HTTP/1.1 200") == 2 and b'"tokens"' in reply, reply


@pytest.mark.parametrize(
    "option", [["--max-seqs", "0"], ["--max-waiting", "-1"], ["--deadline", "0"], ["--deadline", "nan"]]
)
def test_bounds_under_which_nothing_could_be_served(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *option]) == 2
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize("begin", [b"GET /health HTTP/1.1\r\nx: ", b"GET /", b"POST /health HTTP/1.1\r\nhost: x\r\n"])
def test_heads_without_end_are_refused(url: str, begin: bytes) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as endless:
        endless.sendall(begin)
        more = b"x: y\r\n" * 512 if begin.endswith(b"\n") else b"x" * 4096
        with contextlib.suppress(ConnectionError):
            for _ in range(1 << 12):
                endless.sendall(more)
        with contextlib.suppress(ConnectionError):  # as a client sees it that is still sending
            assert endless.recv(1 << 16).startswith(b"HTTP/1.1 400")
    assert httpx.get(url + "/health").status_code == 200


def test_half_sent_headers_are_hung_up_on_in_time() -> None:
    """Silence, a head that trickles, and one after a request that was answered; an answer may take as long as it takes."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(running(scripted_service(Script(delay_s=0.3), head_s=0.5)))
        host, port = url.removeprefix("http://").split(":")
        silent, trickling, second = (
            stack.enter_context(socket.create_connection((host, int(port)), timeout=30)) for _ in range(3)
        )
        second.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += second.recv(1 << 16)
        second.sendall(b"GET /health HTTP/1.1\r\nhost:")
        ends_at = time.monotonic() + 30
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < ends_at:
                trickling.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() < ends_at
        assert silent.recv(1) == second.recv(1) == b""
        assert httpx.post(url + CHAT, json=BODY).status_code == 200, "slower than half a second"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"nul", b"[" * 100_000, b'{"messages": NaN}', b'{"messages": ' + b'[' * 5000 + b"]" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud83d"}], "x": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "f", "parameters": {"properties": {"a": '
        + b'{"items": ' * 450 + b"{}" + b"}" * 454 + b"]}",
        b"\xff\xfe", b'{"messages": [{"role": "user", "content": [{"type": "text"}, {"type": "image_url"}]}], "n": 1e999}',
        json.dumps({"messages": USER, "tools": [{"function": {"name": "f", "parameters": {"$ref": "#/$ref"}}}], "seed": -(1 << 70)}).encode(),
        b'{"messages": [{"role": "user", "content": "x"}], "input": "x", "metadata": {"a": -1e999}}',
        json.dumps({"messages": USER, "tools": [WEATHER], "logit_bias": {"99999999": 1}, "max_tokens": -1}).encode(),
    ],
)  # fmt: skip
def test_nonsense_is_the_clients_fault(url: str, body: bytes) -> None:
    for path in (CHAT, "/v1/messages", "/v1/responses", "/v1/completions", "/tokenize", "/detokenize"):
        reply = httpx.post(url + path, content=body, headers=HEADERS)
        assert reply.status_code < 500, (path, reply.text)


def test_half_a_character_is_mended(url: str, script: Script) -> None:
    body = b'{"messages": [{"role": "user", "content": "a\\ud83d b"}]}'
    assert httpx.post(url + CHAT, content=body, headers=HEADERS).status_code == 200
    assert "a� b" in script.prompts[-1]


def test_names_of_fields_cannot_break_a_header(url: str) -> None:
    body = BODY | {"a\r\nset-cookie: x": 1, "ü": 2, "b" * 2000: 3}
    for stream in (False, True):
        reply = httpx.post(url + CHAT, json=body | {"stream": stream}, headers=HEADERS)
        assert reply.status_code == 200 and "set-cookie" not in reply.headers
        assert reply.headers["x-glm52-ignored"].startswith("a??set-cookie: x, bbb")


# ── Queue, deadlines, signs of life ──────────────────────────────────────────────────────────────────────────────


def test_500_at_once_are_served_or_refused_and_none_is_lost() -> None:
    script = Script("</think>one two three", stride=99)
    service = scripted_service(script, max_running=8, max_waiting=100)

    async def main() -> list[httpx.Response]:
        async with asgi(service) as client:
            return await asyncio.gather(*(client.post(CHAT, json=BODY | {"stream": i % 2 == 0}) for i in range(500)))

    replies = asyncio.run(main())
    served = [r for r in replies if r.status_code == 200]
    refused = [r for r in replies if r.status_code == 429]
    assert len(served) + len(refused) == 500 and len(served) >= 108
    assert all("one two three" in r.text or "three" in r.text for r in served)
    assert all(r.headers["retry-after"] == "1" and r.json()["error"]["code"] == "queue_full" for r in refused)
    assert script.ended == len(served) and service.gate.running == service.gate.waiting == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_burst_does_not_overfill_the_queue(stream: bool) -> None:
    """Places were counted when they were taken, so that all who came at once were let in. A second burst finds as many."""
    service = scripted_service(Script("</think>yes", stride=99, delay_s=0.2), max_running=2, max_waiting=4)

    async def main() -> list[Counter[int]]:
        async with asgi(service) as client:
            ask = [lambda: client.post(CHAT, json=BODY | {"stream": stream})] * 40
            return [Counter([r.status_code for r in await asyncio.gather(*(a() for a in ask))]) for _ in range(2)]

    assert asyncio.run(main()) == [{200: 6, 429: 34}] * 2


def test_many_connections_at_once() -> None:
    with running(scripted_service(Script("</think>yes", stride=99), max_waiting=200)) as url:

        async def main() -> list[int]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(limits=limits, timeout=60) as client:
                replies = await asyncio.gather(*(client.post(url + CHAT, json=BODY) for _ in range(150)))
                return [r.status_code for r in replies]

        assert set(asyncio.run(main())) == {200}


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_request(stream: bool) -> None:
    script = Script("</think>" + "word " * 100, delay_s=0.02)

    async def main() -> httpx.Response:
        async with asgi(scripted_service(script)) as client:
            return await client.post(CHAT, json=BODY | {"stream": stream}, headers={"x-glm52-deadline-s": "0.2"})

    reply = asyncio.run(main())
    error = json.loads(sse(reply.text)[-1][1]) if stream else reply.json()
    assert reply.status_code == (200 if stream else 504) and error["error"]["code"] == "deadline_exceeded"
    assert script.ended == 1


def test_a_long_prefill_shows_signs_of_life() -> None:
    script = Script("</think>done", delay_s=0.25, stride=99)

    async def main() -> dict[str, str]:
        async with asgi(scripted_service(script, first_wait_s=0.05, keep_alive_s=0.05)) as client:
            ask = {"messages": {"max_tokens": 9}, "responses": {"input": "Hi"}, "chat/completions": {}}
            return {p: (await client.post(f"/v1/{p}", json={**BODY, **b, "stream": True})).text for p, b in ask.items()}

    said = asyncio.run(main())
    assert said["messages"].startswith("event: message_start") and said["messages"].count('{"type": "ping"}') >= 3
    assert said["responses"].count(": still working\n\n") >= 2
    assert said["chat/completions"].count(": still working\n\n") >= 2 and "done" in said["chat/completions"]


@pytest.mark.parametrize("limit", ["deadline_s", "send_s"])
def test_a_client_that_does_not_read_loses_its_place(limit: str) -> None:
    """What watched the clock waited for the sign of life that it sent: one such client held its place for ever."""

    class Loud(Script):
        def _event(self, *args: Any) -> Any:
            return replace(super()._event(*args), text="x" * 200_000)

    script = Loud("word " * 200)
    service = scripted_service(script, max_running=1, first_wait_s=0.1, keep_alive_s=0.1, **{limit: 0.5})
    with running(service) as url, socket.socket() as deaf:
        host, port = url.removeprefix("http://").split(":")
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        data = json.dumps(BODY | {"stream": True}).encode()
        deaf.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(data)) + data)
        ends_at = time.monotonic() + 30
        while not script.ended and time.monotonic() < ends_at:
            time.sleep(0.05)
        assert script.ended == 1 and service.gate.running == 0


def test_events_set_no_timers() -> None:
    """Each set one, in case the client did not read it, which cost more than to send it."""
    timers = 0

    async def main() -> httpx.Response:
        loop = asyncio.get_running_loop()
        call_at = loop.call_at

        def counted(*call: Any, **context: Any) -> asyncio.TimerHandle:
            nonlocal timers
            timers += 1
            return call_at(*call, **context)

        loop.call_at = counted  # type: ignore[method-assign]
        async with asgi(scripted_service(Script("</think>" + "word " * 200))) as client:
            return await client.post(CHAT, json=BODY | {"stream": True})

    assert len(sse(asyncio.run(main()).text)) > 200 > 10 * timers


def test_a_hang_up_ends_the_sequence_within_a_step() -> None:
    """Also of those that wait for a place."""
    backend = AsyncEngine(ScriptedModel(always(" and so on")).engine())
    with running(scripted_service(backend, context_length=8192, max_running=1)) as url:
        body = BODY | {"stream": True, "max_tokens": 8000, "thinking_budget": 7000}
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                reply = stack.enter_context(httpx.stream("POST", url + CHAT, json=body, timeout=20))
                assert reply.status_code == 200
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (backend.engine.has_work or httpx.get(f"{url}/health").json()["waiting"]):
            time.sleep(0.02)
        assert not backend.engine.has_work and backend.engine.stats.output_tokens < 2 * 8000
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "model": "nano", "running": 0, "waiting": 0}
    backend.close()


def test_a_hang_up_before_the_first_token_is_seen_at_once() -> None:
    script = Script(delay_s=600)
    with running(scripted_service(script, first_wait_s=600)) as url:
        host, port = url.removeprefix("http://").split(":")
        data = json.dumps(BODY | {"stream": True}).encode()
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(
                b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(data)) + data
            )
            while not script.prompts:
                time.sleep(0.01)
        ends_at = time.monotonic() + 30
        while not script.ended and time.monotonic() < ends_at:
            time.sleep(0.01)
        assert script.ended == 1
        assert value(httpx.get(f"{url}/metrics").text, "glm52_requests_total", dialect="chat", status="499") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_failure_of_one_answer_ends_the_others(stream: bool) -> None:
    class Second(Script):
        """The second answer fails, the first would take for ever."""

        async def generate(self, *args: Any) -> Any:
            self.delay_s, self.error = (600, None) if not self.prompts else (0, "broken")
            async for event in super().generate(*args):
                yield event

    script = Second("</think>ok")

    async def main() -> httpx.Response:
        async with asgi(scripted_service(script)) as client:
            reply = await client.post(CHAT, json=BODY | {"n": 2, "stream": stream})
            assert script.ended == 2
            return reply

    reply = asyncio.run(main())
    assert reply.status_code == (200 if stream else 500) and "broken" in reply.text


# ── Metrics, logs, explanations ──────────────────────────────────────────────────────────────────────────────────


def value(text: str, name: str, **labels: str) -> float:
    return sum(s.value for family in text_string_to_metric_families(text) for s in family.samples
               if s.name == name and labels.items() <= s.labels.items())  # fmt: skip


def test_metrics_count_what_happened() -> None:
    backend = AsyncEngine(ScriptedModel(always(" and so on")).engine(2))

    async def main() -> str:
        async with asgi(scripted_service(backend, context_length=8192)) as client:
            for stream in (False, True):
                await client.post(CHAT, json=BODY | {"max_tokens": 40, "thinking_budget": 5, "stream": stream})
            assert (await client.post(CHAT, json={})).status_code == 400
            return (await client.get("/metrics")).text

    text = asyncio.run(main())
    backend.close()
    assert value(text, "glm52_requests_total", dialect="chat", status="200") == 2
    assert value(text, "glm52_requests_total", dialect="chat", status="400") == 1
    assert (
        value(text, "glm52_output_tokens_total")
        == 80
        == value(text, "glm52_finished_replies_total", reason="length") * 40
    )
    assert value(text, "glm52_thinking_closed_total", how="hard") == 2
    assert value(text, "glm52_time_to_first_token_seconds_count") == value(text, "glm52_queue_seconds_count") == 2
    assert (
        value(text, "glm52_drafted_tokens_total", position="1")
        >= value(text, "glm52_accepted_tokens_total", position="1")
        > 0
    )
    assert value(text, "glm52_cache_pages") >= value(text, "glm52_cache_pages_unused") > 0


@pytest.mark.skipif(ops.backend() == "reference", reason="counted by the native kernels")
def test_metrics_of_experts() -> None:
    """A prompt of four tokens in one step, whose experts are read once, then eight tokens of two experts each."""
    session = Session.open(NANO, context=512, max_seqs=1, num_drafts=0)
    session.engine.submit(list(range(2, 6)), SamplingParams(max_tokens=9, ignore_eos=True))
    while session.engine.has_work:
        session.engine.step()
    text = Metrics(session.engine, lambda: 0, lambda: 0).text().decode()
    assert value(text, "glm52_expert_hits_total", layer="0") == 0, "dense"
    assert value(text, "glm52_expert_hits_total", layer="3") == (4 + 8) * 2
    assert 8 * 2 + 2 <= value(text, "glm52_expert_reads_total", layer="3") <= (4 + 8) * 2


@pytest.mark.parametrize("log_prompts", [False, True])
def test_logs_are_json_and_say_nothing_of_what_was_said(caplog: pytest.LogCaptureFixture, log_prompts: bool) -> None:
    service = scripted_service(Script("</think>an answer"), log_prompts=log_prompts)

    async def main() -> None:
        async with asgi(service) as client:
            await client.post(CHAT, json={"messages": [{"role": "user", "content": "a question"}]},
                              headers={"authorization": "Bearer my-key"})  # fmt: skip

    with caplog.at_level(logging.INFO, "glm52.requests"):
        asyncio.run(main())
    line = json.loads(caplog.records[-1].getMessage())
    assert (line["dialect"], line["status"], line["finish"], line["cached_tokens"]) == ("chat", 200, ["stop"], 3)
    assert line["total_s"] >= line["first_token_s"] >= 0 and "my-key" not in caplog.text
    assert ("a question" in caplog.text) is ("an answer" in caplog.text) is log_prompts


def test_refused_requests_are_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """They left no line, nor did count_tokens, which was not even counted."""
    service = scripted_service(Script("</think>an answer"), keys=Keys(["my-key"]), max_running=1, max_waiting=0)
    key = {"authorization": "Bearer my-key"}
    long = {"input": "word " * 600, "stream": True}

    async def main() -> str:
        async with asgi(service) as client:
            await client.post(CHAT, json=BODY, headers={"x-api-key": "not-mine"})
            await client.post(CHAT, json=BODY | {"temperature": 9}, headers=key)
            service.gate.admit(1)
            await client.post("/v1/messages", json=BODY, headers=key)
            service.gate.dismiss(1)
            await client.post("/v1/messages/count_tokens", json=BODY, headers=key)
            await client.post("/v1/responses", json=long, headers=key)
            await client.get("/v1/models/no-such", headers=key)
            assert (await client.get("/v1/models", headers=key)).status_code == 200
            return (await client.get("/metrics", headers=key)).text

    with caplog.at_level(logging.INFO, "glm52.requests"):
        text = asyncio.run(main())
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "glm52.requests"]
    assert [(x["dialect"], x["status"], x.get("code"), x.get("param")) for x in lines] == [
        ("chat", 401, "invalid_api_key", None), ("chat", 400, None, "temperature"),
        ("messages", 429, "queue_full", None), ("count_tokens", 200, None, None),
        ("responses", 400, "context_length_exceeded", "messages"), ("other", 404, "model_not_found", "model"),
    ]  # fmt: skip
    assert [x["client"][:4] for x in lines] == ["127.", *["key-"] * 5] and lines[2]["prompt_tokens"] > 0
    assert "word word" not in caplog.text and "my-key" not in caplog.text and "not-mine" not in caplog.text
    for line in lines[:4]:
        assert value(text, "glm52_requests_total", dialect=line["dialect"], status=str(line["status"])) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_found_in_the_log_by_its_id(caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    async def main() -> list[httpx.Response]:
        async with asgi(scripted_service(Script("</think>an answer"))) as client:
            ask = [({"x-request-id": "mine-1"}, BODY), ({}, BODY), ({"x-request-id": 'a"b c'}, {}), ({}, {})]
            return [await client.post(CHAT, json=b | {"stream": stream}, headers=h) for h, b in ask]

    with caplog.at_level(logging.INFO, "glm52.requests"):
        replies = asyncio.run(main())
    assert [r.status_code for r in replies] == [200, 200, 400, 400]
    ids = [json.loads(r.getMessage())["id"] for r in caplog.records if r.name == "glm52.requests"]
    assert ids == [r.headers["x-request-id"] for r in replies] == [r.headers["request-id"] for r in replies]
    assert ids[0] == "mine-1" and len(set(ids)) == 4 and all(i.startswith("req_") for i in ids[1:])


def test_a_request_is_found_in_the_log_by_its_own_id(caplog: pytest.LogCaptureFixture) -> None:
    """The one in a body of Z.ai's was said back, and was in no line."""

    async def main() -> list[Any]:
        bodies = [BODY | {"request_id": "mine-1234"}, BODY, BODY | {"request_id": "mine-5678", "model": "other"}]
        async with asgi(scripted_service(Script("</think>an answer"))) as client:
            replies = [await client.post("/api/paas/v4/chat/completions", json=b) for b in bodies]
        return [(r.headers["x-request-id"], r.json().get("request_id")) for r in replies]

    with caplog.at_level(logging.INFO, "glm52.requests"):
        told = asyncio.run(main())
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "glm52.requests"]
    assert [x.get("request_id") for x in lines] == ["mine-1234", None, "mine-5678"]
    assert told == [(lines[0]["id"], "mine-1234"), (lines[1]["id"], lines[1]["id"]), (lines[2]["id"], None)]


def test_the_log_of_requests_is_lines_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each began with ``INFO glm52.requests:``, and had no time."""
    write_tiny(tmp_path)
    monkeypatch.setenv("GLM52_LOG", "INFO")
    with process(tmp_path, "--drafts", "0") as (server, url):
        for body in (BODY | {"max_tokens": 4}, {}):
            httpx.post(url + CHAT, json=body, timeout=60)
        server.send_signal(signal.SIGTERM)
        assert server.stderr is not None
        lines = [json.loads(line) for line in server.stderr.read().splitlines() if '"dialect"' in line]
    assert [x["status"] for x in lines] == [200, 400] and lines[0]["completion_tokens"] == 4
    assert all(abs(time.time() - datetime.fromisoformat(x["time"]).timestamp()) < 300 for x in lines)


def test_a_miss_is_explained_on_request_in_every_dialect() -> None:
    service = scripted_service(Script())

    async def main() -> list[Any]:
        found = []
        async with asgi(service) as client:
            for path, system in (
                (CHAT, lambda s: {"messages": [{"role": "system", "content": s}, *USER]}),
                ("/v1/messages", lambda s: {"messages": USER, "system": s, "max_tokens": 9}),
                ("/v1/responses", lambda s: {"input": "Hi", "instructions": s}),
            ):
                headers = {"authorization": f"Bearer {path}", "x-glm52-explain": "cache"}
                for text in ("Ticket 3fa9c1d2.", "Ticket 77b0aa91."):
                    reply = await client.post(path, json=system(text), headers=headers)
                    found.append(reply.json()["usage"])
        return found

    for first, second in zip(*[iter(asyncio.run(main()))] * 2, strict=True):
        assert "no earlier prompt" in str(first)
        assert "a system message changed in what looks like a random identifier" in str(second), second


@pytest.mark.parametrize("bad", [[-1], [4096], [1 << 40], []])
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_looked_at_before_anything_is_done_with_them(bad: list[int], stream: bool) -> None:
    """An explanation failed before the check (500), and the later prompts of a stream after its head had gone out."""
    script = Script()

    async def main() -> list[httpx.Response]:
        async with asgi(scripted_service(script)) as client:
            ask = {"headers": {"x-glm52-explain": "cache"}}
            bodies = [{"prompt": prompt, "stream": stream} for prompt in ([bad], [[5, 6], bad])]
            return [await client.post("/v1/completions", json=b, **ask) for b in bodies]

    for reply in asyncio.run(main()):
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "prompt", reply.text
    assert not script.prompts


def test_what_a_client_forgot_is_recalled() -> None:
    script = Script("I think so.</think>Yes.")

    async def main() -> httpx.Response:
        async with asgi(scripted_service(script)) as client:
            await client.post(CHAT, json=BODY)
            turns = [*USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Sure?"}]
            return await client.post(CHAT, json={"messages": turns, "clear_thinking": False})

    assert asyncio.run(main()).headers["x-glm52-prompt"] == "reasoning restored in 1 turns"
    assert "<think>I think so.</think>Yes.<|user|>Sure?" in script.prompts[-1]


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])
def test_listening_publicly_needs_a_key(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    from glm52 import cli

    assert cli.main(["serve", "--host", host, "--port", "1"]) == 2
    error = capsys.readouterr().err
    assert "--api-key" in error and "--insecure" in error


def test_keys_come_from_the_command_line_or_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert command._read_keys(["zero", f"@{file}"]) == ["zero", "one", "two"]
    with pytest.raises(RequestError, match="cannot read"):
        command._read_keys(["@/nowhere/keys"])
    with pytest.raises(RequestError, match="at least one key"):
        command._read_keys([""])


@contextlib.contextmanager
def process(*arguments: str | Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """``glm52 serve`` as a command, and where it listens."""
    command = [sys.executable, "-m", "glm52.cli", "serve", *map(str, arguments), "--port", "0", "--context", "512"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as it:
        try:
            assert it.stderr is not None
            yield it, next(m.group() for line in it.stderr if (m := re.search(r"http://[\d.:]+\d", line)))
        finally:
            it.kill()


GREEDY: dict[str, Any] = {"ignore_eos": True, "temperature": 0}


def test_sigterm_under_load_ends_what_runs_and_takes_no_more(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    replies: list[httpx.Response] = []

    def ask(url: str) -> None:
        body = GREEDY | {"prompt": "Hi", "max_tokens": 300}
        replies.append(httpx.post(url + "/v1/completions", json=body, timeout=60))

    with process(tmp_path, "--drafts", "0", "--max-seqs", "2") as (server, url):
        threads = [threading.Thread(target=ask, args=(url,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        while httpx.get(f"{url}/health").json()["waiting"] < 6 and not replies:
            time.sleep(0.005)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.wait(timeout=60) == 0
    assert [r.status_code for r in replies] == [200] * 8, "what was accepted is answered"
    assert {r.json()["usage"]["completion_tokens"] for r in replies} == {300}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_requests_around_sigterm_are_answered_or_refused(tmp_path: Path) -> None:
    """uvicorn hung up on those that had connected and not asked yet: neither an answer nor a refusal."""
    write_tiny(tmp_path)
    ends: list[Any] = []
    body = json.dumps(GREEDY | {"prompt": "Hi", "max_tokens": 8})

    def ask(connection: http.client.HTTPConnection) -> int:
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        reply = connection.getresponse()
        said = json.loads(reply.read())
        assert reply.status == 503 or said["usage"]["completion_tokens"] == 8
        assert reply.status == 200 or reply.getheader("retry-after")
        return reply.status

    def ask_on(address: str) -> None:
        while not ends or ends[-1] is not ConnectionRefusedError:
            with contextlib.closing(http.client.HTTPConnection(address, timeout=30)) as connection:
                try:
                    ends.append(ask(connection))
                except Exception as error:
                    ends.append(type(error))

    with process(tmp_path, "--drafts", "0") as (server, url):
        address = url.removeprefix("http://")
        early = http.client.HTTPConnection(address, timeout=30)
        early.connect()
        threads = [threading.Thread(target=ask_on, args=(address,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        while len(ends) < 30:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert ask(early) == 503
        early.close()
        for thread in threads:
            thread.join()
        assert server.wait(timeout=30) == 0
    # A connection that the kernel took in the moment in which the door closed is reset by it: loud, and never read.
    refusals = {503, ConnectionRefusedError, ConnectionResetError, BrokenPipeError}
    assert {200, ConnectionRefusedError} <= set(ends) <= {200} | refusals, Counter(ends)


def test_500_connections_to_the_command_are_answered_or_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path)

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: bool) -> tuple[bytes, bytes]:
        body = json.dumps(GREEDY | {"prompt": "Hi", "max_tokens": 4, "stream": stream}).encode()
        lead = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        writer.write((lead % len(body)).encode() + body)
        reply = await reader.read()
        writer.close()
        head, _, said = reply.partition(b"\r\n\r\n")
        return head, said

    async def main(host: str, port: str) -> list[tuple[bytes, bytes]]:
        connections = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _ in range(500)))
        async with asyncio.timeout(60):
            return await asyncio.gather(*(ask(*c, stream=i % 2 == 0) for i, c in enumerate(connections)))

    with process(tmp_path, "--drafts", "0", "--max-waiting", "100") as (_, url):
        replies = asyncio.run(main(*url.removeprefix("http://").split(":")))
        idle = httpx.get(f"{url}/health").json()
    served = [said for head, said in replies if head.startswith(b"HTTP/1.1 200")]
    refused = [head for head, _ in replies if head.startswith(b"HTTP/1.1 429")]
    assert len(served) + len(refused) == 500 and len(served) >= 108
    assert all(b"[DONE]" in said or json.loads(said)["usage"]["completion_tokens"] == 4 for said in served)
    assert all(b"\r\nretry-after: 1" in head for head in refused)
    assert (idle["running"], idle["waiting"]) == (0, 0)


def test_a_prefix_outlives_the_command(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    body = GREEDY | {"prompt": " ".join(f"word {i}" for i in range(80)), "max_tokens": 20}
    replies = []
    for _ in range(2):
        with process(tmp_path / "model", "--drafts", "2", "--prefix-cache", tmp_path / "pages") as (server, url):
            replies.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60).json())
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0
    texts = [r["choices"][0]["text"] for r in replies]
    cached = [r["usage"]["prompt_tokens_details"]["cached_tokens"] for r in replies]
    assert cached[0] == 0 and cached[1] >= replies[1]["usage"]["prompt_tokens"] - 64 > 0
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_twice_it_stops_at_once_and_streams_are_told(tmp_path: Path, second: signal.Signals) -> None:
    """They were cut without a last event, with a traceback of each. One who does not read is hung up on."""
    write_tiny(tmp_path)
    body = GREEDY | {"prompt": ["Hi"] * 1000, "max_tokens": 300, "stream": True}
    with process(tmp_path, "--drafts", "0", "--max-seqs", "1", "--max-waiting", "5000") as (server, url):
        host, port = url.removeprefix("http://").split(":")
        data = json.dumps(body).encode()
        with socket.socket() as deaf, httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as reply:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((host, int(port)))
            deaf.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
            lines = reply.iter_lines()
            next(lines)
            server.send_signal(signal.SIGINT)
            time.sleep(1)
            began = time.monotonic()
            server.send_signal(second)
            *_, last = filter(None, lines)
            assert "shutting_down" in last
            assert server.wait(timeout=30) == 0 and time.monotonic() - began < 10
        assert server.stderr is not None and "Traceback" not in server.stderr.read()


def test_draining_refuses_and_then_ends_what_is_left() -> None:
    script = Script("</think>" + "word " * 200, delay_s=0.02)
    service: Service = scripted_service(script)

    async def main() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        async with asgi(service) as client:
            running_ = asyncio.ensure_future(client.post(CHAT, json=BODY))
            await asyncio.sleep(0.1)
            service.drain(0.3)
            refused = await client.post(CHAT, json=BODY)
            return await running_, refused, await client.get("/health")

    ended, refused, health = asyncio.run(main())
    assert (ended.status_code, refused.status_code, health.status_code) == (503, 503, 503)
    assert refused.headers["retry-after"] and refused.json()["error"]["code"] == "shutting_down"
    assert health.json()["status"] == "draining" and script.ended == 1


class Dying(ScriptedModel):
    dies = False

    def __call__(self, *args: Any) -> Any:
        if self.dies:
            raise MemoryError("no more")
        return super().__call__(*args)


def test_a_dead_engine_is_no_healthy_server() -> None:
    """It said 200 for ever, and each refusal made the one exception longer."""
    model = Dying(always(" and so on"))
    backend = AsyncEngine(model.engine())

    async def main() -> tuple[str, list[httpx.Response]]:
        async with asgi(scripted_service(backend, context_length=8192)) as client:
            stream = asyncio.ensure_future(client.post(CHAT, json=BODY | {"stream": True, "max_tokens": 8000}))
            while backend.engine.stats.output_tokens < 3:
                await asyncio.sleep(0.01)
            model.dies = True
            said = (await stream).text
            return said, [await client.post(CHAT, json=BODY), await client.get("/health")]

    said, (refused, health) = asyncio.run(main())
    assert "engine_failed" in said.split("data: ")[-1] and health.json()["status"] == "failed"
    assert (refused.status_code, refused.json()["error"]["code"], health.status_code) == (503, "engine_failed", 503)


def test_a_server_whose_engine_is_dead_stops_and_says_so() -> None:
    model = Dying(always(" and so on"))
    model.dies = True
    server = Server(scripted_service(AsyncEngine(model.engine()), context_length=8192))

    async def ask(address: Any) -> int:
        async with httpx.AsyncClient() as client:
            return (await client.post("http://{}:{}{}".format(*address, CHAT), json=BODY)).status_code

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(asyncio.run, ask(listener.getsockname()))
        with pytest.raises(GLMError, match="engine has failed"):
            server.run(sockets=[listener])
        assert asking.result() == 503


def test_pages_that_wait_for_the_disk_outlive_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What had been computed before it failed, and was queued to be written, was lost."""
    model = Dying(always(" and so on"))
    engine = model.engine()
    store = engine.store = Store(
        tmp_path, [torch.ones(64, 8, dtype=torch.uint8)], 64, fingerprint="", max_bytes=1 << 20
    )
    write = store._write
    monkeypatch.setattr(store, "_write", lambda *job: (time.sleep(0.5), write(*job)))
    names = store.name(range(64), [])
    store.save(names, [0])
    model.dies = True
    engine.submit([5], SamplingParams())
    service = scripted_service(AsyncEngine(engine), context_length=8192)
    monkeypatch.setattr(command, "_engine", lambda *_: service)
    assert cli.main(["serve", "--port", "0"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == names


def test_small_frames_are_sent_at_once() -> None:
    """Else the first token waits 40 ms for the client to acknowledge the head."""

    async def nodelay() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def opened(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            taken: socket.socket = writer.get_extra_info("socket")
            found.set_result(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = command._bind("127.0.0.1", 0)
        async with await asyncio.start_server(opened, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await asyncio.wait_for(found, 10)

    assert asyncio.run(nodelay())
