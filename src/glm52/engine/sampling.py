"""From logits to a token: penalties, truncation, and draws that depend on the seed and the position alone.

Logits are float32 or float64 [W] as the model gives them; everything after them is float64. A draw
is a pure function of (seed, position, purpose), so a sampled reply does not depend on what else is in the batch.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glm52.engine.params import SamplingParams

Array = NDArray[np.floating[Any]]
_PURPOSES = {"token": 0, "draft": 1, "accept": 2, "residual": 3}


def uniform(seed: int, position: int, purpose: Literal["token", "draft", "accept", "residual"]) -> float:
    """A number in [0, 1) for one decision at one position."""
    key = np.array([seed & (2**64 - 1), (position << 2) | _PURPOSES[purpose]], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def processed(logits_W: Array, params: SamplingParams, tokens: Sequence[int], prompt_length: int) -> Array:
    """Logits after bias and penalties. tokens: all before this one, the prompt first."""
    if not params.is_shifted:
        return logits_W
    x = logits_W.astype(np.float64)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if params.repetition_penalty != 1.0:
        seen = np.fromiter(set(tokens), dtype=np.int64)
        x[seen] = np.where(x[seen] > 0, x[seen] / params.repetition_penalty, x[seen] * params.repetition_penalty)
    for token, count in Counter(tokens[prompt_length:]).items():
        x[token] -= params.presence_penalty + params.frequency_penalty * count
    return x


def distribution(logits_W: Array, params: SamplingParams) -> Array:
    """Probabilities after temperature, top_k, top_p and min_p, in this order. Ties at a cut keep the lowest ids."""
    x = logits_W.astype(np.float64) - logits_W.max()
    with np.errstate(over="ignore"):  # next to nothing is what a tiny temperature leaves of all but the likeliest
        p = np.exp(x / params.temperature)
    p /= p.sum()
    if params.top_k or params.top_p < 1.0:
        order = np.argsort(-p, kind="stable")
        sorted_p = p[order]
        kept = np.ones(len(p), dtype=bool)
        if params.top_k:
            kept[params.top_k :] = False
        if params.top_p < 1.0:
            total = sorted_p[kept].sum()
            kept &= np.cumsum(sorted_p) - sorted_p < params.top_p * total
            kept[0] = True
        p[order[~kept]] = 0.0
    if params.min_p:
        p[p < params.min_p * p.max()] = 0.0
    out: Array = p / p.sum()
    return out


def pick(p_W: Array, u: float) -> int:
    """The token at quantile u of a distribution."""
    cumulative = np.cumsum(p_W)
    return int(min(np.searchsorted(cumulative, u * cumulative[-1], side="right"), np.flatnonzero(p_W)[-1]))


def residual(p_W: Array, q_W: Array) -> Array:
    """What to draw from after a draft from q was rejected under p: the normalised positive part of p - q."""
    r = np.maximum(p_W - q_W, 0.0)
    out: Array = r / r.sum() if r.sum() > 0 else p_W
    return out


def log_probabilities(logits_W: Array) -> Array:
    """Natural logarithms of the model's own probabilities, before temperature and truncation."""
    x = logits_W.astype(np.float64) - logits_W.max()
    out: Array = x - np.log(np.exp(x).sum())
    return out
