"""From the tensors a checkpoint stores to ``QTensor``: the values it holds, none of them rounded again.

AWQ and GPTQ keep the transpose, eight 4-bit values to an int32, the lowest bits first: AWQ along the outputs in the
order of its kernels, GPTQ along the inputs and its zeros along the outputs. compressed-tensors packs along the inputs,
and zeros along the outputs. Files written for activation order, whose columns are not in the order of their groups, are
refused.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from glm52.errors import CheckpointError
from glm52.quant import QTensor
from glm52.schemes import Scheme

_AWQ_PLACE = [0, 4, 1, 5, 2, 6, 3, 7]  # which of eight packed values belongs to the i-th output


def read_matrix(scheme: Scheme, module: str, shape: tuple[int, ...], read: Callable[[str], Tensor | None]) -> QTensor:
    """A module's matrix [N, K]. read: a tensor by its name, None if the file has none."""

    def tensor(suffix: str) -> Tensor:
        found = read(f"{module}.{suffix}")
        assert found is not None  # the checkpoint was verified
        return found

    rows, columns = shape
    group = scheme.group or -(-columns // 4) * 4
    if scheme.order and (order := read(f"{module}.{scheme.order}")) is not None:
        _require_order(f"{module}.{scheme.order}", order, group)
    zero = None
    if scheme.values == "plain":
        data = tensor("weight")
    elif scheme.values == "packed":
        words = tensor("weight_packed")
        data = _signed(_nibbles(words) if scheme.format == "int4" else words.view(torch.uint8), scheme)[:, :columns]
        if scheme.zeros:
            zero = _signed(_nibbles(tensor("weight_zero_point").t()).t()[:rows], scheme)
    else:
        zeros = _nibbles(tensor("qzeros"))
        if scheme.values == "awq":
            data, zeros = _awq_order(_nibbles(tensor("qweight"))).t(), _awq_order(zeros)
        else:
            data = _nibbles(tensor("qweight").t())
            if scheme.zero_offset and (zeros == 15).any():
                raise CheckpointError(f"{module}.qzeros: expected zero points less one, 0 to 14, found 15, which some "
                                      "readers take for 0 and some for 16; get it as gptq_v2")  # fmt: skip
        data, zero = _signed(data, scheme), _signed(zeros.t(), scheme) + scheme.zero_offset
    if zero is not None:
        zero = zero.contiguous() if zero.any() else None
    return QTensor(data.contiguous(), _scale(scheme, tensor, rows), scheme.format, group, zero)


def _scale(scheme: Scheme, tensor: Callable[[str], Tensor], rows: int) -> Tensor:
    """fp32 [N, groups]."""
    if scheme.values in ("awq", "gptq"):
        return tensor("scales").float().t().contiguous()
    scale = tensor(scheme.scale).float()
    scale = scale.view(-1, scale.shape[-1])
    return scale.repeat_interleave(scheme.block_rows or rows, 0)[:rows].contiguous()


def _nibbles(words: Tensor) -> Tensor:
    """int32 [A, B] -> uint8 [A, 8 B], the lowest bits first."""
    pairs = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)


def _awq_order(values: Tensor) -> Tensor:
    return values.view(len(values), -1, 8)[:, :, _AWQ_PLACE].flatten(1)


def _signed(values: Tensor, scheme: Scheme) -> Tensor:
    """Values stored from 0 upwards, with the middle at 0."""
    return (values.to(torch.int16) - (8 if scheme.format == "int4" else 128)).to(torch.int8)


def _require_order(name: str, order: Tensor, group: int) -> None:
    expected = torch.arange(len(order)) // group
    # compressed-tensors writes -1 where there is no order to keep.
    if not torch.equal(order.long(), expected) and not (order == -1).all():
        raise CheckpointError(f"{name}: expected columns in the order of their groups of {group}, found activation "
                              "order (desc_act, actorder); get a checkpoint that was quantised without it")  # fmt: skip
