"""The one place that composes: a checkpoint folder becomes a model, and a model a checkpoint folder."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from glm52 import memory, ops
from glm52.cache import CacheFormat
from glm52.checkpoint import Checkpoint, read_parameters, write_checkpoint
from glm52.config import DTYPES, GLMConfig
from glm52.errors import ConfigError
from glm52.headers import stored_bytes
from glm52.hub import name_of
from glm52.model import GLM
from glm52.native import NativeGLM, rounded_bytes
from glm52.packing import packed_bytes
from glm52.quant import WeightFormat

# Below this size a model is computed in f32 unless told otherwise: it costs little and rounds less.
_SMALL_BYTES = 1 << 30
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


def load(folder: Path, *, dtype: torch.dtype | None = None) -> GLM:
    """Read a ``glm_moe_dsa`` folder into memory; dtype None keeps the configuration's.

    Every tensor is accounted for and every parameter filled, or CheckpointError lists what is not. Quantised weights
    are dequantized. A checkpoint without the MTP layer its configuration announces loads without it.
    """
    return _reference(Checkpoint(folder, GLMConfig.read(folder)), dtype)


def _reference(checkpoint: Checkpoint, dtype: torch.dtype | None) -> GLM:
    config = replace(checkpoint.config, quantization_config=None)
    dtype = dtype or _DTYPES[config.dtype]
    with torch.device("meta"):
        model = GLM(config)
    model.load_state_dict(dict(read_parameters(checkpoint, dtype)), assign=True)
    for module in model.modules():
        if isinstance(getattr(module, "load_E", None), torch.Tensor):
            module.load_E = torch.zeros(config.n_routed_experts)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder that was looked into for generation, and what it takes once it is loaded. fmt: of the weights; None: as
    they are stored."""

    checkpoint: Checkpoint
    fmt: WeightFormat | None
    cache: CacheFormat
    needs: memory.Needs

    def load(self, *, rows: int = 0, tokens: int = 0) -> GLM | NativeGLM:
        """The model, packed for the native kernels where there are any, else the reference. PlanError if with a cache
        of so many rows and steps of so many tokens it is more than this machine can hold."""
        self.needs.require(rows, tokens)
        with memory.running_out(self.needs.name):
            if ops.backend() != "reference":
                return NativeGLM(self.checkpoint, self.fmt, cache=self.cache)
            model = _reference(self.checkpoint, torch.float32 if self.fmt == "f32" else torch.bfloat16)
        model.cache_format = self.cache
        return model


def look_into(folder: Path, fmt: WeightFormat | None = None, cache: CacheFormat = "auto") -> Source:
    """Read a folder's headers.

    fmt None: as it is stored, if it is quantised; else f32 for a small model and bf16 for others. ConfigError if a
    quantised format is asked for without kernels, since the reference holds none. Scratch is the native body's: the
    reference's is up to three times as much.
    """
    checkpoint, is_native = Checkpoint(folder, GLMConfig.read(folder)), ops.backend() != "reference"
    if not is_native and fmt not in (None, "f32", "bf16"):
        raise ConfigError(f"--format {fmt}: expected f32 or bf16 without the native kernels; install a C++ compiler "
                          "and glm52 again for the others")  # fmt: skip
    files = stored_bytes(folder)
    if fmt is None and not (is_native and checkpoint.quantized):
        fmt = "f32" if files < _SMALL_BYTES else "bf16"
    own = "f32" if fmt == "f32" else "bf16"
    config, row_format = checkpoint.config, own if cache == "auto" else cache
    if is_native:
        weights = packed_bytes(checkpoint.shapes, checkpoint.quantized, fmt)
    else:
        weights = config.num_parameters() * (4 if fmt == "f32" else 2)
    needs = memory.Needs(
        name=name_of(folder), weights=weights, mapped=files,
        row=config.cache_bytes(row_format) + config.num_nextn_predict_layers * sum(config.row_bytes(row_format)),
        scratch=config.scratch_bytes(torch.get_num_threads(), rounded_bytes=rounded_bytes(fmt)),
        experts=config.n_routed_experts / config.num_experts_per_tok,
    )  # fmt: skip
    return Source(checkpoint=checkpoint, fmt=fmt, cache=cache, needs=needs)


def load_for_inference(folder: Path, fmt: WeightFormat | None = None, cache: CacheFormat = "auto") -> GLM | NativeGLM:
    """Read a folder for generation, see ``look_into``; PlanError if its weights are more than this machine can hold."""
    return look_into(folder, fmt, cache).load()


def save(model: GLM, folder: Path) -> None:
    """Write the weights as they are, in the official layout that transformers and vLLM read."""
    write_checkpoint(folder, model.config, model.state_dict().items())
