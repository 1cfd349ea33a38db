"""The gateway: our dialects in front of another server, real or full of faults."""

import asyncio
import json
import math
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from glm52 import cli
from glm52.clients.stage import served
from glm52.config import GLMConfig
from glm52.engine import AsyncEngine
from glm52.errors import RequestError
from glm52.hub import NANO
from glm52.server.service import Service
from glm52.server.upstream import Host, Upstream, meet
from glm52.session import Session
from tests.scripted import END_THINK, TOKENIZER
from tests.serving import PATHS, TEMPLATE, WEATHER, ask, running, schema_fields, sse

THINKS = "I think. I go on. " * 400
CALL = "Hm.</think><tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>"


class Fake:
    """Speaks like vLLM, an older SGLang (no token ids) or llama.cpp. fault: how it goes wrong. What it says depends on
    whether its prompt is still thinking; of the tokens that a bias leaves it, it chooses the first."""

    def __init__(self, kind: str = "vllm") -> None:
        self.kind, self.fault, self.thought, self.answer = kind, "", "Hm.</think>", "Hello!"
        self.bodies: list[Any] = []
        self.num_open = self.num_met = 0
        self._parts: list[int] = []
        path = "/completion" if kind == "llamacpp" else "/v1/completions"
        self.app = Starlette(routes=[
            Route("/v1/models", self._models), Route("/props", self._props), Route(path, self._say, methods=["POST"]),
        ])  # fmt: skip

    def wait_until(self, num_open: int) -> None:
        deadline = time.monotonic() + 10
        while self.num_open != num_open and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.num_open == num_open

    async def _models(self, request: Request) -> Response:
        self.num_met += 1
        if self.fault == "500":
            return PlainTextResponse("CUDA out of memory", 500)
        return JSONResponse({"data": [{"id": "glm-5.2", "owned_by": self.kind, "max_model_len": 512}]})

    async def _props(self, request: Request) -> Response:
        return JSONResponse({"default_generation_settings": {"n_ctx": 256}})

    async def _say(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        if self.fault == "500":
            return PlainTextResponse("CUDA out of memory", 500)
        if self.fault == "429":
            return PlainTextResponse("too many", 429)
        if self.bodies[-1].get("echo"):
            return JSONResponse(self._echo(self.bodies[-1]))
        lines = self._lines(self.bodies[-1])
        if self.bodies[-1]["stream"]:
            return StreamingResponse(lines, media_type="text/event-stream")
        events = [json.loads(line.removeprefix("data:")) async for line in lines]
        ids = [t for e in events for t in e.get("tokens", [])]
        return JSONResponse(events[-1] | {"tokens": ids, "content": TOKENIZER.decode(ids)})

    def _echo(self, body: Any) -> Any:
        """A prompt and the one token after it, each less likely than the one before; the first has no probability."""
        ids = [*body["prompt"], *TOKENIZER.encode(self.answer)[: body["max_tokens"]]]
        if self.fault == "unscored":
            ids = ids[-1:]
        names = [f"token_id:{i}" if self.kind == "vllm" else TOKENIZER.decode([i]) for i in ids]
        own = [None, *(-float(at) for at in range(1, len(ids)))]
        top = [None, *({name: p, names[0]: -0.25} for name, p in zip(names[1:], own[1:], strict=True))]
        said = {"tokens": names, "token_logprobs": own, "top_logprobs": top}
        return {"choices": [{"text": TOKENIZER.decode(ids), "finish_reason": "length", "logprobs": said}]}

    async def _lines(self, body: Any) -> AsyncIterator[str]:
        self.num_open += 1
        try:
            limit = body["n_predict" if self.kind == "llamacpp" else "max_tokens"]
            is_thinking = END_THINK not in body["prompt"]
            ids = TOKENIZER.encode((self.thought if is_thinking else "") + self.answer)
            if body.get("logit_bias") and self.fault != "deaf":
                ids = [self._chosen({int(k): v for k, v in dict(body["logit_bias"]).items()}), *ids]
            for at, token in enumerate(ids[:limit]):
                if at == 3 and self.fault in ("hang", "garbage", "error"):
                    if self.fault == "hang":
                        await asyncio.sleep(60)
                    yield "data: {oops\n\n" if self.fault == "garbage" else 'data: {"error": {"message": "OOM"}}\n\n'
                    return
                if self.fault == "slow":
                    await asyncio.sleep(0.05)
                yield self._line(token, body)
                if at == 3 and self.fault == "cut":
                    return
            if self.kind == "llamacpp" and limit > len(ids):
                yield self._line(GLMConfig.read(NANO).eos_token_id[0], body)
            yield self._end("length" if limit < len(ids) else "stop")
        finally:
            self.num_open -= 1

    def _chosen(self, bias: dict[int, float]) -> int:
        return min(bias) if max(bias.values()) > 0 else min(set(range(4096)) - set(bias))

    def _line(self, token: int, body: Any) -> str:
        """llama.cpp names no tokens that are a part of a character, but the last one."""
        self._parts.append(token)
        text = TOKENIZER.decode(self._parts)
        if is_part := text.endswith("\ufffd"):
            text = ""
        else:
            self._parts = []
        if self.kind == "llamacpp":
            event = {"content": text, "tokens": [token], "stop": False}
            if body.get("timings_per_token"):
                event["timings"] = {"cache_n": 2 * len(self.bodies)}
            if body.get("n_probs"):
                top = [{"id": i, "logprob": p} for i, p in ((7, -0.25), (token, -1.5))]
                event["completion_probabilities"] = [{"id": token, "logprob": -1.5, "top_logprobs": top}]
            return "" if is_part and body["stream"] else f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
        choice = {"text": text, "finish_reason": None} | ({"token_ids": [token]} if self.kind == "vllm" else {})
        if self.fault == "masked":
            choice["logprobs"] = {"token_logprobs": [-math.inf], "top_logprobs": [{"a": math.nan, "b": None}]}
        elif body.get("logprobs") is not None and self.fault != "unscored":
            name = (lambda i: f"token_id:{i}") if self.kind == "vllm" else lambda i: TOKENIZER.decode([i])
            top = {name(token): -1.5, name(7): -0.25}
            choice["logprobs"] = {"tokens": [name(token)], "token_logprobs": [-1.5], "top_logprobs": [top]}
        return f"data:{json.dumps({'choices': [choice]}, ensure_ascii=False)}\r\n\r\n"

    def _end(self, reason: str) -> str:
        if self.kind == "llamacpp":
            kind = "limit" if reason == "length" else "eos"
            return f"data: {json.dumps({'content': '', 'stop': True, 'stop_type': kind})}\n\n"
        usage = {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 2 * len(self.bodies)}}}
        choices = {"choices": [{"text": "", "finish_reason": reason}]}
        return f"data: {json.dumps(choices)}\n\ndata: {json.dumps(usage)}\n\ndata:[DONE]\n\n"


def gateway(url: str, **options: Any) -> Service:
    upstream = Upstream(meet(url), TOKENIZER, GLMConfig.read(NANO), **options)
    return Service(upstream, TOKENIZER, TEMPLATE, name="nano", context_length=upstream.context_length, defaults={})


@pytest.fixture(params=["vllm", "sglang", "llamacpp"])
def fake(request: pytest.FixtureRequest) -> Iterator[tuple[Fake, httpx.Client]]:
    fake = Fake(request.param)
    with (
        served(fake.app) as url,
        running(gateway(url, stall_s=30.0)) as front,
        httpx.Client(base_url=front, timeout=60) as client,
    ):
        yield fake, client


@pytest.mark.parametrize("stream", [False, True])
def test_every_dialect_over_every_upstream(fake: tuple[Fake, httpx.Client], stream: bool) -> None:
    upstream, client = fake
    for dialect in PATHS:
        said = ask(client, dialect, "Hi", max_tokens=100, stream=stream)
        assert (said.reasoning, said.content) == ("Hm.", "Hello!")
    body = upstream.bodies[-1]
    assert TOKENIZER.decode(body["prompt"]).endswith("<|assistant|><think>")
    assert said.usage.get("cache_read_input_tokens") == 2 * len(PATHS)


def test_a_call(fake: tuple[Fake, httpx.Client]) -> None:
    upstream, client = fake
    upstream.thought, upstream.answer = "", CALL
    said = ask(client, "chat", "Hi", max_tokens=100, stream=True, tools=[WEATHER])
    assert said.calls == [["get_weather", '{"city": "Rome"}']] and said.finish == "tool_calls"


@pytest.mark.parametrize("dialect", PATHS)
def test_thinking_that_does_not_end_is_cut_and_closed(fake: tuple[Fake, httpx.Client], dialect: str) -> None:
    """The second request upstream goes on from the same tokens with </think> after them."""
    upstream, client = fake
    upstream.thought, upstream.answer = THINKS, "Hello!"
    budget = {"chat": {"reasoning": {"max_tokens": 40}}, "zai": {"thinking": {"type": "enabled", "budget_tokens": 40}},
              "responses": {"reasoning": {"max_tokens": 40}},
              "messages": {"thinking": {"type": "enabled", "budget_tokens": 40}}}[dialect]  # fmt: skip
    said = ask(client, dialect, "Hi", max_tokens=200, stream=True, **budget)
    assert said.content == "Hello!" and said.reasoning.startswith("I think.") and len(upstream.bodies) == 2
    first, second = (b["prompt"] for b in upstream.bodies)
    assert second[: len(first)] == first and second[-1] == END_THINK
    assert 40 <= len(second) - len(first) - 1 <= 64
    assert (said.usage.get("cache_read_input_tokens") or 0) <= 2, "what our own first request left there is no hit"
    upstream.wait_until(num_open=0)


def test_the_end_of_a_reply_inside_its_thinking_closes_that(fake: tuple[Fake, httpx.Client]) -> None:
    upstream, client = fake
    upstream.thought, upstream.answer = "", "Well."
    said = ask(client, "chat", "Hi", max_tokens=100)
    assert (said.reasoning, said.content, len(upstream.bodies)) == ("Well.", "Well.", 2)


def test_stop_strings_and_limits_are_kept_here(fake: tuple[Fake, httpx.Client]) -> None:
    upstream, client = fake
    upstream.thought, upstream.answer = "Stop here? No.</think>", "One. Stop here. Two."
    assert ask(client, "chat", "Hi", max_tokens=100, stop=["Stop here"]).content == "One."
    assert ask(client, "chat", "Hi", max_tokens=4).finish == "length"


def test_health_is_that_of_upstream() -> None:
    """It said ok for ever, whatever stood behind it. Asked often, it asks upstream once a second."""
    fake = Fake()
    with served(fake.app) as url, running(gateway(url)) as front:
        asked = fake.num_met
        replies = [httpx.get(f"{front}/health") for _ in range(5)]
        assert {(r.status_code, r.json()["status"]) for r in replies} == {(200, "ok")}
        assert fake.num_met - asked <= 2
        fake.fault = "500"
        wait_for_health(front, 503, "upstream_error")
        fake.fault = ""
        wait_for_health(front, 200, "ok")
    with running(front_service := gateway_to_nobody()) as front:
        reply = httpx.get(f"{front}/health")
        assert (reply.status_code, reply.json()["status"]) == (503, "upstream_unreachable")
        assert front_service.failure is None, "it may come back"


def gateway_to_nobody() -> Service:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    gone = Host(url, headers={}, model="", window=None, is_llama=False)
    upstream = Upstream(gone, TOKENIZER, GLMConfig.read(NANO))
    return Service(upstream, TOKENIZER, TEMPLATE, name="nano", context_length=512, defaults={})


def wait_for_health(url: str, status: int, said: str) -> None:
    deadline = time.monotonic() + 10
    while (reply := httpx.get(f"{url}/health")).json()["status"] != said and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (reply.status_code, reply.json()["status"]) == (status, said)


FAULTS = {"500": (502, "out of memory"), "429": (429, "too many"), "hang": (504, "nothing for too long"),
          "cut": (502, "cut off"), "garbage": (502, "no event: '{oops'"), "error": (502, "OOM")}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dialect", PATHS)
def test_faults_are_told_in_the_words_of_the_dialect(fault: str, dialect: str) -> None:
    fake = Fake()
    status, words = FAULTS[fault]
    question = (
        {"input": "Hi"}
        if dialect == "responses"
        else {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 99}
    )
    with served(fake.app) as url, running(gateway(url, stall_s=0.3 if fault == "hang" else 30.0)) as front:
        fake.fault, fake.answer = fault, "Hello! It is over."
        reply = httpx.post(front + PATHS[dialect], json=question, timeout=60)
        assert reply.status_code == status and words in reply.json()["error"]["message"]
        text = httpx.post(front + PATHS[dialect], json={**question, "stream": True}, timeout=60).text
        assert words in text and "over" not in text


def test_hanging_up_cancels_upstream(fake: tuple[Fake, httpx.Client]) -> None:
    upstream, client = fake
    upstream.fault, upstream.answer = "slow", "Hello! " * 100
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    with client.stream("POST", PATHS["chat"], json=body) as reply:
        lines = reply.iter_lines()  # kept: httpx hangs up as soon as its iterator is collected
        next(lines)
        upstream.wait_until(num_open=1)  # the first event may be sent before upstream is asked
    upstream.wait_until(num_open=0)


@pytest.mark.parametrize("stream", [False, True])
def test_characters_of_several_tokens(fake: tuple[Fake, httpx.Client], stream: bool) -> None:
    """Also where upstream is asked for one token, and that is a part of a character; then it must name it."""
    upstream, client = fake
    upstream.answer = "簾, 😀\u2028\x85!"
    assert len(TOKENIZER.encode(upstream.answer)) > len(upstream.answer)
    said = ask(client, "chat", "Hi", max_tokens=100, stream=stream)
    assert said.content == upstream.answer and len(upstream.bodies) == 1
    if upstream.kind != "sglang":
        said = ask(client, "chat", "Hi", max_tokens=100, stream=stream, guided_choice=["😀😀", "🙂"])
        assert said.content in ("😀😀", "🙂") and said.finish == "stop"


def test_log_probabilities_are_those_of_upstream(fake: tuple[Fake, httpx.Client]) -> None:
    upstream, client = fake
    body = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 1}
    said = client.post(PATHS["chat"], json=body).json()["choices"][0]
    entries = said["logprobs"]["content"]
    assert "".join(e["token"] for e in entries) == "Hello!" and said["message"]["content"] == "Hello!"
    likeliest = TOKENIZER.decode([7])
    assert all(e["logprob"] == -1.5 for e in entries)
    assert all([(t["token"], t["logprob"]) for t in e["top_logprobs"]] == [(likeliest, -0.25)] for e in entries)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_prompts_are_those_of_upstream(fake: tuple[Fake, httpx.Client], stream: bool) -> None:
    """They were refused whatever the upstream; llama.cpp alone has none."""
    upstream, client = fake
    upstream.thought, ids = "", TOKENIZER.encode("one two three")
    body = {"prompt": ids, "echo": True, "max_tokens": 2, "logprobs": 1, "stream": stream}
    reply = client.post("/v1/completions", json=body)
    if upstream.kind == "llamacpp":
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, "logprobs") and "leave out echo" in error["message"]
        return
    said = json.loads(sse(reply.text)[0][1] if stream else reply.text)["choices"][0]
    told, pieces = said["logprobs"], [TOKENIZER.piece(i) for i in ids]
    assert said["text"].startswith("one two three") and told["tokens"][: len(ids)] == pieces
    assert told["token_logprobs"] == [None, *(-float(at) for at in range(1, len(ids))), -1.5, -1.5]
    assert told["top_logprobs"][1] == {pieces[0]: -0.25, pieces[1]: -1.0}
    asked = upstream.bodies[-2]
    assert (asked["prompt"], asked["echo"], asked["logprobs"]) == (ids, True, 1) and not upstream.bodies[-1].get("echo")
    for fault, status in (("unscored", 502), ("429", 429), ("500", 502)):
        upstream.fault = fault
        assert client.post("/v1/completions", json=body).status_code == status


def test_log_probabilities_that_upstream_does_not_tell(fake: tuple[Fake, httpx.Client]) -> None:
    """Parts of a character behind llama.cpp; what could not be, all tokens where the field is not known."""
    upstream, client = fake
    body = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True}
    if upstream.kind == "llamacpp":
        upstream.answer = "簾"
        entries = client.post(PATHS["chat"], json=body).json()["choices"][0]["logprobs"]["content"]
        parts = len(TOKENIZER.encode("簾")) - 1
        assert parts and [e["logprob"] for e in entries] == [*[-9999.0] * parts, -1.5]
    else:
        upstream.fault = "masked"
        entries = client.post(PATHS["chat"], json=body | {"top_logprobs": 2}).json()["choices"][0]["logprobs"][
            "content"
        ]
        assert entries[0]["logprob"] == -9999.0 and [t["logprob"] for t in entries[0]["top_logprobs"]] == [-9999.0]
        upstream.fault = "unscored"
        reply = client.post(PATHS["chat"], json=body)
        assert reply.status_code == 502 and "log probabilities" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_held_to_its_form(fake: tuple[Fake, httpx.Client], stream: bool) -> None:
    """Where upstream says what may not stand, it is asked for one token of those that may, and goes on from there."""
    upstream, client = fake
    said = ask(client, "chat", "Hi", max_tokens=100, stream=stream, guided_choice=["yes", "no"])
    assert said.reasoning == "Hm." and said.content in ("yes", "no") and said.finish == "stop"
    assert {TOKENIZER.decode([int(t)]) for t in dict(upstream.bodies[1]["logit_bias"])} == {"n", "y", "ye"}
    assert said.usage["prompt_tokens_details"]["cached_tokens"] <= 2
    upstream.answer = '{"city": "Rome"}. Anything else?'
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    before = len(upstream.bodies)
    said = ask(client, "chat", "Hi", max_tokens=100, stream=stream, **schema_fields("chat", schema))
    assert json.loads(said.content) == {"city": "Rome"} and len(upstream.bodies) == before + 1, "cut where it is whole"


def test_an_upstream_that_heeds_no_bias_is_found_out(fake: tuple[Fake, httpx.Client]) -> None:
    upstream, client = fake
    upstream.fault = "deaf"
    body = {"messages": [{"role": "user", "content": "Hi"}], "guided_choice": ["yes", "no"]}
    reply = client.post(PATHS["chat"], json=body)
    assert reply.status_code == 502 and "logit_bias" in reply.json()["error"]["message"]


CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer"}},
        "required": ["city", "days"], "additionalProperties": False}  # fmt: skip


@pytest.mark.parametrize("fields", [
    {}, schema_fields("chat", CITY), {"guided_regex": "[A-Z]{3}-[0-9]{4}"}, {"guided_choice": ["left", "right"]},
    {"guided_choice": ["left", "right"], "logit_bias": {str(TOKENIZER.encode("right")[0]): 60.0}},
    {"tools": [WEATHER]}, {"tools": [WEATHER], "tool_choice": "required"},
    {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    {"reasoning": {"max_tokens": 8}}, {"reasoning": {"max_tokens": 8}, **schema_fields("chat", CITY)},
    {"thinking": {"type": "disabled"}, **schema_fields("chat", CITY)},
])  # fmt: skip
def test_our_own_server_as_upstream(own: tuple[str, str], fields: Any) -> None:
    """Greedy replies through the gateway are those of the server behind it, held to forms or not."""
    both = []
    for base in own:
        with httpx.Client(base_url=base, timeout=60) as client:
            both.append(ask(client, "chat", "What is 3+4?", max_tokens=150, temperature=0.0, stream=True, **fields))
    behind, before = ((s.reasoning, s.content, s.calls, s.finish) for s in both)
    assert behind == before and (both[0].content or both[0].calls)


@pytest.mark.parametrize("fields", [{}, {"guided_choice": ["left", "right"]}, {"reasoning": {"max_tokens": 8}}])
def test_log_probabilities_over_our_own_server(own: tuple[str, str], fields: Any) -> None:
    """Also of tokens that upstream was made to say."""
    body = {
        "messages": [{"role": "user", "content": "What is 3+4?"}], "logprobs": True, "top_logprobs": 3,
        "temperature": 0.0, "max_tokens": 60,
    }  # fmt: skip
    behind, before = (
        httpx.post(base + PATHS["chat"], json={**body, **fields}, timeout=60).json()["choices"][0]["logprobs"][
            "content"
        ]
        for base in own
    )
    assert behind and [e["token"] for e in behind] == [e["token"] for e in before]
    for one, other in zip(behind, before, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
        assert [t["token"] for t in one["top_logprobs"]] == [t["token"] for t in other["top_logprobs"]]


def test_log_probabilities_of_prompts_over_our_own_server(own: tuple[str, str]) -> None:
    body = {"prompt": ["What is 3+4?", "One more."], "echo": True, "max_tokens": 0, "logprobs": 2}
    replies = [httpx.post(f"{base}/v1/completions", json=body, timeout=60).json()["choices"] for base in own]
    for behind, before in zip(*replies, strict=True):
        assert (behind["text"], behind["logprobs"]["tokens"]) == (before["text"], before["logprobs"]["tokens"])
        both = [c["logprobs"]["token_logprobs"] for c in (behind, before)]
        assert both[0][0] is both[1][0] is None and both[0][1:] == pytest.approx(both[1][1:], abs=1e-4)
        assert behind["logprobs"]["top_logprobs"][1:] == [
            pytest.approx(top, abs=1e-4) for top in before["logprobs"]["top_logprobs"][1:]
        ]


def test_every_dialect_over_our_own_server(own: tuple[str, str]) -> None:
    for dialect in PATHS:
        both = []
        for base in own:
            with httpx.Client(base_url=base, timeout=60) as client:
                both.append(ask(client, dialect, "What is 3+4?", max_tokens=120, temperature=0.0, stream=True))
        assert (both[0].reasoning, both[0].content) == (both[1].reasoning, both[1].content) != ("", "")


@pytest.fixture(scope="module")
def own() -> Iterator[tuple[str, str]]:
    """A server with the small model, and a gateway before it."""
    session = Session.open(NANO, context=2048)
    backend = AsyncEngine(session.engine)
    service = Service(backend, session.tokenizer, session.template, name="nano", context_length=2048, defaults={})
    with running(service) as url, running(gateway(url)) as front:
        yield url, front
    backend.close()


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match=r"no server answers at http://127\.0\.0\.1:9"):
        meet("http://127.0.0.1:9/v1")
    for args, words in ((["nano", "--upstream", "http://127.0.0.1:9"], "no server answers"),
                        (["owner/of-what-is-not-fetched", "--upstream", "http://127.0.0.1:9"], "no server answers"),
                        (["--upstream", "http://127.0.0.1:9"], "name the MODEL"),
                        (["nano", "--upstream", "http://127.0.0.1:9", "--drafts", "2"], "--drafts")):  # fmt: skip
        assert cli.main(["serve", "--port", "0", *args]) == 2
        assert words in capsys.readouterr().err
