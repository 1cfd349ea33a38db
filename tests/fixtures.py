"""Tiny random models in the official on-disk format, with the shipped tokenizer and template beside them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glm52.config import GLMConfig
from glm52.hub import NANO
from glm52.load import save
from glm52.model import GLM


def tiny_config(**overrides: Any) -> GLMConfig:
    """Seven layers with the full schedule, MTP, and DSA that selects 6 rows."""
    layers = 7
    config = GLMConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, q_lora_rank=24,
        kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=16, intermediate_size=48,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, index_n_heads=2, index_head_dim=8,
        index_topk=6, rope_theta=1e4, indexer_types=("full", "full", "full", "shared", "shared", "shared", "full"),
        mlp_layer_types=("dense", *["sparse"] * (layers - 1)), num_nextn_predict_layers=1, routed_scaling_factor=2.5,
        max_position_embeddings=512, eos_token_id=(0,), dtype="float32",
    )  # fmt: skip
    return replace(config, **overrides)


def random_model(config: GLMConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> GLM:
    """Matrices N(0, 1 / fan_in), so that attention, routing and selection have visible effect."""
    model = GLM(config).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        scaled = noise * p.shape[-1] ** -0.5 if p.dim() > 1 else (0.0 if "bias" in name else 1.0) + 0.1 * noise
        p.copy_(scaled)
    return model


def write_tiny(folder: Path, seed: int = 0, **overrides: Any) -> GLMConfig:
    """A random model that can chat (nonsense): the vocabulary is the shipped tokenizer's."""
    config = tiny_config(**{"vocab_size": 4096, "eos_token_id": (4060, 4067, 4069), "pad_token_id": 4060} | overrides)
    save(random_model(config, seed), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(NANO / name, folder / name)
    return config
