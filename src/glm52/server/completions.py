"""The OpenAI text-completions dialect: prompts as texts or token ids, batches, ``echo`` and log probabilities. Pure.

Prompts are continued as they stand: no template, no parsing; the strings of special tokens are special tokens. With
``echo`` and ``logprobs`` the prompt's own log probabilities are computed, which is what evaluation harnesses read; they
count on one token after it, so that one may be the end of the text. ``return_token_ids`` is vLLM's: ids beside texts;
so is ``return_tokens_as_token_ids``: ids instead of texts beside log probabilities.
"""

import codecs
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from glm52.chat import Delta, Thinking
from glm52.engine import TokenLogprob
from glm52.errors import RequestError
from glm52.ids import new_id
from glm52.server.openai import (
    SharedBody,
    error_payload,
    guided_structure,
    num_answers,
    token_bias,
    usage_payload,
    wants_usage,
)
from glm52.server.request import (
    Answer,
    ChatRequest,
    Defaults,
    Frame,
    Json,
    Template,
    Usage,
    sampling,
    stop_strings,
    unknown_fields,
    validated,
)
from glm52.tokenizer import Tokenizer

MAX_PROMPTS = 1024


class TextBody(SharedBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


def read(body: Any, defaults: Defaults) -> ChatRequest:
    text = validated(TextBody, body)
    limit = 16 if text.max_tokens is None else text.max_tokens
    if limit == 0 and not text.echo:
        raise RequestError("max_tokens: expected at least 1 without echo, found 0", param="max_tokens")
    scores_only = text.echo and limit <= 1  # one token is computed that nobody reads, so any will do
    params = sampling(
        text, defaults, max_tokens=1 if limit == 0 else limit, stop=stop_strings(text.stop),
        logit_bias=token_bias(text), logprobs=text.logprobs, ignore_eos=text.ignore_eos or scores_only or None,
        prompt_logprobs=text.logprobs if text.echo else None,
    )  # fmt: skip
    return ChatRequest(
        model=text.model or "", params=params, prompts=_prompts(text.prompt), structure=guided_structure(text),
        thinking=Thinking(enabled=False), n=num_answers(text), echo=bool(text.echo), stream=bool(text.stream),
        include_usage=wants_usage(text), ignored=tuple(unknown_fields(text)),
        raw={
            "only_echo": limit == 0, "wants_ids": bool(text.return_token_ids),
            "names_ids": bool(text.return_tokens_as_token_ids),
        },
    )  # fmt: skip


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> tuple[str | list[int], ...]:
    is_one = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
    prompts: tuple[Any, ...] = (given,) if is_one else tuple(given)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise RequestError(f"prompt: expected 1 to {MAX_PROMPTS} prompts, found {len(prompts)}", param="prompt")
    if not all(prompts):
        raise RequestError("prompt: expected at least one token to continue, found an empty text", param="prompt")
    return prompts


class Writer:
    """Writes one response; a choice is its prompt, where echoed, and what follows."""

    keep_alive = b": still working\n\n"

    def __init__(self, request: ChatRequest, model: str, tokenizer: Tokenizer) -> None:
        self.request, self.model, self._tokenizer = request, model, tokenizer
        self.id, self.created = new_id("cmpl-"), int(time.time())
        self._offsets: dict[int, int] = defaultdict(int)
        self._characters: dict[int, codecs.IncrementalDecoder] = defaultdict(
            lambda: codecs.getincrementaldecoder("utf-8")("replace")
        )
        self._said: dict[int, int] = {}
        self._told: dict[int, int] = {}  # log probabilities: those of half a character wait for the rest of it
        self._given: dict[int, int] = {}  # token ids, likewise
        self._template = cache(lambda index: Template(lambda text: self._data(index, text, None, None)))

    def begin(self, prompt_tokens: int, cached_tokens: int) -> list[Frame]:
        return []

    def more(self, answer: Answer, deltas: Sequence[Delta], logprobs: Sequence[TokenLogprob]) -> list[Frame]:
        """With echo, all comes at the end: the prompt's log probabilities are known only then."""
        at = self._said.get(answer.index, 0)
        if self.request.echo or at == len(answer.text):
            return []
        self._said[answer.index] = len(answer.text)
        if self.request.params.logprobs is None and not self._wants_ids:
            return [(None, self._template(answer.index).filled(answer.text[at:]))]
        untold = self._untold(answer) if self.request.params.logprobs is not None else None
        return [(None, self._data(answer.index, answer.text[at:], None, untold, self._ids(answer)))]

    def end(self, answer: Answer) -> list[Frame]:
        if self.request.echo:
            whole = self._choice(answer)
            return [(None, self._envelope() | {"choices": [whole]})]
        left = self._untold(answer) if len(answer.logprobs) > self._told.get(answer.index, 0) else None
        return [(None, self._data(answer.index, "", _finish_reason(answer), left, self._ids(answer)))]

    def close(self, answers: Sequence[Answer], usage: Usage) -> list[Frame]:
        frames: list[Frame] = []
        if self.request.include_usage:
            frames.append((None, self._envelope() | {"choices": [], "usage": self._usage(usage)}))
        return [*frames, (None, "[DONE]")]

    def fail(self, error: RequestError) -> list[Frame]:
        return [(None, error_payload(error))]

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Json:
        return self._envelope() | {"choices": [self._choice(a) for a in answers], "usage": self._usage(usage)}

    def _usage(self, usage: Usage) -> Json:
        """The token that an echo alone counts on is in no reply."""
        return usage_payload(replace(usage, completion_tokens=0) if self.request.raw.get("only_echo") else usage)

    def _choice(self, answer: Answer) -> Json:
        only_echo = self.request.raw.get("only_echo")
        text = "" if only_echo else answer.text
        wants_logprobs = self.request.params.logprobs is not None
        entries: list[tuple[int, TokenLogprob | None]] = [] if only_echo else [(t.token_id, t) for t in answer.logprobs]
        if self.request.echo:
            text = self._tokenizer.decode(list(answer.prompt)) + text
        if self.request.echo and wants_logprobs:
            entries = [*zip(answer.prompt, [None, *answer.prompt_logprobs[1:]], strict=True), *entries]
        said = self._logprobs(answer.index, entries) if wants_logprobs else None
        reason = "length" if only_echo else _finish_reason(answer)
        choice = {"index": answer.index, "text": text, "logprobs": said, "finish_reason": reason}
        return choice | self._ids(answer)

    @property
    def _wants_ids(self) -> bool:
        return bool(self.request.raw.get("wants_ids"))

    def _ids(self, answer: Answer) -> Json:
        """The token ids that were not given yet; at first the prompt's too."""
        if not self._wants_ids:
            return {}
        given, self._given[answer.index] = self._given.get(answer.index), len(answer.tokens)
        prompt = {"prompt_token_ids": list(answer.prompt)} if given is None else {}
        only_echo = self.request.raw.get("only_echo")
        return prompt | {"token_ids": [] if only_echo else answer.tokens[given or len(answer.prompt) :]}

    def _untold(self, answer: Answer) -> Json:
        at, self._told[answer.index] = self._told.get(answer.index, 0), len(answer.logprobs)
        return self._logprobs(answer.index, [(t.token_id, t) for t in answer.logprobs[at:]])

    def _logprobs(self, index: int, entries: Sequence[tuple[int, TokenLogprob | None]]) -> Json:
        """Four lists of equal length. The first token of a prompt has no probability. A token that is a part of a
        character is where the character is."""
        offsets, characters = [], self._characters[index]
        for token, _ in entries:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(characters.decode(self._tokenizer.to_bytes(token)))
        return {
            "tokens": [self._name(token) for token, _ in entries],
            "token_logprobs": [None if t is None else t.logprob for _, t in entries],
            "top_logprobs": [None if t is None else self._top(t) for _, t in entries],
            "text_offset": offsets,
        }

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """The likeliest alternatives and the token itself. Where two tokens read the same, the likelier stands."""
        out: dict[str, float] = {}
        for i, p in [*token.top.items(), (token.token_id, token.logprob)]:
            out.setdefault(self._name(i), p)
        return out

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.request.raw.get("names_ids") else self._tokenizer.piece(token)

    def _data(self, index: int, text: str, reason: str | None, logprobs: Json | None, ids: Json | None = None) -> Json:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._envelope() | {"choices": [choice | (ids or {})]}

    def _envelope(self) -> Json:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}


def _finish_reason(answer: Answer) -> str:
    return "length" if answer.reason == "context" else answer.reason
