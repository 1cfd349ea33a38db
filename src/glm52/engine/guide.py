"""What a reply must do whatever the model prefers: end its thinking in time, follow a grammar after it, not go round in
circles. Between the model's logits and the choice of a token.

A guide's state is a function of the tokens that stand. Drafts move it on while they are proposed and are taken back at
once, so verifying sees, position by position, the same state that it would see without drafts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glm52.engine.matcher import Matcher
from glm52.engine.params import Repetition, SamplingParams
from glm52.engine.sampling import Array
from glm52.tokenizer import Tokenizer

Closed = Literal["soft", "hard"]
MARGIN = 24  # reasoning tokens between soft and hard: room to end a sentence
RESERVE = 1024  # tokens of max_tokens kept for the answer, or a quarter of them if that is less
LOOK_EVERY = 64  # tokens between two looks for a loop


@dataclass(frozen=True)
class Limits:
    """Reasoning tokens after which thinking is closed: from ``soft`` at the end of a sentence or a line, at ``hard``
    anywhere.

        reasoning ........ soft .... hard </think> answer ........... max_tokens
                             |margin |             |    reserve      |
    """

    soft: int
    hard: int

    @staticmethod
    def of(budget: int, max_tokens: int) -> "Limits":
        """hard <= budget + MARGIN, and the reserve is free after the token that closes. budget 0 closes at once."""
        room = max(0, max_tokens - 1 - max(1, min(RESERVE, max_tokens // 4)))
        hard = min(budget + min(MARGIN, budget), room)
        return Limits(min(budget, hard - min(MARGIN, hard // 2)), hard)

    def closes(self, num_reasoning: int, *, at_end: bool) -> Closed | None:
        """Whether thinking must end here. at_end: the last token ended a sentence or a line."""
        if num_reasoning >= self.hard:
            return "hard"
        return "soft" if num_reasoning >= self.soft and at_end else None


class Marks:
    """The tokens between which a model thinks, and those between which it calls."""

    def __init__(self, tokenizer: Tokenizer, think: int, end_think: int) -> None:
        self.think, self.end_think = think, end_think
        self._call, self._end_call = tokenizer.id("<tool_call>"), tokenizer.id("</tool_call>")
        self.ends_sentence = cache(lambda token: _ends_sentence(tokenizer.piece(token)))

    @staticmethod
    def of(tokenizer: Tokenizer | None) -> "Marks | None":
        """None: this vocabulary has no such tokens."""
        if tokenizer is None:
            return None
        think, end_think = tokenizer.id("<think>"), tokenizer.id("</think>")
        return None if think is None or end_think is None else Marks(tokenizer, think, end_think)

    def is_open(self, prompt: Sequence[int]) -> bool:
        """Whether the last mark of a prompt opens the thinking that the reply goes on with."""
        return next((t == self.think for t in reversed(prompt) if t in (self.think, self.end_think)), False)

    def is_in_call(self, tokens: Sequence[int], at_least: int) -> bool:
        """Whether the last so many tokens, or more, are the inside of one call."""
        both = (self._call, self._end_call)
        since = next((n for n, t in enumerate(reversed(tokens)) if t in both), None)
        return since is not None and since >= at_least and tokens[-1 - since] == self._call


def _ends_sentence(text: str) -> bool:
    return "\n" in text or text.rstrip().endswith((".", "!", "?", "…", "。", "！", "？"))


def is_loop(tokens: Sequence[int], limits: Repetition) -> bool:
    """Whether the last tokens repeat one period, exactly and often enough: see ``Repetition``."""
    tail = np.array(tokens[-limits.longest :])
    for p in 1 + np.flatnonzero(tail[-limits.max_period - 1 : -1][::-1] == tail[-1:]):
        length = max(limits.min_tokens, limits.min_repeats * int(p))
        if length <= len(tail) and bool((tail[-length + p :] == tail[-length:-p]).all()):
            return True
    return False


@dataclass
class _State:
    """is_fresh: thinking was closed by force just now and nothing is said yet."""

    is_reasoning: bool
    num_reasoning: int = 0
    closed: Closed | None = None
    is_fresh: bool = False
    at_end: bool = False
    num_matched: int = 0


class Guide:
    """One reply; without arguments, one that nothing is demanded of. marks and prompt tell whether it begins inside its
    thinking; the grammar is armed after that."""

    def __init__(
        self, params: SamplingParams | None = None, prompt: Sequence[int] = (), max_tokens: int = 1,
        eos: frozenset[int] = frozenset(), marks: Marks | None = None, matcher: Matcher | None = None,
    ) -> None:  # fmt: skip
        params = params or SamplingParams()
        self._marks, self._matcher = marks, matcher
        self._eos = np.array(sorted(eos), dtype=np.int64)
        budget = params.thinking_budget
        self._limits = None if budget is None else Limits.of(budget, max_tokens)
        self._repetition, self._loop_from = params.repetition, len(prompt)
        self._begins, self._has_form = len(prompt), params.grammar is not None and not params.grammar.has_text
        self._state = _State(is_reasoning=marks is not None and marks.is_open(prompt))

    @property
    def thinking_closed(self) -> Closed | None:
        """How the budget ended the thinking; None: it did not."""
        return self._state.closed

    @property
    def is_reasoning(self) -> bool:
        return self._state.is_reasoning

    @property
    def must_close(self) -> bool:
        """Whether nothing but </think> may come next."""
        return self.is_reasoning and self._closes() is not None

    @property
    def is_bound(self) -> bool:
        """Whether it thinks and the reply cannot end before its thinking: a budget or a grammar waits for that."""
        return self.is_reasoning and (self._limits is not None or self._matcher is not None)

    @property
    def num_reasoning(self) -> int:
        return self._state.num_reasoning

    @property
    def is_complete(self) -> bool:
        """Whether the grammar lets nothing follow but the end."""
        return self._matcher is not None and not self._state.is_reasoning and self._matcher.is_complete

    @property
    def error(self) -> str | None:
        return self._matcher.error if self._matcher else None

    def is_free(self, ahead: int) -> bool:
        """Whether any token may come next and the ``ahead`` tokens after it, as far as can be told."""
        state = self._state
        if self._matcher is not None or state.is_fresh:
            return False
        return not state.is_reasoning or self._limits is None or state.num_reasoning + ahead < self._limits.soft

    def shape(self, logits_W: Array) -> Array:
        """The logits as they may be chosen from: what is forbidden here is -inf. The argument is left as it is."""
        if self.is_reasoning:
            return self._shape_reasoning(logits_W)
        allowed = self.allowed(len(logits_W))
        return logits_W if allowed is None else np.where(allowed, logits_W, logits_W.dtype.type(-np.inf))

    def allowed(self, vocab_size: int) -> NDArray[np.bool_] | None:
        """Which tokens may come next in an answer; None: any, or (then there is an ``error``) none."""
        allowed = self._matcher.allowed() if self._matcher else None
        return self._without_silence(allowed, vocab_size) if self._state.is_fresh else allowed

    def admits(self, token: int, vocab_size: int) -> bool:
        """Whether the token may come next: as ``shape`` has it, but far cheaper than all that may."""
        if self.is_reasoning:
            assert self._marks is not None
            return token == self._marks.end_think if self.must_close else not (self.is_bound and token in self._eos)
        if self._state.is_fresh:
            allowed = self.allowed(vocab_size)
            return allowed is None or bool(allowed[token])
        return self._matcher is None or self._matcher.admits(token)

    def follow(self, token: int) -> None:
        """One more token stands, or is drafted."""
        state, marks = self._state, self._marks
        state.is_fresh = False
        if not state.is_reasoning:
            if self._matcher is not None:
                self._matcher.follow(token)
                state.num_matched = self._matcher.num_tokens
            return
        assert marks is not None
        if token == marks.end_think:
            state.closed = self._closes()
            state.is_reasoning, state.is_fresh = False, state.closed is not None
        else:
            state.num_reasoning += 1
            state.at_end = marks.ends_sentence(token)

    def mark(self) -> _State:
        """The state now, for ``reset``."""
        return _State(**vars(self._state))

    def reset(self, mark: _State) -> None:
        """Back to a mark: the drafts since then never were."""
        self._state = mark
        if self._matcher is not None:
            self._matcher.rollback(mark.num_matched)

    def is_stuck(self, tokens: Sequence[int]) -> bool:
        """Whether the reply goes round in circles and must end. Thinking that does, under a budget, is closed instead.

        tokens: prompt and reply. Looked at now and then: where depends on the number of tokens alone.
        """
        if self._repetition is None or (len(tokens) - self._loop_from) % LOOK_EVERY:
            return False
        limits = self._repetition if self._state.is_reasoning else self._repetition.in_answers
        if not self._is_loop(tokens, limits):
            return False
        if not self._state.is_reasoning and self._is_data(tokens):
            return self._is_loop(tokens, self._repetition.in_data)
        if self._state.is_reasoning and self._limits is not None:
            self._limits, self._loop_from = Limits(0, 0), len(tokens)
            return False
        return True

    def _is_loop(self, tokens: Sequence[int], limits: Repetition) -> bool:
        return is_loop(tokens[max(self._loop_from, len(tokens) - limits.longest) :], limits)

    def _is_data(self, tokens: Sequence[int]) -> bool:
        """Whether what is repeated is a part of one argument, or of an answer of a given form; not calls themselves."""
        if self._has_form:
            return True
        assert self._repetition is not None
        return self._marks is not None and self._marks.is_in_call(tokens[self._begins :], self._repetition.max_period)

    def _closes(self) -> Closed | None:
        if self._limits is None:
            return None
        return self._limits.closes(self._state.num_reasoning, at_end=self._state.at_end)

    def _shape_reasoning(self, logits_W: Array) -> Array:
        """Thinking ends by </think> alone: where the budget says so, and where the model would end its reply."""
        if (self._limits is None and self._matcher is None) or self._marks is None:
            return logits_W
        end = self._marks.end_think
        if self._closes():
            out = np.full_like(logits_W, -np.inf)
            out[end] = 0
            return out
        out = logits_W.copy()
        out[end] = max(out[end], out[self._eos].max(initial=-np.inf))
        out[self._eos] = -np.inf
        return out

    def _without_silence(self, allowed: NDArray[np.bool_] | None, size: int) -> NDArray[np.bool_] | None:
        """After thinking that was cut short something is said, unless the grammar has it otherwise."""
        assert self._marks is not None
        some = np.ones(size, dtype=np.bool_) if allowed is None else allowed.copy()
        some[self._eos] = False
        some[[self._marks.think, self._marks.end_think]] = False
        return some if some.any() else allowed
