"""The latent cache: one flat pool of rows per layer, and ``Spans``, which says where each packed token sits in it.

Row ``r`` means the same token in every layer. Pages exist only as an allocation unit (see ``pages``): what attention
and the indexer exchange are row numbers. Without a cache the pool is the batch's own latents and row = packed index,
so training, evaluation and serving share one layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glm52.config import CACHE_GROUP, GLMConfig

# How a cache holds its rows; auto is the dtype of the model's activations. Named as vLLM's --kv-cache-dtype.
CacheFormat = Literal["auto", "bf16", "fp8"]
_MAX = 448.0  # the largest finite E4M3


def cache_dtype(fmt: CacheFormat, model: torch.dtype) -> torch.dtype:
    """The dtype a format stands for in a model whose activations have the given one."""
    return {"auto": model, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[fmt]


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Where each of T packed tokens sits.

    where_3T: int64, the position, row and sequence of each token. Sequences count from 0 and never decrease, positions
    of one only grow. tables_SP: int32 page numbers;
    sequence s at position p lives in row ``tables_SP[s, p // page_size] * page_size + p % page_size``.
    window: if set, T is a multiple of it and no sequence crosses a multiple of it (the training layout).
    """

    where_3T: Tensor
    tables_SP: Tensor
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
            window=window,
        )

    @staticmethod
    def of_sequence(begin: int, end: int, page_size: int = 64) -> "Spans":
        """Tokens [begin, end) of one sequence over a cache, whose position p lives in row p."""
        positions = torch.arange(begin, end)
        return Spans(
            where_3T=torch.stack((positions, positions, torch.zeros_like(positions))),
            tables_SP=torch.arange(-(-end // page_size), dtype=torch.int32)[None], page_size=page_size,
        )  # fmt: skip

    @staticmethod
    def of_positions(positions_S: Tensor) -> "Spans":
        """One token of each of S sequences that writes no row and searches nothing, as in later draft steps."""
        count = len(positions_S)
        return Spans(
            where_3T=torch.stack((positions_S, torch.zeros(count, dtype=torch.int64), torch.arange(count))),
            tables_SP=torch.zeros(count, 1, dtype=torch.int32), page_size=64,
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

    @property
    def max_length(self) -> int:
        """The longest context, its newest token included."""
        return int(self.positions_T.max()) + 1

    def context_rows(self, s: int) -> Tensor:
        """Rows of sequence s in the order of positions, up to its newest token: int64."""
        p = torch.arange(int(self.positions_T[self.seq_T == s][-1]) + 1)
        return self.tables_SP[s].to(torch.int64)[p // self.page_size] * self.page_size + p % self.page_size


class FP8Pool:
    """Rows in E4M3, indexed like a tensor [N, dim + rest]: writing rounds, reading gives fp32.

        one row:   dim values, E4M3 | ceil(dim / group) scales, fp32 | the rest (a rotated key), bf16

    The scale of a group is the smallest power of two that brings its values to 448 or below, so that what is read is
    exact in bf16. Values are rounded to the nearest, ties to even: |x - read| <= 2^-4 |x|, or 2^-10 scales near zero.
    """

    dtype = torch.float32

    def __init__(self, bytes_NB: Tensor, dim: int, group: int) -> None:
        self.bytes_NB, self._dim, self._group = bytes_NB, dim, group

    def __setitem__(self, row_T: Tensor, x_TZ: Tensor) -> None:
        values, rest = x_TZ.float().split((self._dim, x_TZ.shape[1] - self._dim), dim=1)
        values = torch.nn.functional.pad(values, (0, -self._dim % self._group)).unflatten(1, (-1, self._group))
        ratio = (values.abs().amax(2) / _MAX).clamp(min=torch.finfo(torch.float32).tiny)
        scale = (ratio.view(torch.int32) + 0x7FFFFF & ~0x7FFFFF).view(torch.float32)
        codes = (values / scale[:, :, None]).to(torch.float8_e4m3fn).flatten(1)[:, : self._dim]
        parts = codes, scale, rest.bfloat16()
        self.bytes_NB[row_T] = torch.cat([p.contiguous().view(torch.uint8) for p in parts], dim=1)

    def __getitem__(self, rows: Tensor) -> Tensor:
        data, groups = self.bytes_NB[rows], -(-self._dim // self._group)
        sizes = self._dim, 4 * groups, data.shape[-1] - self._dim - 4 * groups
        # Clones, because a view as a wider type must begin where that type may.
        codes, scale, rest = (p.clone(memory_format=torch.contiguous_format) for p in data.split(sizes, dim=-1))
        per_value = scale.view(torch.float32).repeat_interleave(self._group, -1)[..., : self._dim]
        values = codes.view(torch.float8_e4m3fn).float() * per_value
        return torch.cat((values, rest.view(torch.bfloat16).float()), dim=-1) if sizes[2] else values


Pool = Tensor | FP8Pool


def as_cached_fp8(rows_TZ: Tensor, dim: int) -> Tensor:
    """Rows as an ``FP8Pool`` gives them back, in their own dtype. The gradient passes straight through the rounding.

    dim: width of the latent, whose values share scales by CACHE_GROUP. Source: Bengio et al. (arXiv 1308.3432).
    """
    groups, rest = -(-dim // CACHE_GROUP), rows_TZ.shape[1] - dim
    data = torch.empty(len(rows_TZ), dim + 4 * groups + 2 * rest, dtype=torch.uint8, device=rows_TZ.device)
    pool = FP8Pool(data, dim, CACHE_GROUP)
    every = torch.arange(len(rows_TZ))
    pool[every] = rows_TZ.detach()
    return rows_TZ + (pool[every].to(rows_TZ.dtype) - rows_TZ).detach()


class LatentCache:
    """Pools of cached rows: latent and rotated key (``row_width`` values) of every layer, and an index key for each
    layer that owns an indexer. Layer ``num_hidden_layers`` is the MTP layer's, where the configuration has one.

    dtype: a float type, or float8_e4m3fn for pools of ``FP8Pool``: 656 bytes a row (a scale for CACHE_GROUP values) and
    132 an index key (one scale) for GLM-5.2. No Hadamard rotation precedes, since it changes no score. Source of the
    layout: FlashMLA and DeepGEMM, which also round scales up to powers of two.

    Rows are written before they are read; nothing is cleared on release.
    """

    def __init__(self, config: GLMConfig, num_rows: int, dtype: torch.dtype, device: str = "cpu") -> None:
        if not dtype.is_floating_point or (dtype.itemsize == 1 and dtype != torch.float8_e4m3fn):
            raise ValueError(f"dtype: expected a float type or float8_e4m3fn, found {dtype}")
        fp8 = dtype == torch.float8_e4m3fn
        row, key = config.row_bytes("fp8") if fp8 else (config.row_width, config.index_head_dim)
        held = torch.uint8 if fp8 else dtype
        num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.num_rows = num_rows
        self._rows = torch.zeros(num_layers, num_rows, row, dtype=held, device=device)
        self._keys = torch.zeros(len(config.index_layers), num_rows, key, dtype=held, device=device)
        self._key_slot = {layer: slot for slot, layer in enumerate(config.index_layers)}
        self._config, self._fp8 = config, fp8

    def rows(self, layer: int) -> Pool:
        """[N, Z]: the normalised latent (C values), then the rotated key (R values)."""
        pool = self._rows[layer]
        return FP8Pool(pool, self._config.kv_lora_rank, CACHE_GROUP) if self._fp8 else pool

    def keys(self, layer: int) -> Pool:
        """[N, I] index keys of a layer that owns an indexer; KeyError for one that shares."""
        pool, dim = self._keys[self._key_slot[layer]], self._config.index_head_dim
        return FP8Pool(pool, dim, dim) if self._fp8 else pool

    @property
    def num_bytes(self) -> int:
        return self._rows.nbytes + self._keys.nbytes

    def pools(self) -> list[Tensor]:
        """Every layer's rows, then every indexer's keys, as bytes [N, width], in place."""
        return [pool.view(torch.uint8) for pool in (*self._rows, *self._keys)]
