"""From logits to a token: penalties, truncation, and draws that depend on the seed and the position alone.

Logits are float32 or float64 [W] as the model gives them; everything after them is float64. A draw is a pure function
of the distribution, the seed and the position, so a sampled reply does not depend on what else is in the batch, nor on
whether tokens were drafted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm52.engine.params import SamplingParams

Array = NDArray[np.floating[Any]]
_LIKELY = 256  # tokens that mostly have nearly all of the probability
_GAMMA, _MIX, _MORE = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def likeliest(x_W: Array, count: int) -> NDArray[np.int64]:
    """Ids of the ``count`` largest values, the largest first; of equal ones the lowest id."""
    if not count:  # as for the log probability of the token alone: nothing is sorted
        return np.empty(0, dtype=np.int64)
    ids = np.flatnonzero(x_W >= np.partition(x_W, -count)[-count]) if count < len(x_W) else np.arange(len(x_W))
    return ids[np.argsort(-x_W[ids], kind="stable")][:count]


def processed(logits_W: Array, params: SamplingParams, tokens: Sequence[int], prompt_length: int) -> Array:
    """Logits after bias and penalties. tokens: all before this one, the prompt first."""
    if not params.is_shifted:
        return logits_W
    x = logits_W.astype(np.float64)
    ids, values = params.biases
    x[ids] += values
    if params.repetition_penalty != 1.0:
        seen = np.fromiter(set(tokens), dtype=np.int64)
        x[seen] = np.where(x[seen] > 0, x[seen] / params.repetition_penalty, x[seen] * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        said, counts = np.unique(np.array(tokens[prompt_length:], dtype=np.int64), return_counts=True)
        x[said] -= params.presence_penalty + params.frequency_penalty * counts
    return x


def distribution(logits_W: Array, params: SamplingParams) -> Array:
    """Probabilities after temperature, top_k, top_p and min_p, in this order. Ties at a cut keep the lowest ids."""
    x = logits_W.astype(np.float64) - logits_W.max()
    with np.errstate(over="ignore"):  # next to nothing is what a tiny temperature leaves of all but the likeliest
        p = np.exp(x / params.temperature)
    p /= p.sum()
    if params.top_k or params.top_p < 1.0:
        kept = _nucleus(p, params)
        p, all_p = np.zeros_like(p), p
        p[kept] = all_p[kept]
    if params.min_p:
        p[p < params.min_p * p.max()] = 0.0
    out: Array = p / p.sum()
    return out


def _nucleus(p_W: Array, params: SamplingParams) -> NDArray[np.int64]:
    """The likeliest ``top_k`` tokens, and of these the fewest that have ``top_p`` of their probability, or one. Without
    top_k few tokens are looked at first: sorting a whole vocabulary takes longer than a step of a small model."""
    if params.top_p == 1.0:
        return likeliest(p_W, params.top_k)
    count = params.top_k or _LIKELY
    while True:
        ids = likeliest(p_W, count)
        p = p_W[ids]
        kept = np.cumsum(p) - p < params.top_p * (p.sum() if params.top_k else 1.0)
        kept[0] = True
        if params.top_k or not kept[-1] or len(ids) == len(p_W):
            return ids[kept]
        count *= 16


def draw(p_W: Array, seed: int, position: int) -> int:
    """A token of the distribution: the first event of a race in which every token has its own exponential clock.

    Each token's clock runs by a number of its own for (seed, position). So two distributions that are alike draw the
    same token more often than not: with probability (1 - d) / (1 + d) at least where d is their total variation. That
    is what makes a draft right that was drawn likewise. Source: Daliri et al., 2408.07978.
    """
    ids = np.flatnonzero(p_W)
    with np.errstate(over="ignore"):  # what has next to no probability never comes
        return int(ids[np.argmin(_exponentials(seed, position, ids) / p_W[ids])])


def _exponentials(seed: int, position: int, ids: NDArray[np.int64]) -> Array:
    """Independent draws of Exp(1), one for each id: the stream of splitmix64 from a state for (seed, position)."""
    state = np.random.Philox(key=np.array([seed & (2**64 - 1), position], dtype=np.uint64)).random_raw()
    z = np.uint64(state) + (ids.astype(np.uint64) + np.uint64(1)) * _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MIX
    z = (z ^ (z >> np.uint64(27))) * _MORE
    z ^= z >> np.uint64(31)
    out: Array = -np.log(((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
    return out


def log_probabilities(logits_W: Array) -> Array:
    """Natural logarithms of the model's own probabilities, before temperature and truncation."""
    x = logits_W.astype(np.float64) - logits_W.max()
    out: Array = x - np.log(np.exp(x).sum())
    return out
