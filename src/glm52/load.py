"""The one place that composes: a checkpoint folder becomes a model, and a model a checkpoint folder."""

from dataclasses import replace
from pathlib import Path

import torch

from glm52 import ops
from glm52.cache import CacheFormat
from glm52.checkpoint import Checkpoint, read_parameters, write_checkpoint
from glm52.config import DTYPES, GLMConfig
from glm52.errors import ConfigError
from glm52.model import GLM
from glm52.native import NativeGLM
from glm52.quant import WeightFormat

# Below this size a model is computed in f32 unless told otherwise: it costs little and rounds less.
_SMALL_BYTES = 1 << 30
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


def load(folder: Path, *, dtype: torch.dtype | None = None) -> GLM:
    """Read a ``glm_moe_dsa`` folder into memory; dtype None keeps the configuration's.

    Every tensor is accounted for and every parameter filled, or CheckpointError lists what is not. Quantised weights
    are dequantized. A checkpoint without the MTP layer its configuration announces loads without it.
    """
    checkpoint = Checkpoint(folder, GLMConfig.read(folder))
    config = replace(checkpoint.config, quantization_config=None)
    dtype = dtype or _DTYPES[config.dtype]
    with torch.device("meta"):
        model = GLM(config)
    model.load_state_dict(dict(read_parameters(checkpoint, dtype)), assign=True)
    for module in model.modules():
        if isinstance(getattr(module, "load_E", None), torch.Tensor):
            module.load_E = torch.zeros(config.n_routed_experts)
    return model.requires_grad_(False).eval()


def load_for_inference(folder: Path, fmt: WeightFormat | None = None, cache: CacheFormat = "auto") -> GLM | NativeGLM:
    """Read a folder for generation: packed for the native kernels where there are any, else the reference model.

    fmt None: as it is stored, if it is quantised; else f32 for a small model and bf16 for others. ConfigError if a
    quantised format is asked for without kernels, since the reference holds none.
    """
    if ops.backend() != "reference":
        checkpoint = Checkpoint(folder, GLMConfig.read(folder))
        return NativeGLM(checkpoint, fmt or (None if checkpoint.quantized else _unquantized(folder)), cache=cache)
    if fmt not in (None, "f32", "bf16"):
        raise ConfigError(f"--format {fmt}: expected f32 or bf16 without the native kernels; install a C++ compiler "
                          "and glm52 again for the others")  # fmt: skip
    model = load(folder, dtype=_DTYPES["float32" if (fmt or _unquantized(folder)) == "f32" else "bfloat16"])
    model.cache_format = cache
    return model


def _unquantized(folder: Path) -> WeightFormat:
    return "f32" if sum(p.stat().st_size for p in folder.glob("*.safetensors")) < _SMALL_BYTES else "bf16"


def save(model: GLM, folder: Path) -> None:
    """Write the weights as they are, in the official layout that transformers and vLLM read."""
    write_checkpoint(folder, model.config, model.state_dict().items())
