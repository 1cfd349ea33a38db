"""Quantised formats. So far: FP8 E4M3 with one fp32 scale per 128 x 128 block, as the FP8 checkpoint stores it."""

import torch
from torch import Tensor

BLOCK = 128
_MAX = 448.0  # the largest finite E4M3


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
