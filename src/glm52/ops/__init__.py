"""The operators of the model: one contract, several bodies. This is the only door to kernels.

``reference`` defines every operator and is differentiable; compiled bodies replace it where no gradient is needed and
the extension was built. What a body may change is speed and, within the stated bound, rounding.
"""

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
