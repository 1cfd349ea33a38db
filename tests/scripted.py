"""Models without weights, for the engine: what they say is a function of the last token and its position."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm52.cache import Spans
from glm52.config import GLMConfig
from glm52.engine import Engine
from glm52.hub import NANO
from glm52.model import GLM
from glm52.tokenizer import Tokenizer
from tests.fixtures import tiny_config

TOKENIZER = Tokenizer.read(NANO)
EOS = (4060, 4067, 4069)
THINK, END_THINK = TOKENIZER.id("<think>"), TOKENIZER.id("</think>")

Say = Callable[[int, int], np.ndarray]  # (last token, its position) -> logits [W] of the token that follows


class ScriptedModel:
    """say: the logits. accuracy: how often a draft has the true logits instead of others."""

    def __init__(self, say: Say, accuracy: float = 0.7, length: int = 8192) -> None:
        self.config: GLMConfig = tiny_config(vocab_size=4096, eos_token_id=EOS, max_position_embeddings=length)
        self.index_topk, self.mtp = 6, True
        self._say, self._accuracy = say, accuracy

    def new_cache(self, num_rows: int) -> None:
        return None

    def __call__(self, tokens_T: Tensor, spans: Spans, cache: Any) -> Tensor:
        return torch.stack((tokens_T, spans.positions_T, torch.zeros_like(tokens_T)), 1)

    def extend(self, h_TD: Tensor, tokens_T: Tensor, spans: Spans, cache: Any, last_S: Tensor) -> tuple[Tensor, Any]:
        return self.draft(h_TD, tokens_T, spans.positions_T, cache, None)[last_S], None

    def draft(self, z_SD: Tensor, tokens_S: Tensor, positions_S: Tensor, cache: Any, selection: Any) -> Tensor:
        return torch.stack((tokens_S, positions_S + 1, torch.ones_like(tokens_S)), 1)

    propose = GLM.propose

    def logits(self, h_TD: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([self._row(*map(int, row)) for row in h_TD]))

    def _row(self, token: int, position: int, is_draft: int) -> np.ndarray:
        wrong = is_draft and np.random.default_rng((token, position)).random() > self._accuracy
        return self._say((token + 1) % 4096 if wrong else token, position)

    def engine(self, num_drafts: int = 0, **kwargs: Any) -> Engine:
        return Engine(
            self, num_rows=kwargs.pop("num_rows", 16_384), num_drafts=num_drafts, tokenizer=TOKENIZER, **kwargs
        )


def random_logits(seed: int, favour: Mapping[str, float] | None = None) -> Say:
    """Normal logits; favour: what to add to the tokens of some texts, so that what begins also ends."""
    bonus = np.zeros(4096)
    for text, amount in (favour or {}).items():
        bonus[TOKENIZER.encode(text)] += amount

    def say(token: int, position: int) -> np.ndarray:
        return 2 * np.random.default_rng((seed, token, position)).standard_normal(4096) + bonus

    return say


def always(text: str) -> Say:
    """Says a text for ever, however it began."""
    ids = TOKENIZER.encode(text)

    def say(token: int, position: int) -> np.ndarray:
        out = np.zeros(4096)
        out[ids[position % len(ids)]] = 20.0
        return out

    return say
