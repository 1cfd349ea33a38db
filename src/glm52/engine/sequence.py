"""One request inside the engine: its tokens, its rows, its drafts, and the text it has become."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from glm52.engine.guide import Closed, Guide
from glm52.engine.params import SamplingParams
from glm52.errors import ContextOverflow, RequestError
from glm52.tokenizer import Detokenizer

FinishReason = Literal["stop", "length", "abort", "error", "repetition", "grammar"]


def check_prompt(tokens: Collection[int], *, context_length: int, vocab_size: int, field: str = "prompt") -> None:
    """RequestError if no such model can take it. field: where it was given."""
    if not tokens:
        raise RequestError(f"{field}: expected at least one token, found none", param=field)
    if len(tokens) >= context_length:
        raise ContextOverflow(len(tokens), context_length, field)
    check_vocabulary(tokens, vocab_size, field)


def check_vocabulary(tokens: Collection[int], vocab_size: int, field: str) -> None:
    """RequestError unless all tokens are of the vocabulary."""
    ends = min(tokens, default=0), max(tokens, default=0)
    bad = next((t for t in ends if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise RequestError(f"{field}: token {bad} is outside the vocabulary of {vocab_size}", param=field)


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of the token chosen, and of the likeliest alternatives."""

    token_id: int
    logprob: float
    top: Mapping[int, float]


@dataclass(kw_only=True)
class Event:
    """What one step brought a sequence. text is what the new tokens made certain; the last event has finish_reason."""

    seq: "Sequence"
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None

    def extend(self, later: "Event") -> None:
        """Make the next event of the same sequence a part of this one."""
        self.token_ids += later.token_ids
        self.text += later.text
        self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason


@dataclass(eq=False, kw_only=True)
class Sequence:
    """State of one request. num_cached: leading tokens whose rows are in the pool. num_cached_tokens: prompt
    tokens that a shared prefix saved. has_begun: whether it was ever admitted. page_names: what its full pages are
    called on disk, as far as they were needed. drafts: proposed continuations. stop_string: the one that ended the
    reply. prompt_logprobs: if asked for, one for each prompt token that is computed; the first has none."""

    id: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    tokens: list[int]
    detokenizer: Detokenizer | None = None
    guide: Guide = field(default_factory=Guide)
    pages: list[int] = field(default_factory=list)
    page_names: list[str] = field(default_factory=list)
    num_cached: int = 0
    num_cached_tokens: int = 0
    has_begun: bool = False
    drafts: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    held_text: str = ""
    stop_string: str | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def thinking_closed(self) -> Closed | None:
        """How the thinking budget ended the reasoning: at a sentence's end, by force, or (None) not at all."""
        return self.guide.thinking_closed

    @property
    def num_reasoning(self) -> int:
        """Reasoning tokens of the reply."""
        return self.guide.num_reasoning

    @property
    def is_scored(self) -> bool:
        """Whether nothing of the prompt is left to score, and so its rows may be found instead of computed."""
        return self.params.prompt_logprobs is None or len(self.prompt_logprobs) == len(self.prompt)

    @property
    def num_uncached(self) -> int:
        return len(self.tokens) - self.num_cached

    def append(self, token: int, eos: frozenset[int]) -> str | None:
        """Take a sampled token -> the text it made certain, or None if the token itself ended the reply unseen."""
        params = self.params
        if token in params.stop_token_ids or (token in eos and not params.ignore_eos):
            self.finish_reason = "stop"
            return None
        self.tokens.append(token)
        text = self._visible_text([token])
        self.guide.follow(token)
        if self.finish_reason is None:
            self.finish_reason = self._ended()
        return text

    def _ended(self) -> FinishReason | None:
        """Why the reply is over with its last token, if it is."""
        if self.guide.error is not None:
            return "grammar"
        if self.guide.is_complete and not self.params.ignore_eos:
            return "stop"
        if self.guide.is_stuck(self.tokens):
            return "repetition"
        return "length" if len(self.tokens) - len(self.prompt) >= self.max_tokens else None

    def close_text(self) -> str:
        """The text held back, once the reply has ended for another reason than a stop string."""
        rest = self.held_text + (self.detokenizer.close() if self.detokenizer else "")
        self.held_text = ""
        return rest

    def _visible_text(self, tokens: list[int]) -> str:
        """New text up to a stop string; what could be the beginning of one is held back. Thinking is not searched: it
        must not cost the answer."""
        if self.detokenizer is None:
            return ""
        text = self.held_text + self.detokenizer.feed(tokens)
        if self.guide.is_reasoning or not self.params.stop:
            return text
        at, self.stop_string = min(((text.find(s), s) for s in self.params.stop if s in text), default=(None, None))
        if at is not None:
            self.finish_reason, self.held_text = "stop", ""
            self.detokenizer = None
            return text[:at]
        longest = len(text) + 1
        hold = max(
            (n for s in self.params.stop for n in range(1, min(len(s), longest)) if text.endswith(s[:n])), default=0
        )
        self.held_text = text[len(text) - hold :]
        return text[: len(text) - hold]
