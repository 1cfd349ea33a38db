"""The operators of the model: one contract, several bodies. This is the only door to kernels.

``reference`` defines every operator and is differentiable. The compiled body is a whole decoder that ``native`` drives
through ``kernels()``; what it may change is speed and, within the stated bound, rounding.
``GLM52_BACKEND=reference`` keeps to the reference.
"""

import os
from types import ModuleType

from glm52.errors import ConfigError
from glm52.ops import cpu
from glm52.ops.reference import (
    expert_ffn,
    index_distillation,
    index_scores,
    layer_norm,
    linear,
    mla_absorbed,
    mla_expanded,
    norm,
    rope,
    rope_table,
    route,
    select_rows,
    softmax_gradient,
    sparse_mla,
    swiglu,
    token_loss,
    wide,
    write_rows,
)

__all__ = [
    "backend",
    "expert_ffn",
    "index_distillation",
    "index_scores",
    "kernels",
    "layer_norm",
    "linear",
    "mla_absorbed",
    "mla_expanded",
    "norm",
    "rope",
    "rope_table",
    "route",
    "select_rows",
    "softmax_gradient",
    "sparse_mla",
    "swiglu",
    "token_loss",
    "wide",
    "write_rows",
]

_wanted = os.environ.get("GLM52_BACKEND", "native")
if _wanted not in ("native", "reference"):
    raise ConfigError(f"GLM52_BACKEND: expected native or reference, found {_wanted!r}")
_kernels = cpu.load_kernels() if _wanted == "native" else None


def backend() -> str:
    """``reference``, or ``native`` with the instruction set in use."""
    return f"native ({_kernels.isa()})" if _kernels else "reference"


def kernels() -> ModuleType:
    """The native extension; ConfigError if this installation has none or it was switched off."""
    if _kernels is None:
        raise ConfigError("native kernels: expected the extension glm52._kernels, found none; see the warning above")
    return _kernels
