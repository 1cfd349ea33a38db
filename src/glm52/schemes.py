"""How checkpoints store quantised matrices: ``quantization_config`` understood, and the tensors that go with it.

Knows names and shapes; ``layouts`` reads the values. Which matrices are quantised the files decide, since published
exclusion lists name modules that do not exist; a matrix that is quantised against its list is an error. What is not
understood is refused by the name of its field.

Sources: the FP8 checkpoint; AutoAWQ (WQLinear_GEMM); AutoGPTQ and GPTQModel; compressed-tensors (QuantizationArgs).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from glm52.errors import CheckpointError
from glm52.headers import TensorInfo

Shape = tuple[int, ...]
Tensors = dict[str, tuple[Shape, tuple[str, ...]]]  # shape and possible dtypes of each
FLOATS = ("F64", "F32", "F16", "BF16")
_WHOLE = 0  # of a row or a column: all of it


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to store a matrix [N, K].

    values: one byte each (``plain``), or eight or four to an int32: ``packed`` along a row (compressed-tensors), or
    transposed as ``awq`` and ``gptq`` do. group, block_rows: how many values of a row, and how many rows, share a
    scale; 0 is all. zeros: whether zero points are stored; zero_offset is what is then added to them.
    """

    values: Literal["plain", "packed", "awq", "gptq"]
    format: Literal["int4", "int8", "fp8"]
    group: int
    block_rows: int = 1
    zeros: bool = False
    zero_offset: int = 0
    scale: str = "weight_scale"

    @property
    def marker(self) -> str:
        """The tensor that holds the values."""
        return {"plain": "weight", "packed": "weight_packed"}.get(self.values, "qweight")

    @property
    def kind(self) -> str:
        """What its values are, for people."""
        if self.block_rows > 1:
            return f"{self.format} in blocks of {self.block_rows} x {self.group}"
        scaled = f"in groups of {self.group}" if self.group else "by row" if self.block_rows else "by matrix"
        return f"{self.format} {scaled}"

    def tensors(self, shape: Shape) -> Tensors:
        """Shapes and dtypes of a matrix's tensors."""
        (rows, columns), per_word = shape, 4 if self.format == "int8" else 8
        groups = 1 if self.group == _WHOLE else -(-columns // self.group)
        if self.values in ("awq", "gptq"):
            words = (columns, rows // 8) if self.values == "awq" else (columns // 8, rows)
            return {
                "qweight": (words, ("I32",)), "qzeros": ((groups, rows // 8), ("I32",)),
                "scales": ((groups, rows), FLOATS),
            }  # fmt: skip
        blocks = 1 if self.block_rows == _WHOLE else -(-rows // self.block_rows)
        scale = (1,) if self.block_rows == self.group == _WHOLE else (blocks, groups)
        if self.values == "plain":
            return {"weight": (shape, self._plain_dtype), self.scale: (scale, FLOATS)}
        out: Tensors = {
            "weight_packed": ((rows, -(-columns // per_word)), ("I32",)),
            "weight_scale": (scale, FLOATS),
            "weight_shape": ((2,), ("I64", "I32")),
        }
        return out | ({"weight_zero_point": ((-(-rows // 8), groups), ("I32",))} if self.zeros else {})

    @property
    def order(self) -> str | None:
        """The tensor that may be there to say which group each column belongs to."""
        return {"gptq": "g_idx", "packed": "weight_g_idx"}.get(self.values)

    @property
    def _plain_dtype(self) -> tuple[str]:
        return ("I8",) if self.format == "int8" else ("F8_E4M3",)

    def holds(self, module: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether a file holds a module's matrix this way."""
        info = tensors.get(f"{module}.{self.marker}")
        return info is not None and (self.values != "plain" or info.dtype in self._plain_dtype)


BLOCK_FP8 = Scheme(values="plain", format="fp8", group=128, block_rows=128, scale="weight_scale_inv")


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's schemes, each with the modules it is for, and the modules that have none."""

    method: str
    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignored: tuple[str, ...]

    def find(self, module: str, tensors: Mapping[str, TensorInfo]) -> Scheme | None:
        """How a file holds a module's matrix; None: as it is."""
        for targets, scheme in self.schemes:
            if any(t == "Linear" or _matches(t, module) for t in targets) and scheme.holds(module, tensors):
                break
        else:
            return None
        excluded = [pattern for pattern in self.ignored if _matches(pattern, module)]
        if excluded:
            raise CheckpointError(f"{module}: expected as it is, since quantization_config excludes {excluded[0]!r}; "
                                  f"found {scheme.marker}, check that config.json belongs to the files")  # fmt: skip
        return scheme

    @staticmethod
    def parse(config: Mapping[str, Any] | None) -> "Quantization":
        """Understand ``quantization_config``. Without one, E4M3 matrices are read as the FP8 checkpoint stores them."""
        if config is None:
            return Quantization("none", ((("Linear",), BLOCK_FP8),), ())
        if not isinstance(config, Mapping):
            raise CheckpointError(f"quantization_config: expected an object, found {config!r}")
        method = _choice(config, "quant_method", tuple(_READERS))
        schemes, ignored = _READERS[method](config)
        for pattern in (*ignored, *(t for targets, _ in schemes for t in targets)):
            try:
                re.compile(pattern.removeprefix("re:"))
            except (re.error, RecursionError, OverflowError) as error:
                raise CheckpointError(f"quantization_config: {pattern[:80]!r} is not a pattern ({error})") from error
        return Quantization(method, tuple(schemes), tuple(ignored))


def _matches(pattern: str, module: str) -> bool:
    """``re:`` and an expression for the name's beginning, or whole parts of the name."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return f".{pattern}." in f".{module}."


def _choice(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], default: Any = None, at: str = "") -> Any:
    found = config.get(key, default)
    if found not in allowed:
        raise CheckpointError(f"quantization_config.{at}{key}: expected {' or '.join(map(repr, allowed))}, found "
                              f"{found!r}; get the checkpoint in a format that is read")  # fmt: skip
    return found


def _group(config: Mapping[str, Any], key: str, at: str = "") -> int:
    found = config.get(key)
    if found == -1:
        return _WHOLE
    if not isinstance(found, int) or found < 32 or found % 32:
        raise CheckpointError(f"quantization_config.{at}{key}: expected -1 or a multiple of 32, found {found!r}; get "
                              "the checkpoint in a format that is read")  # fmt: skip
    return found


def _names(config: Mapping[str, Any], key: str, at: str = "") -> list[str]:
    """Names of modules, or patterns: a list, or the keys of an object."""
    found = config.get(key) or []
    if not isinstance(found, list | tuple | Mapping) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"quantization_config.{at}{key}: expected a list of strings, found {found!r}; get "
                              "config.json again")  # fmt: skip
    return list(found)


_Parsed = tuple[list[tuple[tuple[str, ...], Scheme]], list[str]]


def _fp8(config: Mapping[str, Any]) -> _Parsed:
    _choice(config, "fmt", ("e4m3",), "e4m3")
    _choice(config, "weight_block_size", ([128, 128],))
    return [(("Linear",), BLOCK_FP8)], _names(config, "modules_to_not_convert")


def _awq(config: Mapping[str, Any]) -> _Parsed:
    _choice(config, "bits" if "bits" in config else "w_bit", (4,))
    _choice(config, "version", ("gemm", "GEMM"), "gemm")
    _choice(config, "zero_point", (True,), True)
    group = _group(config, "group_size" if "group_size" in config else "q_group_size")
    scheme = Scheme(values="awq", format="int4", group=group, zeros=True)
    return [(("Linear",), scheme)], _names(config, "modules_to_not_convert")


def _gptq(config: Mapping[str, Any]) -> _Parsed:
    _choice(config, "bits", (4,))
    key = "checkpoint_format" if "checkpoint_format" in config else "format"
    version = _choice(config, key, ("gptq", "gptq_v2"), "gptq")
    scheme = Scheme(values="gptq", format="int4", group=_group(config, "group_size"), zeros=True,
                    zero_offset=1 if version == "gptq" else 0)  # fmt: skip
    ignored = _names(config, "modules_to_not_convert")
    for pattern in _names(config, "dynamic"):
        if not pattern.startswith("-:"):
            raise CheckpointError(f"quantization_config.dynamic: expected exclusions ('-:...'), found {pattern!r}; "
                                  "modules with settings of their own are not read")  # fmt: skip
        ignored.append("re:" + pattern[2:])
    return [(("Linear",), scheme)], ignored


def _compressed(config: Mapping[str, Any]) -> _Parsed:
    for key in ("sparsity_config", "transform_config"):
        found = config.get(key)
        if found and not (isinstance(found, Mapping) and found.get("format") == "dense"):
            raise CheckpointError(f"quantization_config.{key}: expected none, found {found!r}; get the checkpoint "
                                  "without it")  # fmt: skip
    schemes = []
    groups = config.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise CheckpointError(f"quantization_config.config_groups: expected an object, found {groups!r}")
    for name, group in groups.items():
        at = f"config_groups.{name}."
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"quantization_config.{at}weights: expected an object, found {weights!r}")
        where = group if group.get("format") else config
        schemes.append((tuple(_names(group, "targets", at)), _compressed_scheme(where, weights, at)))
    if not schemes:
        raise CheckpointError("quantization_config.config_groups: expected at least one group, found none")
    return schemes, _names(config, "ignore")


def _compressed_scheme(where: Mapping[str, Any], weights: Mapping[str, Any], at: str) -> Scheme:
    known = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    stored, at_weights = _choice(where, "format", known, at=at), at + "weights."
    kind = _choice(weights, "type", ("float",) if stored == "float-quantized" else
                   ("int", "float") if stored == "naive-quantized" else ("int",), "int", at_weights)  # fmt: skip
    bits = _choice(weights, "num_bits", (4, 8) if stored == "pack-quantized" else (8,), at=at_weights)
    symmetric = _choice(weights, "symmetric", (True, False) if bits == 4 else (True,), True, at_weights)
    strategies = ("group", "channel") if stored == "pack-quantized" else ("group", "channel", "tensor", "block")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    _choice({"strategy": strategy}, "strategy", strategies, at=at_weights)
    if strategy == "block":
        _choice(weights, "block_structure", ([128, 128],), at=at_weights)
    group = _group(weights, "group_size", at_weights) if strategy == "group" else 128 if strategy == "block" else _WHOLE
    return Scheme(
        values="packed" if stored == "pack-quantized" else "plain",
        format="fp8" if kind == "float" else "int4" if bits == 4 else "int8",
        group=group,
        block_rows={"tensor": _WHOLE, "block": 128}.get(strategy, 1),
        zeros=not symmetric,
    )


_READERS = {"fp8": _fp8, "awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}
