"""How a reply is sampled and when it ends."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from glm52.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """temperature 0 is greedy. Penalties as in the OpenAI API; repetition_penalty as in transformers. logprobs: how
    many alternatives to report with each token (None: not even its own); prompt_logprobs: the same for the prompt, which
    is then computed whole. seed: None draws one."""

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

    def __post_init__(self) -> None:
        """RequestError names the first field that is out of its range."""
        ranges = {
            "max_tokens": (1, math.inf), "temperature": (0.0, 2.0), "top_p": (0.0, 1.0), "top_k": (0, math.inf),
            "min_p": (0.0, 1.0), "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
            "repetition_penalty": (1e-6, math.inf), "logprobs": (0, 20), "prompt_logprobs": (0, 20),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RequestError(f"{name}: expected a value from {low:g} to {high:g}, found {value}", param=name)
        if any(not s for s in self.stop):
            raise RequestError("stop: expected non-empty strings, found an empty one", param="stop")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0
