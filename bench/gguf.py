"""A ``glm_moe_dsa`` folder as a GGUF file of llama.cpp's architecture ``glm-dsa``, so that both compute with one set of
weights. No vocabulary (benchmarks feed ids) and no MTP layer (llama.cpp's greedy decoding does not use it).

Names and keys: llama.cpp src/models/glm-dsa.cpp, src/llama-arch.cpp, conversion/glm.py. Quantised files are made from
the bf16 one by llama.cpp's own quantiser; see ``bench.rivals``.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm52.config import GLMConfig
from glm52.load import load
from glm52.model import MLP, DecoderLayer, MoE

ARCH = "glm-dsa"


def write_gguf(folder: Path, path: Path, *, bf16: bool) -> None:
    """Write the folder's weights as bf16 or f32; vectors, routers and the indexers' head weights are always f32."""
    import gguf

    model = load(folder, dtype=torch.bfloat16 if bf16 else torch.float32)
    writer = gguf.GGUFWriter(path, ARCH)
    _write_keys(writer, model.config)

    def add(name: str, weight: Tensor, *, exact: bool = False) -> None:
        weight = weight.detach().contiguous()
        if bf16 and weight.ndim > 1 and not exact:
            data = weight.bfloat16().view(torch.uint8).numpy()
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, weight.float().numpy())

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    add("output.weight", model.lm_head.weight)
    for i, layer in enumerate(model.model.layers[: model.config.num_hidden_layers]):
        assert isinstance(layer, DecoderLayer)
        for name, weight in _layer(layer, model.config).items():
            add(f"blk.{i}.{name}", weight, exact=name in ("ffn_gate_inp.weight", "indexer.proj.weight"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_keys(writer: Any, config: GLMConfig) -> None:
    whole = {
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "block_count": config.num_hidden_layers,
        "leading_dense_block_count": config.mlp_layer_types.count("dense"),
        "feed_forward_length": config.intermediate_size, "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts, "expert_gating_func": 2,  # sigmoid
        "expert_group_count": config.n_group, "expert_group_used_count": config.topk_group,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": 1,  # the absorbed form
        "attention.key_length": config.row_width, "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim, "attention.value_length_mla": config.v_head_dim,
        "attention.q_lora_rank": config.q_lora_rank, "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.indexer.head_count": config.index_n_heads, "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk, "rope.dimension_count": config.qk_rope_head_dim,
    }  # fmt: skip
    for key, value in whole.items():
        writer.add_uint32(f"{ARCH}.{key}", value)
    writer.add_float32(f"{ARCH}.expert_weights_scale", config.routed_scaling_factor)
    writer.add_float32(f"{ARCH}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{ARCH}.rope.freq_base", config.rope_theta)
    writer.add_bool(f"{ARCH}.expert_weights_norm", config.norm_topk_prob)
    kinds = config.indexer_types[: config.num_hidden_layers]
    writer.add_array(f"{ARCH}.attention.indexer.types", [kind == "full" for kind in kinds])
    writer.add_tokenizer_model("none")


def _layer(layer: DecoderLayer, config: GLMConfig) -> dict[str, Tensor]:
    attention, index, mlp = layer.self_attn, layer.self_attn.indexer, layer.mlp
    kv_b = attention.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
    nope = config.qk_nope_head_dim
    out = {
        "attn_norm.weight": layer.input_layernorm.weight,
        "ffn_norm.weight": layer.post_attention_layernorm.weight,
        "attn_q_a.weight": attention.q_a_proj.weight,
        "attn_q_a_norm.weight": attention.q_a_layernorm.weight,
        "attn_q_b.weight": attention.q_b_proj.weight,
        "attn_kv_a_mqa.weight": attention.kv_a_proj_with_mqa.weight,
        "attn_kv_a_norm.weight": attention.kv_a_layernorm.weight,
        "attn_k_b.weight": kv_b[:, :nope].transpose(1, 2),
        "attn_v_b.weight": kv_b[:, nope:],
        "attn_output.weight": attention.o_proj.weight,
    }
    if index is not None:
        out |= {
            "indexer.k_norm.weight": index.k_norm.weight,
            "indexer.k_norm.bias": index.k_norm.bias,
            "indexer.proj.weight": index.weights_proj.weight,
            "indexer.attn_k.weight": index.wk.weight,
            "indexer.attn_q_b.weight": index.wq_b.weight,
        }
    if isinstance(mlp, MoE):
        gate, up = mlp.experts.gate_up_proj.chunk(2, dim=1)
        out |= {
            "ffn_gate_inp.weight": mlp.gate.weight,
            "exp_probs_b.bias": mlp.gate.e_score_correction_bias,
            "ffn_gate_exps.weight": gate,
            "ffn_up_exps.weight": up,
            "ffn_down_exps.weight": mlp.experts.down_proj,
        }
    dense, suffix = (mlp.shared_experts, "_shexp") if isinstance(mlp, MoE) else (mlp, "")
    assert isinstance(dense, MLP)
    return out | {
        f"ffn_gate{suffix}.weight": dense.gate_proj.weight,
        f"ffn_up{suffix}.weight": dense.up_proj.weight,
        f"ffn_down{suffix}.weight": dense.down_proj.weight,
    }
