"""The latent cache: one flat pool of rows per layer, and ``Spans``, which says where each packed token sits in it.

Row ``r`` means the same token in every layer. Pages exist only as an allocation unit (see ``pages``): what attention
and the indexer exchange are row numbers. Without a cache the pool is the batch's own latents and row = packed index,
so training, evaluation and serving share one layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm52.config import GLMConfig


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Where each of T packed tokens sits.

    where_3T: int64, the position, row and sequence of each token. Sequences count from 0 and never decrease. tables_SP:
    int32 page numbers;
    sequence s at position p lives in row ``tables_SP[s, p // page_size] * page_size + p % page_size``. lengths_S: int64
    context length of each sequence including its tokens here; max_length is its maximum, known without a tensor read.
    window: if set, T is a multiple of it and no sequence crosses a multiple of it (the training layout).
    """

    where_3T: Tensor
    tables_SP: Tensor
    lengths_S: Tensor
    max_length: int
    page_size: int = 1
    window: int | None = None

    @staticmethod
    def of_documents(lengths: Sequence[int], window: int | None = None) -> "Spans":
        """Documents back to back without a cache: row = packed index, positions restart with each document."""
        lengths_S = torch.tensor(list(lengths), dtype=torch.int64)
        total, longest = int(lengths_S.sum()), int(lengths_S.max())
        start_S = lengths_S.cumsum(0) - lengths_S
        seq_T = torch.repeat_interleave(torch.arange(len(lengths_S)), lengths_S)
        row_T = torch.arange(total)
        return Spans(
            where_3T=torch.stack((row_T - start_S[seq_T], row_T, seq_T)),
            tables_SP=(start_S[:, None] + torch.arange(longest)).clamp(max=total - 1).to(torch.int32),
            lengths_S=lengths_S,
            max_length=longest,
            window=window,
        )

    @staticmethod
    def of_sequence(begin: int, end: int, page_size: int = 64) -> "Spans":
        """Tokens [begin, end) of one sequence over a cache, whose position p lives in row p."""
        positions = torch.arange(begin, end)
        return Spans(
            where_3T=torch.stack((positions, positions, torch.zeros_like(positions))),
            tables_SP=torch.arange(-(-end // page_size), dtype=torch.int32)[None], lengths_S=torch.tensor([end]),
            max_length=end, page_size=page_size,
        )  # fmt: skip

    @property
    def num_tokens(self) -> int:
        return self.where_3T.shape[1]

    @property
    def positions_T(self) -> Tensor:
        return self.where_3T[0]

    @property
    def row_T(self) -> Tensor:
        return self.where_3T[1]

    @property
    def seq_T(self) -> Tensor:
        return self.where_3T[2]

    def context_rows(self, s: int) -> Tensor:
        """Rows of sequence s in the order of positions: int64 [lengths_S[s]]."""
        p = torch.arange(int(self.lengths_S[s]))
        return self.tables_SP[s].to(torch.int64)[p // self.page_size] * self.page_size + p % self.page_size


class LatentCache:
    """Pools of cached rows: latent and rotated key (``row_width`` values) of every layer, and an index key for each
    layer that owns an indexer. Layer ``num_hidden_layers`` is the MTP layer's, where the configuration has one.

    Rows are written before they are read; nothing is cleared on release.
    """

    def __init__(self, config: GLMConfig, num_rows: int, dtype: torch.dtype, device: str = "cpu") -> None:
        num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.num_rows = num_rows
        self._rows = torch.zeros(num_layers, num_rows, config.row_width, dtype=dtype, device=device)
        self._keys = torch.zeros(len(config.index_layers), num_rows, config.index_head_dim, dtype=dtype, device=device)
        self._key_slot = {layer: slot for slot, layer in enumerate(config.index_layers)}

    def rows(self, layer: int) -> Tensor:
        """[N, Z]: the normalised latent (C values), then the rotated key (R values)."""
        return self._rows[layer]

    def keys(self, layer: int) -> Tensor:
        """[N, I] index keys of a layer that owns an indexer; KeyError for one that shares."""
        return self._keys[self._key_slot[layer]]

    @property
    def num_bytes(self) -> int:
        return self._rows.nbytes + self._keys.nbytes
