"""config.json: every published trap, and the arithmetic of the real model to the byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from glm52.config import GLMConfig
from glm52.errors import CheckpointError, ConfigError
from glm52.hub import NANO
from glm52.inspect import describe, render
from glm52.session import generation_defaults

PRESETS = Path(NANO).parent / "presets"
FULL_52 = (0, 1, 2, *range(6, 75, 4))


def official(**changes: Any) -> dict[str, Any]:
    data = json.loads((PRESETS / "glm-5.2.json").read_text())
    data.update(changes)
    return {k: v for k, v in data.items() if v is not ...}


def test_the_figures_of_glm_5_2() -> None:
    report = describe(GLMConfig.preset("glm-5.2"), 1_048_576)
    assert report["parameters"]["total"] == 753_329_921_024
    assert report["parameters"]["router_biases"] == 19_456
    assert report["parameters"]["active"] == 40_297_758_720
    assert report["weight_bytes"]["bf16"] == 1_506_659_919_872
    assert report["weight_bytes"]["fp8"] == 755_617_140_416
    assert report["cache_bytes_per_token"]["bf16"]["total"] == 95_232
    assert report["cache_bytes_per_token"]["fp8"]["total"] == 53_940
    assert report["step"] == {"tokens": 2048, "scratch_bytes": 2048 * 898_816}
    assert report["layers"]["indexers"] == [*FULL_52, 78]
    assert round(report["flops_per_token"]["index_share_saving"], 2) == 2.88
    printed = render("glm-5.2", report)
    for figure in ("753,329,921,024", "19,456", "40,297,758,720", "1,506,659,919,872", "755,617,140,416", "95,232",
                   "53,940", "1,840,775,168   bytes = 1.71 GiB", "2.88x", "0, 1, 2, 6, 10, 14", "70, 74, 78"):  # fmt: skip
        assert figure in printed


def test_head_dim_is_never_believed() -> None:
    assert GLMConfig.from_dict(official(head_dim=192)) == GLMConfig.from_dict(official(head_dim=64))
    assert GLMConfig.from_dict(official(head_dim=192)).qk_rope_head_dim == 64


@pytest.mark.parametrize("rope", [..., {"rope_type": "default"}, {"rope_theta": "8e6"}])
def test_rope_theta_has_no_silent_default(rope: Any) -> None:
    with pytest.raises(ConfigError, match="rope_theta"):
        GLMConfig.from_dict(official(rope_parameters=rope, rope_theta=1e4))


def schedule(**changes: Any) -> tuple[int, ...]:
    types = GLMConfig.from_dict(official(**changes)).indexer_types
    return tuple(i for i, kind in enumerate(types) if kind == "full")


def test_the_schedule() -> None:
    missing: Any = ...
    assert schedule() == FULL_52
    assert schedule(indexer_types=missing) == FULL_52
    assert schedule(indexer_types=missing, index_topk_freq=missing, index_skip_topk_offset=missing) == tuple(range(78))
    assert schedule(indexer_types=missing, index_skip_topk_offset=missing)[:4] == (0, 1, 5, 9)
    assert schedule(indexer_types=["full"] + ["shared"] * 77) == (0,), "the explicit list wins over freq and offset"
    assert schedule(indexer_types=missing, index_topk_pattern="FS" * 39) == tuple(range(0, 78, 2))
    assert len(GLMConfig.preset("glm-5.1").index_layers) == 79


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "deepseek_v32"}, "model_type"),
        ({"indexer_types": ["full"] * 77}, "indexer_types"),
        ({"indexer_types": ["shared"] * 78}, "indexer_types"),
        ({"indexer_types": ["half"] * 78}, "indexer_types"),
        ({"mlp_layer_types": ["dense"] * 3}, "mlp_layer_types"),
        ({"num_hidden_layers": "78"}, "num_hidden_layers"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim: expected at least 1"),
        ({"intermediate_size": 0}, "intermediate_size: expected at least 1"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size: expected at least 1"),
        ({"vocab_size": ..., "q_lora_rank": None}, "^vocab_size, q_lora_rank: expected, found none"),
        ({"num_experts_per_tok": 300}, "num_experts_per_tok"),
        ({"n_group": 8}, "n_group"),
        ({"index_head_dim": 32}, "qk_rope_head_dim"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "rope_type"),
    ],
)
def test_wrong_configurations_name_the_field(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        GLMConfig.from_dict(official(**changes))


_HUGE, _NAN, _INFINITE = 10**400, float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("indexer_types", [1.5, True, 5, {}, [1], [[]]]),
        ("mlp_layer_types", [1.5, True, 5, {}, [1], [[]]]),
        ("index_topk_pattern", [1.5, True, [[]], [{}]]),
        ("index_topk_freq", ["x", [], 1.5, True, 0]),
        ("index_skip_topk_offset", ["x", [], {}, 1.5, True, -1]),
        ("first_k_dense_replace", ["x", [1], {"a": 1}, 1.5, True, -1]),
        ("num_hidden_layers", [True, 10**9, _HUGE]),
        ("num_experts_per_tok", [0, True]),
        ("index_topk", [0, 1 << 31, _HUGE]),
        ("max_position_embeddings", [0]),
        ("rms_norm_eps", ["x", [], True, 0, -1, _NAN, _INFINITE, _HUGE]),
        ("routed_scaling_factor", ["x", [], True, 0, -1, _NAN, _INFINITE, _HUGE]),
        ("rope_theta", [True, 0, -1, _NAN, _INFINITE, _HUGE]),
        ("norm_topk_prob", ["no", 1, []]),
        ("eos_token_id", ["a", ["a"], {"a": 1}, [[1]], [1.5], -1, True, 154_880, _HUGE]),
        ("dtype", [5, [], "float99"]),
    ],
)
def test_values_of_the_wrong_kind_name_the_field(key: str, values: list[Any]) -> None:
    """Some were a traceback, now or when the weights were loaded; others computed something else in silence."""
    without = {"indexer_types": ..., "mlp_layer_types": ...} if key.startswith(("index_", "first_")) else {}
    for value in values:
        changes = {"rope_parameters": {key: value}} if key == "rope_theta" else {key: value}
        with pytest.raises(ConfigError, match=f"^{key}: expected"):
            GLMConfig.from_dict(official(**without | changes))


def test_what_is_written_is_read_back() -> None:
    for config in (GLMConfig.preset("glm-5.2"), GLMConfig.preset("glm-5.1"), GLMConfig.read(NANO)):
        assert GLMConfig.from_dict(config.to_dict()) == config
    data = GLMConfig.preset("glm-5.2").to_dict()
    assert data["topk_method"] == "noaux_tc" and data["moe_layer_freq"] == 1 and data["scoring_func"] == "sigmoid"
    assert (data["index_topk_freq"], data["index_skip_topk_offset"]) == (4, 3)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        GLMConfig.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="JSON"):
        GLMConfig.read(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="JSON"):
        GLMConfig.read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="object"):
        GLMConfig.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(official(n_group=8)))
    with pytest.raises(ConfigError, match=r"^/.*/config\.json: n_group"):
        GLMConfig.read(tmp_path)
    with pytest.raises(ConfigError, match=r"glm-5\.2"):
        GLMConfig.preset("glm-9")


@pytest.mark.parametrize(
    ("key", "value"),
    [("scoring_func", "softmax"), ("hidden_act", "gelu"), ("tie_word_embeddings", True), ("attention_bias", True),
     ("rope_scaling", {"type": "yarn"}), ("rope_interleave", False), ("moe_layer_freq", 2)],
)  # fmt: skip
def test_what_would_be_computed_otherwise_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        GLMConfig.from_dict(official(**{key: value}))


def test_schedules_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="index_topk_freq"):
        GLMConfig.from_dict(official(indexer_types=..., index_topk_freq=0))
    dense = GLMConfig.from_dict(official(mlp_layer_types=..., first_k_dense_replace=None))
    assert set(dense.mlp_layer_types) == {"sparse"}


@pytest.mark.parametrize("text", ["", "null", "[1]", "[" * 100_000, '{"temperature": "a"}', '{"top_p": 5}'])
def test_damaged_defaults_of_sampling_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        generation_defaults(tmp_path)
