"""Grammars compiled over one vocabulary, and where one reply stands in its grammar: which tokens may follow.

The parsing is llguidance's. Compiling takes milliseconds and is remembered; a matcher of its own costs a copy. What
nothing can match, and what outgrows llguidance's limits at once, is refused before a reply begins.
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
_DEAD_END = "nothing can match"
# Where one text alone may follow, llguidance would ask its tokenizer how it is spelled. Where the text spells a marker,
# the answer is a special token, which is no text; and all of the text is read again at each token.
_OPTIONS = '%llguidance {"no_forcing": true}'


class Matchers:
    """Makes matchers. vocab_size: of the logits. Safe to call from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos)
        self._vocabulary = lru_cache(maxsize=1)(self._build_vocabulary)
        self.compile = lru_cache(maxsize=_REMEMBERED)(self._compile)

    def new(self, grammar: Grammar) -> "Matcher":
        """A matcher at the beginning of its grammar. RequestError names what is wrong with the grammar."""
        return Matcher(self.compile(grammar), self._vocab_size)

    def _compile(self, grammar: Grammar) -> "LLMatcher":
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary(), f"{grammar.source}\n{_OPTIONS}", log_level=0)
        probe = Matcher(matcher, self._vocab_size)
        probe.allowed()
        if probe.error is not None:
            raise RequestError(f"{grammar.param}: {probe.error[:2000]}", param=grammar.param)
        return matcher

    def _build_vocabulary(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        return LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos)


class Matcher:
    """One reply inside its grammar. ``follow`` moves it on, ``rollback`` back again. start: copied, left as it is."""

    def __init__(self, start: "LLMatcher", vocab_size: int) -> None:
        self._start, self._backend, self._vocab_size = start, start.deep_copy(), vocab_size
        self._bits = np.zeros((vocab_size + 31) // 32, dtype=np.int32)
        self._is_dead_end = False
        self._tokens: list[int] = []

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def error(self) -> str | None:
        """Why the grammar could not be followed any further: it outgrew a limit of llguidance, or no token fits."""
        if self._backend.is_error():
            reason = str(self._backend.get_error()).partition("\n<state>")[0]
            return _DEAD_END if reason == "NoExtensionBias" else reason
        return _DEAD_END if self._is_dead_end else None

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

    def admits(self, token: int) -> bool:
        """Whether the token may come next."""
        return bool(self._backend.is_stopped() or self._backend.validate_tokens([token]))

    def follow(self, token: int) -> None:
        self._is_dead_end = False
        if not self._backend.is_stopped() and self._backend.consume_token(token):
            self._tokens.append(token)

    def rollback(self, num_tokens: int) -> None:
        """Back to where it was after that many tokens, also from an error, which llguidance itself does not leave."""
        self._is_dead_end = False
        count, self._tokens = self.num_tokens - num_tokens, self._tokens[:num_tokens]
        if self._backend.is_error():
            self._backend = self._start.deep_copy()
            self._backend.consume_tokens(self._tokens)
        elif count:
            self._backend.rollback(count)
