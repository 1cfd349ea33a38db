"""The operators of the model: one contract, several bodies. This is the only door to kernels.

``reference`` defines every operator and is differentiable; compiled bodies replace it where no gradient is needed and
the extension was built. What a body may change is speed and, within the stated bound, rounding.
``GLM52_BACKEND=reference`` keeps to the reference.
"""

import os

import torch
from torch import Tensor

from glm52.errors import ConfigError
from glm52.ops import cpu, reference
from glm52.ops.reference import (
    expert_ffn,
    index_distillation,
    index_scores,
    layer_norm,
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


def linear(x_TD: Tensor, w_ND: Tensor) -> Tensor:
    """x_TD @ w_ND^T -> [T, N] in the dtype of x."""
    if _kernels is None or torch.compiler.is_compiling() or not cpu.can_linear(x_TD, w_ND):
        return reference.linear(x_TD, w_ND)
    return cpu.linear(_kernels, x_TD, w_ND)
