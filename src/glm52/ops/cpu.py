"""The compiled bodies: thin, allocating their outputs, for torch tensors that need no gradient."""

import logging
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def load_kernels() -> ModuleType | None:
    """The extension, or None (said once, with the way to get it) if this installation has none."""
    try:
        return import_module("glm52._kernels")
    except ImportError:
        logger.warning(
            "native kernels are not built: the reference operators run instead, slower; install a C++ compiler and run "
            "pip install again"
        )
        return None


def can_linear(x_TD: Tensor, w_ND: Tensor) -> bool:
    """Whether ``linear`` takes these: fp32 against fp32 or bf16, contiguous weights, nothing to differentiate."""
    if x_TD.dtype != torch.float32 or w_ND.dtype not in (torch.float32, torch.bfloat16) or x_TD.dim() != 2:
        return False
    needs_grad = torch.is_grad_enabled() and (x_TD.requires_grad or w_ND.requires_grad)
    return not needs_grad and w_ND.is_contiguous() and x_TD.device.type == "cpu"


def linear(kernels: ModuleType, x_TD: Tensor, w_ND: Tensor) -> Tensor:
    """fp32 [T, N]; the bits of an element depend on its row of x and of w alone, not on T or the threads."""
    y_TN = torch.empty(x_TD.shape[0], w_ND.shape[0])
    kernels.linear(x_TD.contiguous(), w_ND, y_TN, torch.get_num_threads())
    return y_TN
