"""Grammars compiled over one vocabulary, and where one reply stands in its grammar: which tokens may follow.

The parsing is llguidance's. Compiling takes milliseconds and is remembered; a matcher of its own costs a copy.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from glm52.errors import RequestError
from glm52.grammar import Grammar
from glm52.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_REMEMBERED = 64


class Matchers:
    """Makes matchers. vocab_size: of the logits. Safe to call from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos)
        self._vocabulary = lru_cache(maxsize=1)(self._build_vocabulary)
        self.compile = lru_cache(maxsize=_REMEMBERED)(self._compile)

    def new(self, grammar: Grammar) -> "Matcher":
        """A matcher at the beginning of its grammar. RequestError names what is wrong with the grammar."""
        return Matcher(self.compile(grammar).deep_copy(), self._vocab_size)

    def _compile(self, grammar: Grammar) -> "LLMatcher":
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary(), grammar.source, log_level=0)
        if matcher.is_error():
            raise RequestError(f"{grammar.param}: {matcher.get_error()[:2000]}", param=grammar.param)
        return matcher

    def _build_vocabulary(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        return LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos)


class Matcher:
    """One reply inside its grammar. ``follow`` moves it on, ``rollback`` back again."""

    def __init__(self, backend: "LLMatcher", vocab_size: int) -> None:
        self._backend, self._vocab_size = backend, vocab_size
        self._bits = np.zeros((vocab_size + 31) // 32, dtype=np.int32)
        self._is_dead_end = False
        self.num_tokens = 0

    @property
    def error(self) -> str | None:
        """Why the grammar could not be followed any further: it outgrew a limit of llguidance, or no token fits."""
        if self._backend.is_error():
            return str(self._backend.get_error())
        return "no token of this vocabulary can follow" if self._is_dead_end else None

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end of the reply may follow."""
        return bool(self._backend.is_stopped())

    def allowed(self) -> NDArray[np.bool_] | None:
        """Which tokens may come next; None: the grammar has ended and says nothing more."""
        if self._backend.is_stopped():
            return None
        self._backend.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        self._is_dead_end = not bits.any()
        return None if self.error else bits.view(np.bool_)

    def follow(self, token: int) -> None:
        if not self._backend.is_stopped() and self._backend.consume_token(token):
            self.num_tokens += 1

    def rollback(self, num_tokens: int) -> None:
        """Back to where it was after that many tokens."""
        if num_tokens < self.num_tokens:
            self._backend.rollback(self.num_tokens - num_tokens)
            self.num_tokens = num_tokens
