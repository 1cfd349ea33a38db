"""From weights by their official names to what the native stack takes: matrices packed in panels, each in its format.

A matrix that is stored in the format asked for is packed as it is: its own values and scales are what the kernels
multiply. Any other is dequantized, and quantised as that format says.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from glm52.config import GLMConfig
from glm52.errors import CheckpointError
from glm52.quant import GROUPS, QTensor, WeightFormat, quantize
from glm52.schemes import Scheme, Shape

_PANEL = 16  # rows of a panel; see csrc/matrix.h
_FLOATS = ("mlp.gate.weight", "indexer.weights_proj.weight")  # fp32 in every format
_SOFT = ("lm_head.weight", "eh_proj.weight", "kv_b_proj.weight")  # kept finer than the format


class Weights(Protocol):
    """Where weights come from: ``GLM`` or ``Checkpoint``."""

    config: GLMConfig

    def weight(self, name: str) -> Tensor | QTensor: ...


class Packer:
    """The layers of a model as ``Stack.add_layer`` takes them.

    fmt: the format of the large matrices; None: quantised ones as they are stored, the others bf16. Router and index
    weights stay f32. The output head, eh_proj and kv_b_proj, whose rows are split by head, are int8 where fmt is int4
    and bf16 where it is fp8, unless they are stored in it.
    """

    def __init__(self, source: Weights, fmt: WeightFormat | None, kernels: ModuleType) -> None:
        self._config, self._read, self._format, self._extension = source.config, source.weight, fmt, kernels

    def floats(self, name: str) -> Tensor:
        """A weight that is not multiplied as a matrix, fp32."""
        w = self._read(f"{name}.weight")
        return w.dequantize() if isinstance(w, QTensor) else w.float()

    def soft(self, name: str) -> Any:
        """A matrix that is kept finer than the format."""
        return self._pack_soft(self._read(f"{name}.weight"))

    def heads(self, *, drafts: bool) -> tuple[Any, Any]:
        """The output head, and the one for greedy drafts, which are verified: int8 whatever the format. Without drafts,
        or where that is its own format, both are one."""
        w = self._read("lm_head.weight")
        head = self._pack_soft(w)
        return head, pack(self._extension, [w], "int8") if drafts and head.format != "int8" else head

    def layer(self, number: int) -> dict[str, Any]:
        """The weights of one decoder layer."""
        prefix, config = f"model.layers.{number}", self._config
        attention, index = f"{prefix}.self_attn", f"{prefix}.self_attn.indexer"
        from_hidden = [f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa"]
        from_query = [f"{attention}.q_b_proj"]
        out: dict[str, Any] = {
            "input_norm": self.floats(f"{prefix}.input_layernorm"),
            "post_norm": self.floats(f"{prefix}.post_attention_layernorm"),
            "q_norm": self.floats(f"{attention}.q_a_layernorm"),
            "kv_norm": self.floats(f"{attention}.kv_a_layernorm"),
        }
        if number in config.index_layers:
            from_hidden.append(f"{index}.wk")
            from_query.append(f"{index}.wq_b")
            out["index_weights"] = pack(self._extension, [self.floats(f"{index}.weights_proj")], "f32")
            out["index_norm"] = self.floats(f"{index}.k_norm")
            out["index_bias"] = self._vector(f"{index}.k_norm.bias")
        out |= {"a": self._below(from_hidden), "q": self._below(from_query), "o": self._pack(f"{attention}.o_proj")}
        out["key"], out["value"] = self._heads(f"{attention}.kv_b_proj")
        return out | (self._moe(f"{prefix}.mlp") if config.is_sparse(number) else {"dense": self._mlp(f"{prefix}.mlp")})

    def _moe(self, prefix: str) -> dict[str, Any]:
        out: dict[str, Any] = {
            "router": pack(self._extension, [self.floats(f"{prefix}.gate")], "f32"),
            "router_bias": self._vector(f"{prefix}.gate.e_score_correction_bias"),
            "experts": [self._mlp(f"{prefix}.experts.{i}") for i in range(self._config.n_routed_experts)],
        }
        return out | ({"dense": self._mlp(f"{prefix}.shared_experts")} if self._config.n_shared_experts else {})

    def _mlp(self, prefix: str) -> tuple[Any, Any]:
        gate_up = [hold(self._read(f"{prefix}.{n}_proj.weight"), self._format) for n in ("gate", "up")]
        if _kind(gate_up[0]) != _kind(gate_up[1]):
            raise CheckpointError(f"{prefix}: expected gate_proj and up_proj in one format with one group, found "
                                  f"{_kind(gate_up[0])} and {_kind(gate_up[1])}; choose one with --format")  # fmt: skip
        return pack_held(self._extension, gate_up, alternate=True), self._pack(f"{prefix}.down_proj")

    def _heads(self, name: str) -> tuple[list[Any], list[Any]]:
        """kv_b_proj by head: the key rows transposed, for absorbed queries, and the value rows."""
        w, nope = self._read(f"{name}.weight"), self._config.qk_nope_head_dim
        size = nope + self._config.v_head_dim
        keys, values = [], []
        for at in range(0, size * self._config.num_attention_heads, size):
            if isinstance(w, QTensor):
                key, value = w.rows(at, at + nope), w.rows(at + nope, at + size)
                keys.append(self._pack_soft(key.try_transpose() or key.dequantize().t()))
                values.append(self._pack_soft(value))
            else:
                keys.append(self._pack_soft(w[at : at + nope].t()))
                values.append(self._pack_soft(w[at + nope : at + size]))
        return keys, values

    def _vector(self, name: str) -> Tensor:
        w = self._read(name)
        assert isinstance(w, Tensor)  # only matrices are quantised
        return w.float()

    def _pack(self, name: str) -> Any:
        return pack(self._extension, [self._read(f"{name}.weight")], self._format)

    def _pack_soft(self, w: Tensor | QTensor) -> Any:
        fmt = self._format
        if fmt and not (isinstance(w, QTensor) and w.format == fmt):
            fmt = soft_format(fmt)
        return pack(self._extension, [w], fmt)

    def _below(self, names: Iterable[str]) -> list[Any]:
        """Matrices one below the other, neighbours of a kind as one."""
        held = [hold(self._read(f"{name}.weight"), self._format) for name in names]
        return [pack_held(self._extension, list(alike)) for _, alike in groupby(held, _kind)]


def packed_bytes(shapes: Mapping[str, Shape], stored: Mapping[str, Scheme], fmt: WeightFormat | None) -> int:
    """Bytes of a whole model as a ``Packer`` leaves it, but for rows that fill up panels. shapes: of every weight;
    stored: how quantised ones are."""
    total, drafts = 0, any(name.endswith("eh_proj.weight") for name in shapes)
    for name, shape in shapes.items():
        count, scheme = math.prod(shape), stored.get(name)
        if len(shape) == 1 or name.endswith(_FLOATS):
            total += 4 * count
        elif name.endswith("embed_tokens.weight"):
            total += (4 if fmt == "f32" else 2) * count
        else:
            kept: str = fmt or (scheme.format if scheme else "bf16")
            is_stored = scheme is not None and scheme.format == kept
            if name.endswith(_SOFT) and fmt and not is_stored:
                kept = soft_format(fmt)
            total += _matrix_bytes(shape, kept, scheme if is_stored else None)
            if name == "lm_head.weight" and drafts and kept != "int8":
                total += _matrix_bytes(shape, "int8", None)
    return total


def _matrix_bytes(shape: Shape, fmt: str, stored: Scheme | None) -> int:
    """Values, and where there are groups their fp32 scales and zeros of a byte."""
    rows, columns = shape
    group = (stored.group or columns) if stored else GROUPS.get(fmt)
    scales = 0 if group is None else rows * -(-columns // group) * (5 if stored and stored.zeros else 4)
    return rows * columns * {"f32": 32, "bf16": 16, "int4": 4}.get(fmt, 8) // 8 + scales


def soft_format(fmt: WeightFormat) -> WeightFormat:
    """What the output head and kv_b_proj are kept in, where all other matrices are in ``fmt``."""
    return {"int4": "int8", "fp8": "bf16"}.get(fmt, fmt)  # type: ignore[return-value]


def hold(w: Tensor | QTensor, fmt: WeightFormat | None) -> Tensor | QTensor:
    """A matrix in a format, f32 and bf16 as tensors; None: bf16, or as it is stored."""
    if isinstance(w, QTensor):
        if fmt in (None, w.format):
            return w
        w = w.dequantize()
    if fmt in (None, "f32", "bf16"):
        return w.float() if fmt == "f32" else w.bfloat16()
    return quantize(w, fmt)


def _kind(w: Tensor | QTensor) -> str:
    """What must agree for matrices to be packed as one."""
    return f"{w.format} in groups of {w.group}" if isinstance(w, QTensor) else str(w.dtype)


def pack(kernels: ModuleType, parts: Sequence[Tensor | QTensor], fmt: WeightFormat | None) -> Any:
    """Matrices one below the other, each held in ``fmt`` by itself, as one packed matrix."""
    return pack_held(kernels, [hold(p, fmt) for p in parts])


def pack_held(kernels: ModuleType, held: Sequence[Tensor | QTensor], *, alternate: bool = False) -> Any:
    """Matrices of one kind one below the other as one packed matrix.

    alternate: two of equal shape, panel by panel in turn, each filled up with zero rows to whole panels.
    """
    threads = torch.get_num_threads()
    quantized = [h for h in held if isinstance(h, QTensor)]
    if not quantized:
        data = _join([h for h in held if isinstance(h, Tensor)], alternate)
        return kernels.pack("f32" if data.dtype == torch.float32 else "bf16", data, threads=threads)
    first = quantized[0]
    data = _join([q.data.view(torch.uint8) if first.format == "fp8" else q.data for q in quantized], alternate)
    scale, zero = _join([q.scale for q in quantized], alternate), None
    if any(q.zero is not None for q in quantized):
        zero = _join([torch.zeros_like(q.scale, dtype=torch.int8) if q.zero is None else q.zero for q in quantized],
                     alternate)  # fmt: skip
    return kernels.pack(first.format, data, scale, first.group, zeros=zero, threads=threads)


def _join(parts: list[Tensor], alternate: bool) -> Tensor:
    if not alternate:
        return torch.cat(parts).contiguous()
    rows = -(-len(parts[0]) // _PANEL) * _PANEL
    padded = [torch.cat((p, p.new_zeros(rows - len(p), p.shape[1]))).view(-1, _PANEL, p.shape[1]) for p in parts]
    return torch.stack(padded, dim=1).flatten(0, 2)
