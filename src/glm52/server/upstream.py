"""A backend that has another server compute: vLLM, SGLang or llama.cpp, or one of our own.

Prompts are rendered and tokenized here and go upstream as token ids; what comes back is followed token by token like a
reply of our own engine: budgets of thinking, forms, stop strings and loops are seen here. Where thinking must close,
the stream is cut and the reply goes on from the same tokens with ``</think>`` after them. Where a token comes that the
form of the answer does not let stand, the stream is cut before it, and upstream chooses one more token among those that
may stand (a bias of 100 for them). That is what a mask makes of the same logits: the greedy choice is the same, and a
token drawn, and drawn again where it may not stand, has the distribution of one drawn behind a mask (but for top_p and
top_k, which cut before it). Log probabilities are the upstream's own; those of a prompt come from a request of their
own, which llama.cpp has no words for.
"""

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np

from glm52.config import GLMConfig
from glm52.engine import Event, FinishReason, SamplingParams, Sequence, TokenLogprob
from glm52.engine.guide import Guide, Marks
from glm52.engine.matcher import Matchers
from glm52.errors import RequestError
from glm52.tokenizer import Tokenizer

Json = dict[str, Any]
_CONNECT_S, _STALL_S = 10.0, 300.0
_PROBE_S, _FRESH_S = 2.0, 1.0  # how long a look at the server may take, and how long it is believed
_REPLACEMENT = "\ufffd"
_BIAS = 100.0  # OpenAI's most: as good as a ban or an exclusive choice
_UNTOLD = -9999.0  # OpenAI's log probability of a token that it does not tell
_BY_ID = "token_id:"  # vLLM's names of tokens


@dataclass
class Piece:
    """What one line of an upstream's stream says. token_ids: None where it gives texts only. logprobs: a token's own
    and those of the likeliest by their names, see ``Upstream._id``."""

    text: str = ""
    token_ids: list[int] | None = None
    finish: str | None = None
    num_cached: int | None = None
    logprobs: list[tuple[float, dict[str, float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Host:
    """A server that answers. window: None where it tells none."""

    url: str
    headers: dict[str, str]
    model: str
    window: int | None
    is_llama: bool


def meet(url: str, key: str | None = None) -> Host:
    """Ask who is there: its model, its window, which protocol it speaks. RequestError if nobody answers. url: with or
    without ``/v1``."""
    url, headers = url.rstrip("/").removesuffix("/v1"), {"authorization": f"Bearer {key}"} if key else {}
    with _named(url), httpx.Client(headers=headers, timeout=_CONNECT_S) as client:
        reply = client.get(f"{url}/v1/models")
        _check_status(reply.status_code, reply.text)
        models = reply.json().get("data") or [{}]
        is_llama = models[0].get("owned_by") == "llamacpp"
        window = models[0].get("max_model_len")
        if is_llama:
            window = client.get(f"{url}/props").json().get("default_generation_settings", {}).get("n_ctx")
        return Host(url, headers, models[0].get("id", ""), int(window) if window else None, is_llama)


class Upstream:
    """stall_s: how long the server may say nothing."""

    def __init__(self, host: Host, tokenizer: Tokenizer, config: GLMConfig, *, stall_s: float = _STALL_S) -> None:
        self.url, self._headers, self.model, self.is_llama = host.url, host.headers, host.model, host.is_llama
        self._tokenizer, self._marks = tokenizer, Marks.of(tokenizer)
        self._eos, self._vocab_size = frozenset(config.eos_token_id), config.vocab_size
        self._matchers = Matchers(tokenizer, config.vocab_size, self._eos)
        self._timeout = httpx.Timeout(stall_s, connect=_CONNECT_S)
        self.context_length = min(config.max_position_embeddings, host.window or config.max_position_embeddings)
        self._looking, self._looked_at = asyncio.Lock(), -math.inf
        self._trouble: str | None = None

    async def trouble(self) -> str | None:
        """Why the server cannot be asked now, by the code of the error, if that is so."""
        async with self._looking:
            if time.monotonic() - self._looked_at >= _FRESH_S:
                self._trouble = await asyncio.to_thread(self._look)
                self._looked_at = time.monotonic()
        return self._trouble

    def _look(self) -> str | None:
        try:
            with _named(self.url):
                reply = httpx.get(f"{self.url}/v1/models", headers=self._headers, timeout=_PROBE_S)
                _check_status(reply.status_code, reply.text)
        except RequestError as error:
            return error.code
        return None

    async def generate(self, tokens: Iterable[int], params: SamplingParams) -> AsyncIterator[Event]:
        """Events of one reply until its finish_reason."""
        if params.prompt_logprobs is not None and self.is_llama:
            raise RequestError("logprobs: llama.cpp, which computes here, tells none of the prompt; leave out echo, or "
                               "logprobs", param="logprobs")  # fmt: skip
        if params.grammar is not None:
            await asyncio.to_thread(self._matchers.compile, params.grammar)
        seq, choices, is_first = self._new_sequence(list(tokens), params), None, True
        async with httpx.AsyncClient(headers=self._headers, timeout=self._timeout) as client:
            if params.prompt_logprobs is not None:
                seq.prompt_logprobs = await self._score(client, seq.prompt, params.prompt_logprobs)
            while seq.finish_reason is None:
                length = len(seq.tokens)
                replies = self._follow(client, seq, choices, is_first)
                async with contextlib.aclosing(replies) as events:  # type: ignore[type-var]
                    async for event in events:
                        yield event
                if seq.finish_reason is not None:
                    return
                if choices is not None and len(seq.tokens) == length:
                    raise RequestError("the upstream server does not choose among the tokens that logit_bias leaves it",
                                       status=502, code="upstream_error")  # fmt: skip
                choices, is_first = self._choices(seq) if choices is None else None, False
                fewest = 2 if params.logprobs is None else 1  # that upstream is asked to choose among
                if choices is not None and len(choices) < fewest:
                    yield self._take(seq, choices) if choices else self._end(seq, "grammar")
                    choices = None

    def _new_sequence(self, prompt: list[int], params: SamplingParams) -> Sequence:
        limit = min(params.max_tokens, self.context_length - len(prompt))
        matcher = None if params.grammar is None else self._matchers.new(params.grammar)
        return Sequence(
            id=0, prompt=prompt, params=params, seed=0, tokens=list(prompt), max_tokens=limit,
            detokenizer=self._tokenizer.stream(), guide=Guide(params, prompt, limit, self._eos, self._marks, matcher),
        )  # fmt: skip

    async def _score(self, client: httpx.AsyncClient, prompt: list[int], count: int) -> list[TokenLogprob | None]:
        """One for each token of the prompt but the first. Upstream computes a token after it that nobody reads,
        and at least one alternative, since SGLang takes 0 for none."""
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "echo": True,
            "logprobs": max(count, 1), "return_tokens_as_token_ids": True, "stream": False,
        }  # fmt: skip
        with _named(self.url):
            reply = await client.post(f"{self.url}/v1/completions", json=body)
            _check_status(reply.status_code, reply.text)
            told = _parsed(parse_echo, reply.text).logprobs
        if len(told) < len(prompt) - 1:
            raise RequestError("the upstream server tells no log probabilities of prompts", status=502,
                               code="upstream_error")  # fmt: skip
        return [None, *(self._scored(t, p, top, count) for t, (p, top) in zip(prompt[1:], told, strict=False))]

    async def _follow(
        self, client: httpx.AsyncClient, seq: Sequence, choices: list[int] | None, is_first: bool
    ) -> AsyncIterator[Event]:
        """One request upstream, until the reply ends or must not go on as upstream would have it. is_first: of the
        reply; only then is what the cache held a hit. choices: one more token is wanted, of these."""
        async with contextlib.aclosing(self._pieces(client, seq, choices)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                if is_first and piece.num_cached is not None:
                    seq.num_cached_tokens = piece.num_cached
                ids = self._ids(piece)
                event = self._take(seq, ids, self._logprobs(seq, piece, ids))
                if ids:
                    yield event
                is_cut = seq.guide.must_close or len(event.token_ids) < len(ids) or (choices is not None and ids)
                if seq.finish_reason is not None or is_cut:
                    return
                if piece.finish == "length" and choices is None:
                    yield self._end(seq, "length")
                elif piece.finish == "stop" and any(self._admits(seq, token) for token in self._eos):
                    yield self._end(seq, "stop")
                if piece.finish is not None:
                    return
        raise RequestError("the upstream server's stream was cut off", status=502, code="upstream_cut")

    def _ids(self, piece: Piece) -> list[int]:
        """Of tokens that are a character together llama.cpp streams the last one only, with the text of all."""
        ids = piece.token_ids
        is_streamed = self.is_llama and piece.finish is None
        if ids is None or (is_streamed and piece.text and _REPLACEMENT in self._tokenizer.decode(ids)):
            return self._tokenizer.encode(piece.text)
        return ids

    def _logprobs(self, seq: Sequence, piece: Piece, ids: list[int]) -> list[TokenLogprob]:
        """One for each token, if they are asked for."""
        count, told = seq.params.logprobs, piece.logprobs
        if count is None:
            return []
        if ids and not told and not self.is_llama:
            raise RequestError("the upstream server tells no log probabilities", status=502, code="upstream_error")
        out = [TokenLogprob(token, _UNTOLD, {}) for token in ids[: max(len(ids) - len(told), 0)]]
        return out + [self._scored(t, p, top, count) for t, (p, top) in zip(ids[len(out) :], told, strict=False)]

    def _scored(self, token: int, own: float, top: dict[str, float], count: int) -> TokenLogprob:
        """A token with the likeliest that upstream names. What it could not be at all has OpenAI's least; JSON has no
        infinity, and some send null instead."""
        told = {name: max(_UNTOLD, p) for name, p in top.items() if isinstance(p, float | int)}
        likeliest = sorted(told.items(), key=lambda item: -item[1])[:count]
        named = {self._id(name): p for name, p in likeliest}
        return TokenLogprob(token, max(_UNTOLD, own), {i: p for i, p in named.items() if i is not None})

    def _id(self, name: str) -> int | None:
        """``token_id:N``, or a text that is one token."""
        if name.startswith(_BY_ID) and (number := name.removeprefix(_BY_ID)).isdecimal():
            return int(number)
        ids = self._tokenizer.encode(name)
        return ids[0] if len(ids) == 1 else None

    def _take(self, seq: Sequence, ids: list[int], logprobs: Iterable[TokenLogprob] = ()) -> Event:
        """Tokens that came, as far as they may stand."""
        said, text = [], ""
        for token in ids:
            if seq.finish_reason is not None or not self._admits(seq, token):
                break
            piece = seq.append(token, self._eos)
            if piece is not None:
                said.append(token)
                text += piece
        text += seq.close_text() if seq.finish_reason is not None else ""
        told = list(logprobs)[: len(said)]
        return Event(seq=seq, token_ids=said, text=text, logprobs=told, finish_reason=seq.finish_reason)

    def _end(self, seq: Sequence, reason: FinishReason) -> Event:
        seq.finish_reason = reason
        return Event(seq=seq, text=seq.close_text(), finish_reason=reason)

    def _admits(self, seq: Sequence, token: int) -> bool:
        return seq.guide.admits(token, self._vocab_size)

    def _choices(self, seq: Sequence) -> list[int]:
        """The tokens that may come next, where upstream's was none of them."""
        if seq.guide.is_reasoning:
            assert self._marks is not None
            return [self._marks.end_think]
        allowed = seq.guide.allowed(self._vocab_size)
        return [] if allowed is None else np.flatnonzero(allowed).tolist()

    async def _pieces(
        self, client: httpx.AsyncClient, seq: Sequence, choices: list[int] | None
    ) -> AsyncIterator[Piece]:
        path, parse = ("/completion", parse_llama) if self.is_llama else ("/v1/completions", parse_completion)
        limit = seq.max_tokens - len(seq.output) if choices is None else 1
        body = (self._llama_body if self.is_llama else self._body)(seq, limit, self._bias(seq.params, choices))
        # One token is asked for whole: in a stream llama.cpp names none that is a part of a character.
        body["stream"] = not (self.is_llama and choices is not None)
        last = None
        with _named(self.url):
            async with client.stream("POST", self.url + path, json=body) as reply:
                if reply.status_code != 200:
                    _check_status(reply.status_code, (await reply.aread()).decode("utf-8", "replace"))
                async for line in _lines(reply):
                    said = line if line.startswith("{") else line.partition(":")[2].strip()
                    if said == "[DONE]":
                        break
                    if line.startswith(("data:", "error:", "{")):
                        piece = _parsed(parse, said)
                        # What ends a reply is told on, once the line after it may have told of the cache.
                        if last is not None:
                            last.num_cached = last.num_cached if piece.num_cached is None else piece.num_cached
                        elif piece.finish is not None:
                            last = piece
                        else:
                            yield piece
        if last is not None:
            yield last

    def _bias(self, params: SamplingParams, choices: list[int] | None) -> dict[int, float]:
        """The request's own, and for choices of the next token: for them, or against all others if those are fewer or
        the request prefers some of the choices."""
        if choices is None:
            return dict(params.logit_bias)
        others = np.setdiff1d(np.arange(self._vocab_size), choices, assume_unique=True).tolist()
        if len(choices) <= len(others) and not params.logit_bias:
            return dict.fromkeys(choices, _BIAS)
        return {**params.logit_bias, **dict.fromkeys(others, -_BIAS)}

    def _body(self, seq: Sequence, limit: int, bias: dict[int, float]) -> Json:
        """For ``/v1/completions``. Stop strings stay here: upstream they would be found in thinking too."""
        params = seq.params
        optional = {
            "top_k": params.top_k, "min_p": params.min_p, "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty, "ignore_eos": params.ignore_eos,
            "logit_bias": {str(k): v for k, v in bias.items()}, "stop_token_ids": sorted(params.stop_token_ids),
        }  # fmt: skip
        return {
            "model": self.model, "prompt": seq.tokens, "max_tokens": limit,
            "stream_options": {"include_usage": True}, "temperature": params.temperature, "top_p": params.top_p,
            "skip_special_tokens": False, "spaces_between_special_tokens": False, "return_token_ids": True,
            **{k: v for k, v in optional.items() if v}, **_seed(seq),
            **({} if params.logprobs is None else {"logprobs": params.logprobs, "return_tokens_as_token_ids": True}),
            **({"repetition_penalty": params.repetition_penalty} if params.repetition_penalty != 1.0 else {}),
        }  # fmt: skip

    def _llama_body(self, seq: Sequence, limit: int, bias: dict[int, float]) -> Json:
        """For llama.cpp's ``/completion``, whose own defaults are none of ours. Timings tell what the cache held;
        not asked for, they come after the token that ends a reply."""
        params = seq.params
        return {
            "prompt": seq.tokens, "n_predict": limit, "cache_prompt": True,
            "return_tokens": True, "timings_per_token": True,
            "temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k,
            "min_p": params.min_p, "presence_penalty": params.presence_penalty, "ignore_eos": params.ignore_eos,
            "frequency_penalty": params.frequency_penalty, "repeat_penalty": params.repetition_penalty,
            "logit_bias": [[k, v] for k, v in bias.items()], **_seed(seq),
            **({} if params.logprobs is None else {"n_probs": max(params.logprobs, 1)}),
        }  # fmt: skip


def _seed(seq: Sequence) -> Json:
    """Another one for each request of a reply: with one and the same, every first token would be drawn alike."""
    return {} if seq.params.seed is None else {"seed": seq.params.seed + len(seq.output)}


async def _lines(reply: httpx.Response) -> AsyncIterator[str]:
    """Those that end with a line feed: httpx ends lines at characters, too, that JSON may hold as they are."""
    rest = b""
    async for part in reply.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace").rstrip("\r")
    if rest:
        yield rest.decode("utf-8", "replace")


def _parsed(parse: Callable[[str], Piece], line: str) -> Piece:
    """RequestError where something is not of the type that it should be."""
    try:
        piece = parse(line)
        if all(isinstance(t, int) and t >= 0 for t in piece.token_ids or ()) and all(
            isinstance(own, float | int) and isinstance(top, dict) for own, top in piece.logprobs
        ):
            return piece
    except (TypeError, AttributeError, LookupError, ValueError):
        pass
    raise _no_event(line)


def parse_completion(line: str) -> Piece:
    """A line of OpenAI's text completions. RequestError if it is no such line. Pure."""
    event = _object(line)
    choice = (event.get("choices") or [{}])[0]
    details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
    finish = choice.get("finish_reason") or None
    if finish not in (None, "stop", "length"):
        raise RequestError(f"the upstream server ended the reply: {finish}", status=502, code="upstream_error")
    told = choice.get("logprobs") or {}
    own = told.get("token_logprobs") or []
    logprobs = [(p, top or {}) for p, top in zip(own, told.get("top_logprobs") or [None] * len(own), strict=False)]
    return Piece(choice.get("text") or "", choice.get("token_ids"), finish, details.get("cached_tokens"), logprobs)


def parse_echo(line: str) -> Piece:
    """A prompt that comes back with its log probabilities; its first token has none. Pure."""
    piece = parse_completion(line)
    return replace(piece, logprobs=piece.logprobs[1:])


def parse_llama(line: str) -> Piece:
    """A line of llama.cpp's ``/completion``. Pure."""
    event = _object(line)
    is_end = event.get("stop") is True
    finish = ("length" if event.get("stop_type") == "limit" else "stop") if is_end else None
    logprobs = [
        (token.get("logprob", _UNTOLD), {f"{_BY_ID}{t.get('id')}": t.get("logprob", _UNTOLD) for t in top})
        for token in event.get("completion_probabilities") or []
        for top in [token.get("top_logprobs") or []]
    ]
    num_cached = (event.get("timings") or {}).get("cache_n")
    return Piece(event.get("content") or "", event.get("tokens") or None, finish, num_cached, logprobs)


def _object(line: str) -> Json:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise _no_event(line)
    if error := event.get("error"):
        said = error.get("message", error) if isinstance(error, dict) else error
        raise RequestError(f"the upstream server failed: {said}", status=502, code="upstream_error")
    return event


def _no_event(line: str) -> RequestError:
    said = f"the upstream server sent what is no event: {line.strip()[:80]!r}"
    return RequestError(said, status=502, code="upstream_garbage")


def _check_status(status: int, body: str) -> None:
    """What the upstream refuses is refused in its words; what it fails at is a bad gateway."""
    if status == 200:
        return
    known = status in (400, 429, 503)
    raise RequestError(f"the upstream server answered {status}: {body.strip()[:300]}", status=status if known else 502,
                       code="upstream_error")  # fmt: skip


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """Faults of the connection as errors that say where and what."""
    try:
        yield
    except httpx.ConnectError as error:
        raise RequestError(f"no server answers at {url} ({error})", status=502, code="upstream_unreachable") from error
    except httpx.TimeoutException as error:
        raise RequestError(f"the server at {url} said nothing for too long", status=504,
                           code="upstream_timeout") from error  # fmt: skip
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RequestError(f"the connection to {url} broke ({error})", status=502, code="upstream_cut") from error
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise RequestError(f"what answers at {url} is no server of this kind ({error})", status=502,
                           code="upstream_garbage") from error  # fmt: skip
