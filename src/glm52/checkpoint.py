"""Official checkpoints: sharded safetensors whose every header is checked before anything in it is trusted.

Reading validates the index, each shard's header, and that the tensors are exactly the model's. Writing gives the same
layout back: routed experts, stacked in memory, are split into the checkpoint's names. What is wrong raises
CheckpointError with what, where and what to do.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glm52.config import GLMConfig
from glm52.contents import ROUTER_BIAS, account, expected_tensors
from glm52.errors import CheckpointError
from glm52.headers import INDEX, SINGLE, read_headers
from glm52.layouts import read_matrix
from glm52.quant import QTensor

_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")


class Checkpoint:
    """A folder of official weights: headers now, held against the configuration; tensors when asked for. See
    ``Contents`` for config and quantized."""

    def __init__(self, folder: Path, config: GLMConfig) -> None:
        contents = account(folder, read_headers(folder), config)
        self.folder, self.config, self.tensors = folder, contents.config, contents.tensors
        self.quantized, self.shapes = contents.quantized, contents.shapes
        self._open: dict[Path, safe_open] = {}

    def read(self, name: str) -> Tensor:
        """A tensor as stored."""
        info = self.tensors[name]
        try:
            if info.shard not in self._open:
                self._open[info.shard] = safe_open(info.shard, framework="pt")
            tensor: Tensor = self._open[info.shard].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{info.shard}: {name} cannot be read ({error}); download the shard again") from error
        return tensor

    def weight(self, name: str) -> Tensor | QTensor:
        """A weight of the official layout by its name, quantised where it is stored so."""
        scheme = self.quantized.get(name)
        if scheme is None:
            return self.read(name)
        return read_matrix(scheme, name.removesuffix(".weight"), self.shapes[name],
                           lambda n: self.read(n) if n in self.tensors else None)  # fmt: skip

    def read_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight in ``dtype``, dequantized where it is stored quantised."""
        w = self.weight(name)
        return (w.dequantize() if isinstance(w, QTensor) else w).to(dtype)


def read_parameters(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters by their names in memory, experts stacked; the router's bias stays fp32."""
    config = checkpoint.config
    for name in expected_tensors(config):
        if ".mlp.experts." not in name:
            yield name, checkpoint.read_as(name, torch.float32 if name.endswith(ROUTER_BIAS) else dtype)
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        if not config.is_sparse(layer):
            continue
        prefix = f"model.layers.{layer}.mlp.experts"
        D, F, E = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        gate_up, down = torch.empty(E, 2 * F, D, dtype=dtype), torch.empty(E, D, F, dtype=dtype)
        for expert in range(E):
            gate_up[expert, :F] = checkpoint.read_as(f"{prefix}.{expert}.gate_proj.weight", dtype)
            gate_up[expert, F:] = checkpoint.read_as(f"{prefix}.{expert}.up_proj.weight", dtype)
            down[expert] = checkpoint.read_as(f"{prefix}.{expert}.down_proj.weight", dtype)
        yield f"{prefix}.gate_up_proj", gate_up
        yield f"{prefix}.down_proj", down


def write_checkpoint(
    folder: Path, config: GLMConfig, parameters: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int = 5 << 30
) -> None:
    """Write config.json and weights under their official names, whole or not at all.

    Shards are filled in order up to ``max_shard_bytes``; one shard needs no index. What is cut off leaves the folder as
    it was or, while files take their places, without the config.json that would let a mixture be loaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in (pair for item in parameters for pair in unstack(*item)):
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    partial = {file: folder / f".{file}.partial" for file in (*names, INDEX, "config.json")}
    for file, tensors in zip(names, shards, strict=True):
        save_file(tensors, partial[file], metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, tensors in zip(names, shards, strict=True) for name in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        partial[INDEX].write_text(json.dumps(index, indent=1))
    else:
        del partial[INDEX]
    partial["config.json"].write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    for file in ("config.json", INDEX):  # of what lay here before
        (folder / file).unlink(missing_ok=True)
    for file, temporary in partial.items():
        temporary.replace(folder / file)


def unstack(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter under its official names: stacked experts become one gate, up and down tensor each."""
    stacked = _STACKED.match(name)
    if not stacked:
        yield name, tensor
        return
    prefix, kind = stacked.groups()
    for expert, matrix in enumerate(tensor):
        if kind == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", matrix.clone()
        else:
            gate, up = matrix.chunk(2, dim=0)
            yield f"{prefix}.{expert}.gate_proj.weight", gate.clone()
            yield f"{prefix}.{expert}.up_proj.weight", up.clone()
