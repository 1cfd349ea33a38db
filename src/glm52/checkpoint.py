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
from safetensors.torch import save_file
from torch import Tensor

from glm52.config import GLMConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")


def write_checkpoint(
    folder: Path, config: GLMConfig, parameters: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int = 5 << 30
) -> None:
    """Write config.json and weights under their official names, whole or not at all.

    Shards are filled in order up to ``max_shard_bytes``; one shard needs no index.
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
    for file, tensors in zip(names, shards, strict=True):
        temporary = folder / f".{file}.partial"
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(folder / file)
    if len(shards) > 1:
        weight_map = {name: file for file, tensors in zip(names, shards, strict=True) for name in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")


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
