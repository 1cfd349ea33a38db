"""Quantised formats of weight matrices: groups of values along a row share an fp32 scale, and in int4 may share a zero.

    format   values            we share a scale among           rounding error of a value, in units of its scale
    int8     -127 to 127       128 values of a row              1/2
    int4     -8 to 7           64 values of a row               1/2, or 1 for the rare value clipped at 7
    fp8      E4M3              a block of 128 x 128             2^-4 of the value, or 2^-10

Checkpoints bring groups of their own, and zero points; what we make on loading is symmetric.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WeightFormat = Literal["f32", "bf16", "int8", "int4", "fp8"]
BLOCK = 128
GROUPS = {"int8": 128, "int4": 64, "fp8": BLOCK}
_MAX = 448.0  # the largest finite E4M3


@dataclass(frozen=True)
class QTensor:
    """A quantised matrix of values scale * (data - zero). data: int8 [N, K], or float8_e4m3fn; scale: fp32
    [N, ceil(K / group)]; zero: int8 of that shape, -8 to 8, for int4 alone, or None."""

    data: Tensor
    scale: Tensor
    format: WeightFormat
    group: int
    zero: Tensor | None = None

    def dequantize(self) -> Tensor:
        """fp32 [N, K]; data and zero are exact, one rounding is the scale's."""
        data = self.data.float()
        if self.zero is not None:
            data -= self._per_element(self.zero)
        return data * self._per_element(self.scale)

    def rows(self, begin: int, end: int) -> "QTensor":
        """Some of its rows."""
        zero = None if self.zero is None else self.zero[begin:end]
        return QTensor(self.data[begin:end], self.scale[begin:end], self.format, self.group, zero)

    def try_transpose(self) -> "QTensor | None":
        """The same values the other way round, if enough neighbouring rows share their scales, as they do in blocks."""
        for group in (BLOCK, 64, 32) if self.format != "fp8" else (BLOCK, 64, 32, 16, 8, 4):
            first = self.scale[::group]
            shared = torch.equal(first.repeat_interleave(group, 0)[: len(self.scale)], self.scale)
            if shared and self.zero is None:
                scale = first.t().repeat_interleave(self.group, 0)[: self.data.shape[1]]
                return QTensor(self.data.t(), scale, self.format, group)
        return None

    def _per_element(self, grouped: Tensor) -> Tensor:
        return grouped.repeat_interleave(self.group, 1)[:, : self.data.shape[1]]


def quantize(w_NK: Tensor, fmt: WeightFormat) -> QTensor:
    """Round a matrix to ``int8``, ``int4`` or ``fp8``; see the module's table for the error."""
    if fmt not in GROUPS:
        raise ValueError(f"format: expected one of {', '.join(GROUPS)}, found {fmt}")
    group, (rows, columns) = GROUPS[fmt], w_NK.shape
    if fmt == "fp8":
        data, scale = quantize_fp8(w_NK)
        return QTensor(data, scale.repeat_interleave(BLOCK, 0)[:rows].contiguous(), fmt, group)
    groups = -(-columns // group)
    padded = torch.zeros(rows, groups * group, dtype=torch.float32)
    padded[:, :columns] = w_NK
    padded = padded.view(rows, groups, group)
    largest, smallest = (127, -127) if fmt == "int8" else (7, -8)
    amax = padded.abs().amax(-1)
    # int4 has one more value below zero: the larger side takes it, so that nothing but the other side's end is clipped.
    peak = padded.gather(-1, padded.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scale = amax / 127 if fmt == "int8" else -peak / 8
    scale = torch.where(amax > 0, scale, torch.ones_like(scale))
    data = (padded / scale.unsqueeze(-1)).round().clamp(smallest, largest)
    return QTensor(data.view(rows, -1)[:, :columns].to(torch.int8).contiguous(), scale, fmt, group)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of ``weight_scale_inv``: blocks at the lower and right edge may be partial."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def _per_element(scale: Tensor, rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def quantize_fp8(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [N, K] -> float8_e4m3fn [N, K] and its scales. |w - dequantized| <= 2^-4 |w| or half the least subnormal.

    E4M3 keeps three mantissa bits, so rounding is within 2^-4 of a normal value and 2^-10 scales of a subnormal one.
    """
    rows, columns = w_NK.shape
    n, k = scale_shape((rows, columns))
    padded = w_NK.new_zeros(n * BLOCK, k * BLOCK)
    padded[:rows, :columns] = w_NK
    amax = padded.view(n, BLOCK, k, BLOCK).abs().amax((1, 3)).float()
    scale = torch.where(amax > 0, amax / _MAX, torch.ones_like(amax))
    data = (w_NK.float() / _per_element(scale, rows, columns)).clamp(-_MAX, _MAX)
    return data.to(torch.float8_e4m3fn), scale
