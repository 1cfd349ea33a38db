"""The one place that composes: a checkpoint folder becomes a model, and a model a checkpoint folder."""

from pathlib import Path

import torch

from glm52 import ops
from glm52.cache import CacheFormat
from glm52.checkpoint import Checkpoint, read_parameters, write_checkpoint
from glm52.config import GLMConfig
from glm52.errors import ConfigError
from glm52.model import GLM
from glm52.native import NativeGLM
from glm52.quant import WeightFormat

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load(folder: Path, *, dtype: torch.dtype | None = None) -> GLM:
    """Read an official ``glm_moe_dsa`` folder into memory; dtype None keeps the configuration's.

    Every tensor is accounted for and every parameter filled, or CheckpointError lists what is not. FP8 weights are
    dequantized. A checkpoint without the MTP layer its configuration announces loads without it.
    """
    config = GLMConfig.read(folder)
    checkpoint = Checkpoint(folder)
    config = checkpoint.verify(config)
    dtype = dtype or _DTYPES[config.dtype]
    with torch.device("meta"):
        model = GLM(config)
    model.load_state_dict(dict(read_parameters(checkpoint, config, dtype)), assign=True)
    for module in model.modules():
        if isinstance(getattr(module, "load_E", None), torch.Tensor):
            module.load_E = torch.zeros(config.n_routed_experts)
    return model.requires_grad_(False).eval()


def load_for_inference(folder: Path, fmt: WeightFormat, cache: CacheFormat = "auto") -> GLM | NativeGLM:
    """Read a folder for generation: packed for the native kernels where there are any, else the reference model.

    ConfigError if a quantised format is asked for without kernels, since the reference holds none.
    """
    if ops.backend() != "reference":
        model = load(folder, dtype=torch.float32 if fmt == "f32" else torch.bfloat16)
        model.cache_format = cache
        return NativeGLM(model, fmt, consume=True)
    if fmt not in ("f32", "bf16"):
        raise ConfigError(f"--format {fmt}: expected f32 or bf16 without the native kernels; install a C++ compiler "
                          "and glm52 again for the others")  # fmt: skip
    model = load(folder, dtype=torch.float32 if fmt == "f32" else torch.bfloat16)
    model.cache_format = cache
    return model


def save(model: GLM, folder: Path) -> None:
    """Write the weights as they are, in the official layout that transformers and vLLM read."""
    write_checkpoint(folder, model.config, model.state_dict().items())
