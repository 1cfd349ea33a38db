"""What a checkpoint must hold for its configuration, and whether it does, from its headers alone. No torch.

Every tensor is expected, with its shape and dtype, or may be ignored; CheckpointError says which is missing, unknown or
of another shape. ``checkpoint`` reads the values.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glm52.config import GLMConfig
from glm52.errors import CheckpointError
from glm52.headers import TensorInfo
from glm52.schemes import FLOATS, Quantization, Scheme, Tensors

logger = logging.getLogger(__name__)

ROUTER_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Contents:
    """A folder whose headers agree with its configuration.

    config: the configuration that loads, without MTP if the files have none. shapes: of every weight, as if none were
    quantised. quantized: how each quantised matrix is stored, by the name of its weight.
    """

    config: GLMConfig
    tensors: dict[str, TensorInfo]
    shapes: dict[str, tuple[int, ...]]
    quantized: dict[str, Scheme]


def account(folder: Path, tensors: dict[str, TensorInfo], config: GLMConfig) -> Contents:
    """Hold a folder's tensors against a configuration, or CheckpointError lists what is missing or does not belong.

    What may be there and is not used: copies of embedding and head in the MTP layer, indexers of layers that share
    (both published by converters), rotary tables, and an MTP layer the configuration does not announce.
    """
    mtp = f"model.layers.{config.num_hidden_layers}."
    if config.num_nextn_predict_layers and not any(n.startswith(mtp) for n in tensors):
        logger.warning("%s announces an MTP layer and holds none: no drafts will be made", folder)
        config = replace(config, num_nextn_predict_layers=0)
    shapes = expected_tensors(config)
    quantized: dict[str, Scheme] = {}
    quantization = Quantization.parse(config.quantization_config)
    for name, shape in shapes.items():
        scheme = quantization.find(name.removesuffix(".weight"), tensors) if len(shape) == 2 else None
        if scheme:
            quantized[name] = scheme
    contents = Contents(config, tensors, shapes, quantized)
    _verify(folder, contents)
    return contents


def _verify(folder: Path, contents: Contents) -> None:
    """Every tensor is expected, with its shape and dtype, or may be ignored."""
    expected: Tensors = {}
    may_be: set[str] = set()
    for name, shape in contents.shapes.items():
        if scheme := contents.quantized.get(name):
            module = name.removesuffix("weight")
            expected |= {module + part: found for part, found in scheme.tensors(shape).items()}
            may_be.add(f"{module}{scheme.order}")
        else:
            expected[name] = (shape, FLOATS)
    tensors = contents.tensors
    missing = [n for n in expected if n not in tensors]
    if missing:
        raise CheckpointError(f"{folder}: {_some(missing)} missing; get the folder again or check that config.json "
                              "belongs to it")  # fmt: skip
    unexpected = [n for n in tensors if n not in expected and n not in may_be and not _is_ignorable(n, contents.config)]
    if unexpected:
        raise CheckpointError(f"{folder}: {_some(unexpected)} not of this model; check that config.json belongs to it")
    for name, (shape, dtypes) in expected.items():
        info = tensors[name]
        if info.shape != shape:
            raise CheckpointError(f"{info.shard}: {name} has shape {list(info.shape)}, expected {list(shape)} from "
                                  "config.json; check that it belongs to the file")  # fmt: skip
        if info.dtype not in dtypes:
            raise CheckpointError(f"{info.shard}: {name} has dtype {info.dtype}, expected {' or '.join(dtypes)}; "
                                  "check that config.json's quantization_config belongs to the file")  # fmt: skip


def _some(names: Sequence[str]) -> str:
    """How many tensors, the first by name, and the verb."""
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({listed}) {'are' if len(names) > 1 else 'is'}"


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
    shapes = {"mlp.gate.weight": (config.n_routed_experts, D), f"mlp.gate.{ROUTER_BIAS}": (config.n_routed_experts,)}
    for expert in range(config.n_routed_experts):
        shapes |= _mlp(f"mlp.experts.{expert}", D, F)
    return shapes | _mlp("mlp.shared_experts", D, F * config.n_shared_experts)


def _is_ignorable(name: str, config: GLMConfig) -> bool:
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    if layer is None:
        return name.endswith("rotary_emb.inv_freq")
    number, rest = int(layer[1]), layer[2]
    if number == config.num_hidden_layers:
        return not config.num_nextn_predict_layers or rest in ("embed_tokens.weight", "shared_head.head.weight")
    is_shared = number < config.num_hidden_layers and number not in config.index_layers
    return rest.endswith("rotary_emb.inv_freq") or (is_shared and rest.startswith("self_attn.indexer."))
