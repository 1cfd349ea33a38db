"""Quantised formats of weight matrices, symmetric, with one fp32 scale for a group of values along a row.

    format   values            a scale is shared by             rounding error of a value, in units of its scale
    int8     -127 to 127       128 values of a row              1/2
    int4     -8 to 7           64 values of a row               1/2, or 1 for the rare value clipped at 7
    fp8      E4M3              a block of 128 x 128             2^-4 of the value, or 2^-10

The FP8 checkpoint stores the last one; the others are made on loading.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WeightFormat = Literal["f32", "bf16", "int8", "int4", "fp8"]
BLOCK = 128
_GROUPS = {"int8": 128, "int4": 64, "fp8": BLOCK}
_MAX = 448.0  # the largest finite E4M3


@dataclass(frozen=True)
class QTensor:
    """A quantised matrix. data: int8 [N, K], or float8_e4m3fn; scale: fp32 [N, ceil(K / group)]."""

    data: Tensor
    scale: Tensor
    format: WeightFormat
    group: int

    def dequantize(self) -> Tensor:
        """fp32 [N, K]; exact."""
        return self.data.float() * self.scale.repeat_interleave(self.group, 1)[:, : self.data.shape[1]]


def quantize(w_NK: Tensor, fmt: WeightFormat) -> QTensor:
    """Round a matrix to ``int8``, ``int4`` or ``fp8``; see the module's table for the error."""
    if fmt not in _GROUPS:
        raise ValueError(f"format: expected one of {', '.join(_GROUPS)}, found {fmt}")
    group, (rows, columns) = _GROUPS[fmt], w_NK.shape
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


def dequantize_fp8(data_NK: Tensor, scale: Tensor) -> Tensor:
    """data float8_e4m3fn [N, K], scale fp32 [ceil(N / 128), ceil(K / 128)] -> fp32 [N, K]; exact.

    The scale is multiplied, although the checkpoint calls it ``weight_scale_inv``.
    """
    if tuple(scale.shape) != scale_shape(tuple(data_NK.shape)):
        raise ValueError(f"scale: expected shape {scale_shape(tuple(data_NK.shape))}, found {tuple(scale.shape)}")
    return data_NK.float() * _per_element(scale.float(), *data_NK.shape)


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
