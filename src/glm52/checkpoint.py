"""Official checkpoints: sharded safetensors whose every header is checked before anything in it is trusted.

Reading validates the index, each shard's header, and that the tensors are exactly the model's. Writing gives the same
layout back: routed experts, stacked in memory, are split into the checkpoint's names. What is wrong raises
CheckpointError with what, where and what to do.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glm52.config import GLMConfig
from glm52.errors import CheckpointError
from glm52.headers import INDEX, SINGLE, read_headers
from glm52.layouts import read_matrix
from glm52.quant import QTensor
from glm52.schemes import FLOATS, Quantization, Scheme, Tensors

logger = logging.getLogger(__name__)

_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")
_BIAS = "e_score_correction_bias"


def expected_tensors(config: GLMConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the official layout with its shape, the MTP layer's included, as if none were quantised."""
    D, H, C = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (config.vocab_size, D),
    }
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        tensors = {
            "input_layernorm.weight": (D,),
            "post_attention_layernorm.weight": (D,),
            "self_attn.q_a_proj.weight": (config.q_lora_rank, D),
            "self_attn.q_a_layernorm.weight": (config.q_lora_rank,),
            "self_attn.q_b_proj.weight": (H * config.qk_head_dim, config.q_lora_rank),
            "self_attn.kv_a_proj_with_mqa.weight": (config.row_width, D),
            "self_attn.kv_a_layernorm.weight": (C,),
            "self_attn.kv_b_proj.weight": (H * (config.qk_nope_head_dim + config.v_head_dim), C),
            "self_attn.o_proj.weight": (D, H * config.v_head_dim),
            **(_indexer(config) if layer in config.index_layers else {}),
            **(_experts(config) if config.is_sparse(layer) else _mlp("mlp", D, config.intermediate_size)),
        }
        if layer == config.num_hidden_layers:
            tensors |= {f"{n}.weight": (D,) for n in ("enorm", "hnorm", "shared_head.norm")}
            tensors["eh_proj.weight"] = (D, 2 * D)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in tensors.items()}
    return shapes


def _mlp(prefix: str, D: int, F: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (F, D),
        f"{prefix}.up_proj.weight": (F, D),
        f"{prefix}.down_proj.weight": (D, F),
    }


def _indexer(config: GLMConfig) -> dict[str, tuple[int, ...]]:
    X, I = config.index_n_heads, config.index_head_dim
    return {
        "self_attn.indexer.wq_b.weight": (X * I, config.q_lora_rank),
        "self_attn.indexer.wk.weight": (I, config.hidden_size),
        "self_attn.indexer.k_norm.weight": (I,),
        "self_attn.indexer.k_norm.bias": (I,),
        "self_attn.indexer.weights_proj.weight": (X, config.hidden_size),
    }


def _experts(config: GLMConfig) -> dict[str, tuple[int, ...]]:
    D, F = config.hidden_size, config.moe_intermediate_size
    shapes = {"mlp.gate.weight": (config.n_routed_experts, D), f"mlp.gate.{_BIAS}": (config.n_routed_experts,)}
    for expert in range(config.n_routed_experts):
        shapes |= _mlp(f"mlp.experts.{expert}", D, F)
    return shapes | _mlp("mlp.shared_experts", D, F * config.n_shared_experts)


class Checkpoint:
    """A folder of official weights: headers now, tensors when asked for.

    config: the configuration that loads, without MTP if the file has none. quantized: how each quantised matrix is
    stored, by the name of its weight.
    """

    def __init__(self, folder: Path, config: GLMConfig) -> None:
        """Hold the tensors against the configuration, or CheckpointError lists what is missing or does not belong.

        What may be there and is not used: copies of embedding and head in the MTP layer, indexers of layers that share
        (both published by converters), rotary tables, and an MTP layer the configuration does not announce.
        """
        self.folder = folder
        self.tensors = read_headers(folder)
        self._open: dict[Path, safe_open] = {}
        mtp = f"model.layers.{config.num_hidden_layers}."
        if config.num_nextn_predict_layers and not any(n.startswith(mtp) for n in self.tensors):
            logger.warning("%s announces an MTP layer and holds none: no drafts will be made", folder)
            config = replace(config, num_nextn_predict_layers=0)
        self.config = config
        self._shapes = expected_tensors(config)
        self.quantized: dict[str, Scheme] = {}
        quantization = Quantization.parse(config.quantization_config)
        for name, shape in self._shapes.items():
            scheme = quantization.find(name.removesuffix(".weight"), self.tensors) if len(shape) == 2 else None
            if scheme:
                self.quantized[name] = scheme
        self._verify()

    def _verify(self) -> None:
        """Every tensor is expected, with its shape and dtype, or may be ignored."""
        expected: Tensors = {}
        may_be: set[str] = set()
        for name, shape in self._shapes.items():
            if scheme := self.quantized.get(name):
                module = name.removesuffix("weight")
                expected |= {module + part: found for part, found in scheme.tensors(shape).items()}
                may_be.add(f"{module}{scheme.order}")
            else:
                expected[name] = (shape, FLOATS)
        missing = [n for n in expected if n not in self.tensors]
        if missing:
            raise CheckpointError(f"{self.folder}: {len(missing)} tensors are missing, first {missing[:10]}; get the "
                                  "folder again or check that config.json belongs to it")  # fmt: skip
        unexpected = [
            n for n in self.tensors if n not in expected and n not in may_be and not _is_ignorable(n, self.config)
        ]
        if unexpected:
            raise CheckpointError(f"{self.folder}: {len(unexpected)} tensors are not of this model, first "
                                  f"{unexpected[:10]}; check that config.json belongs to it")  # fmt: skip
        for name, (shape, dtypes) in expected.items():
            info = self.tensors[name]
            if info.shape != shape:
                raise CheckpointError(f"{info.shard}: {name} has shape {list(info.shape)}, expected {list(shape)} from "
                                      "config.json; check that it belongs to the file")  # fmt: skip
            if info.dtype not in dtypes:
                raise CheckpointError(f"{info.shard}: {name} has dtype {info.dtype}, expected {' or '.join(dtypes)}; "
                                      "check that config.json's quantization_config belongs to the file")  # fmt: skip

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
        return read_matrix(scheme, name.removesuffix(".weight"), self._shapes[name],
                           lambda n: self.read(n) if n in self.tensors else None)  # fmt: skip

    def read_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight in ``dtype``, dequantized where it is stored quantised."""
        w = self.weight(name)
        return (w.dequantize() if isinstance(w, QTensor) else w).to(dtype)


def _is_ignorable(name: str, config: GLMConfig) -> bool:
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    if layer is None:
        return name.endswith("rotary_emb.inv_freq")
    number, rest = int(layer[1]), layer[2]
    if number == config.num_hidden_layers:
        return not config.num_nextn_predict_layers or rest in ("embed_tokens.weight", "shared_head.head.weight")
    is_shared = number < config.num_hidden_layers and number not in config.index_layers
    return rest.endswith("rotary_emb.inv_freq") or (is_shared and rest.startswith("self_attn.indexer."))


def read_parameters(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters by their names in memory, experts stacked; the router's bias stays fp32."""
    config = checkpoint.config
    for name in expected_tensors(config):
        if ".mlp.experts." not in name:
            yield name, checkpoint.read_as(name, torch.float32 if name.endswith(_BIAS) else dtype)
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
