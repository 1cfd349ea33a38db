"""How a reply is sampled and when it ends."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from glm52.errors import RequestError
from glm52.grammar import Grammar


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """When thinking goes round in circles: its end is one period of at most ``max_period`` tokens, exactly repeated at
    least ``min_repeats`` times and for at least ``min_tokens`` tokens. An answer may repeat itself four times as often
    and as long: a matrix of zeros can be what was asked for. Data, an argument of a call or an answer of a given form,
    may do so four times more: a file of two thousand equal rows is written by a call."""

    min_tokens: int = 1024
    min_repeats: int = 8
    max_period: int = 256

    @property
    def longest(self) -> int:
        """Tokens that decide."""
        return max(self.min_tokens, self.min_repeats * self.max_period)

    @cached_property
    def in_answers(self) -> "Repetition":
        return replace(self, min_tokens=4 * self.min_tokens, min_repeats=4 * self.min_repeats)

    @cached_property
    def in_data(self) -> "Repetition":
        return self.in_answers.in_answers

    def __post_init__(self) -> None:
        if min(self.min_tokens, self.max_period) < 1 or self.min_repeats < 2:
            raise RequestError("repetition: expected min_tokens and max_period of at least 1 and min_repeats of at "
                               f"least 2, found {self}", param="repetition")  # fmt: skip


_MOST_STOPS, _LONGEST_STOP = 64, 1024  # they are looked for after every token
_WHOLE = ("max_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "thinking_budget")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """temperature 0 is greedy. Penalties as in the OpenAI API; repetition_penalty as in transformers. logprobs: how
    many alternatives to report with each token (None: not even its own). prompt_logprobs: the same for the prompt,
    which is then computed whole. seed: None draws one. thinking_budget: reasoning tokens after which thinking is closed
    (None: never). grammar: what must follow the reasoning. repetition: when a loop ends the reply (None: never)."""

    max_tokens: int = 1 << 30
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    thinking_budget: int | None = None
    grammar: Grammar | None = None
    repetition: Repetition | None = None

    def __post_init__(self) -> None:
        """RequestError names the first field that is out of its range."""
        ranges = {
            "max_tokens": (1, math.inf), "temperature": (0.0, 2.0), "top_p": (0.0, 1.0), "top_k": (0, math.inf),
            "min_p": (0.0, 1.0), "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
            "repetition_penalty": (1e-6, 1e6), "logprobs": (0, 20), "prompt_logprobs": (0, 20),
            "thinking_budget": (0, math.inf),
        }  # fmt: skip
        for name in _WHOLE:
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise RequestError(f"{name}: expected a whole number, found {value!r}", param=name)
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RequestError(f"{name}: expected a value from {low:g} to {high:g}, found {value}", param=name)
        far = next((b for b in self.logit_bias.values() if not -100 <= b <= 100), None)
        if far is not None:
            raise RequestError(f"logit_bias: expected values from -100 to 100, found {far:g}", param="logit_bias")
        if isinstance(self.stop, str) or len(self.stop) > _MOST_STOPS:
            raise RequestError(f"stop: expected at most {_MOST_STOPS} strings", param="stop")
        if not all(1 <= len(s) <= _LONGEST_STOP for s in self.stop):
            raise RequestError(f"stop: expected strings of 1 to {_LONGEST_STOP} characters", param="stop")

    @cached_property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @cached_property
    def biases(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Tokens and what is added to their logits."""
        return np.array(list(self.logit_bias), dtype=np.int64), np.array(list(self.logit_bias.values()), dtype=float)

    @cached_property
    def is_shifted(self) -> bool:
        """Whether a bias or a penalty changes the model's logits."""
        penalized = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(self.logit_bias or penalized)
