"""Quantised checkpoints of every layout that is read, written here from the layouts' descriptions: what is loaded is what was meant.

A writer makes random codes, packs them and says which matrix they stand for; a checkpoint of those matrices, unquantised, is the
oracle.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm52 import ops
from glm52.cache import Spans
from glm52.checkpoint import Checkpoint
from glm52.config import GLMConfig
from glm52.contents import expected_tensors
from glm52.errors import CheckpointError
from glm52.inspect import describe_checkpoint
from glm52.load import load, load_for_inference, save
from glm52.packing import Packer
from glm52.quant import QTensor, quantize_fp8
from tests.fixtures import random_model, tiny_config

GROUP, BLOCK = 32, 128
CONFIG = tiny_config(
    hidden_size=64, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, intermediate_size=96,
    moe_intermediate_size=32, index_topk=1000, num_experts_per_tok=4, num_hidden_layers=3, indexer_types=("full", "full", "shared"),
    mlp_layer_types=("dense", "sparse", "sparse"),
)  # fmt: skip
Written = tuple[dict[str, Tensor], Tensor]
needs_kernels = pytest.mark.skipif(ops.backend() == "reference", reason="built without native kernels")


def words(values: np.ndarray, bits: int, order: tuple[int, ...] = ()) -> Tensor:
    """Codes [A, B] to int32 [A, B * bits / 32]: in each word value order[i] of its values lies at bit i * bits."""
    count = 32 // bits
    out = np.zeros((len(values), -(-values.shape[1] // count)), dtype=np.uint32)
    for column in range(out.shape[1]):
        for i, j in enumerate(order or range(count)):
            if column * count + j < values.shape[1]:
                out[:, column] |= values[:, column * count + j].astype(np.uint32) << (i * bits)
    return torch.from_numpy(out.view(np.int32))


def codes(shape: tuple[int, int], group: int, rng: np.random.Generator, bits: int = 4, symmetric: bool = False) -> Any:
    """Codes from 0 upwards [N, K], scales and zeros [N, groups], and the matrix they mean."""
    (rows, columns), middle = shape, 1 << bits - 1
    groups = -(-columns // group)
    q = rng.integers(0, 2 * middle, shape)
    z = (
        np.full((rows, groups), middle)
        if symmetric
        else middle + rng.integers(-middle // 2, middle // 2 + 1, (rows, groups))
    )
    scale = torch.from_numpy(rng.uniform(0.5, 1.5, (rows, groups)) * 2 / middle * columns**-0.5).half()
    each = [torch.from_numpy(np.asarray(t)).float().repeat_interleave(group, 1)[:, :columns] for t in (z, scale)]
    return q, scale, z, (torch.from_numpy(q).float() - each[0]) * each[1]


def awq(shape: tuple[int, int], rng: np.random.Generator) -> Written:
    q, scale, z, w = codes(shape, GROUP, rng)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": words(q.T, 4, order), "qzeros": words(z.T, 4, order), "scales": scale.t().contiguous()}, w


def gptq(shape: tuple[int, int], rng: np.random.Generator, stored_less: int = 1, symmetric: bool = False) -> Written:
    q, scale, z, w = codes(shape, GROUP, rng, symmetric=symmetric)
    return {
        "qweight": words(q, 4).t().contiguous(), "qzeros": words(z.T - stored_less, 4), "scales": scale.t().contiguous(),
        "g_idx": torch.arange(shape[1], dtype=torch.int32) // GROUP,
    }, w  # fmt: skip


def packed(
    shape: tuple[int, int], rng: np.random.Generator, symmetric: bool = True, bits: int = 4, channel: bool = False
) -> Written:
    q, scale, z, w = codes(shape, shape[1] if channel else GROUP, rng, bits, symmetric)
    tensors = {"weight_packed": words(q, bits), "weight_scale": scale, "weight_shape": torch.tensor(shape)}
    return tensors | ({} if symmetric else {"weight_zero_point": words(z.T, 4).t().contiguous()}), w


def int8(shape: tuple[int, int], rng: np.random.Generator, group: int | None = None) -> Written:
    q, scale, _, w = codes(shape, group or shape[1], rng, 8, symmetric=True)
    return {"weight": torch.from_numpy(q - 128).to(torch.int8), "weight_scale": scale}, w


def fp8(shape: tuple[int, int], rng: np.random.Generator, scale_name: str = "weight_scale_inv") -> Written:
    data, scale = quantize_fp8(torch.from_numpy(rng.standard_normal(shape)).float() * shape[1] ** -0.5)
    i, j = (torch.arange(n) // BLOCK for n in shape)
    return {"weight": data, scale_name: scale}, data.float() * scale[i][:, j]


def fp8_rows(shape: tuple[int, int], rng: np.random.Generator) -> Written:
    w = torch.from_numpy(rng.standard_normal(shape)).float() * shape[1] ** -0.5
    scale = w.abs().amax(1, keepdim=True) / 448
    data = (w / scale).to(torch.float8_e4m3fn)
    return {"weight": data, "weight_scale": scale}, data.float() * scale


def compressed(fmt: str, **weights: Any) -> dict[str, Any]:
    defaults = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": defaults | weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {"quant_method": "compressed-tensors", "format": fmt, "quantization_status": "compressed", "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*weights_proj", "model.layers.3.eh_proj"], "kv_cache_scheme": None}  # fmt: skip


AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["mlp.gate"],
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False, "checkpoint_format": "gptq",
        "dynamic": {"-:.*weights_proj": {}}}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
LAYOUTS: dict[str, tuple[dict[str, Any], Callable[..., Written], str]] = {
    "fp8": (FP8, fp8, "fp8"),
    "awq": (AWQ, awq, "int4"),
    "gptq": (GPTQ, gptq, "int4"),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda s, r: gptq(s, r, 0), "int4"),
    "gptq symmetric": (GPTQ | {"sym": True}, lambda s, r: gptq(s, r, symmetric=True), "int4"),
    "w4a16": (compressed("pack-quantized"), packed, "int4"),
    "w4a16 asymmetric": (compressed("pack-quantized", symmetric=False), lambda s, r: packed(s, r, symmetric=False), "int4"),
    "w4a16 by channel": (compressed("pack-quantized", strategy="channel", group_size=None), lambda s, r: packed(s, r, channel=True), "int4"),
    "w8a16": (compressed("pack-quantized", num_bits=8), lambda s, r: packed(s, r, bits=8), "int8"),
    "int8 by channel": (compressed("int-quantized", num_bits=8, strategy="channel", group_size=None), int8, "int8"),
    "int8 by group": (compressed("naive-quantized", num_bits=8), lambda s, r: int8(s, r, GROUP), "int8"),
    "fp8 by channel": (compressed("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None), fp8_rows, "fp8"),
    "fp8 by block": (compressed("float-quantized", num_bits=8, type="float", strategy="block", group_size=None, block_structure=[128, 128]),
                     lambda s, r: fp8(s, r, "weight_scale"), "fp8"),
}  # fmt: skip
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "weights_proj", "eh_proj")


def write(folder: Path, name: str, config: GLMConfig = CONFIG, kept: tuple[str, ...] = KEPT) -> tuple[Path, Path]:
    """A quantised checkpoint, and its oracle."""
    quantization, writer, _ = LAYOUTS[name]
    model, rng = random_model(config), np.random.default_rng(0)
    tensors, exact = {}, {}
    for weight, shape in expected_tensors(config).items():
        exact[weight] = model.weight(weight).contiguous()
        if len(shape) == 2 and not any(k in weight for k in kept):
            parts, exact[weight] = writer(shape, rng)
            tensors |= {weight.removesuffix("weight") + part: t for part, t in parts.items()}
        else:
            tensors[weight] = exact[weight].clone()
    for path, content, config_ in ((folder / "quantized", tensors, replace(config, quantization_config=quantization)),
                                   (folder / "oracle", exact, config)):  # fmt: skip
        path.mkdir(parents=True)
        save_file({n: t.contiguous() for n, t in content.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config_.to_dict()))
    return folder / "quantized", folder / "oracle"


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    ids = torch.randint(0, 60, (100,), generator=torch.Generator().manual_seed(1))
    return model.logits(model(ids, Spans.of_sequence(0, 100, 16), model.new_cache(112)))


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_matrix_is_what_was_stored(name: str, tmp_path: Path) -> None:
    quantized, oracle = write(tmp_path, name)
    checkpoint, exact = Checkpoint(quantized, GLMConfig.read(quantized)), load_file(oracle / "model.safetensors")
    assert set(checkpoint.quantized) == {
        n for n in exact if n.endswith("weight") and exact[n].dim() == 2 and not any(k in n for k in KEPT)
    }
    for weight in checkpoint.quantized:
        stored = checkpoint.weight(weight)
        assert isinstance(stored, QTensor) and stored.format == LAYOUTS[name][2]
        assert torch.equal(stored.dequantize(), exact[weight]), weight
        assert (stored.zero is None) == (name not in ("awq", "gptq", "gptq v2", "w4a16 asymmetric"))
    model, expected = load(quantized), load(oracle)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    save(model, tmp_path / "again")  # what was dequantized is saved as what it is
    assert torch.equal(logits(load(tmp_path / "again")), logits(expected))


@needs_kernels
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_the_dequantized_model(name: str, tmp_path: Path) -> None:
    """In f32 the bound of ``test_native``. Packed as stored, what is left is activations rounded to bf16; so it is no further from the
    oracle than the bf16 body, which rounds the weights besides: 1.25 times, for the luck of one sample. A wrong scale is 0.5 of the
    deviation, bf16 0.03."""
    quantized, oracle = write(tmp_path, name)
    expected = logits(load(oracle, dtype=torch.float32))
    fmt = LAYOUTS[name][2]
    native = load_for_inference(quantized)
    assert native.format is None
    got = logits(native)
    assert (
        rms(got - expected)
        < 1.25 * rms(logits(load_for_inference(quantized, "bf16")) - expected)
        < 0.05 * rms(expected)
    )
    converted = logits(load_for_inference(quantized, "f32"))
    assert (converted - expected).abs().max() < 1e-4
    if fmt == "fp8":
        assert torch.equal(logits(load_for_inference(quantized, "fp8")), got)  # the same bytes


@needs_kernels
def test_what_is_stored_is_packed_and_what_is_not_stays(tmp_path: Path) -> None:
    """kv_a and wk beside a quantised q_a, and down_proj beside quantised gate and up, keep bf16, as their lists say."""
    kept = (*KEPT, "kv_a_proj", "wk", "down_proj")
    quantized, oracle = write(tmp_path, "awq", kept=kept)
    checkpoint = Checkpoint(quantized, GLMConfig.read(quantized))
    layer = Packer(checkpoint, None, ops.kernels()).layer(1)
    assert [(w.format, w.rows) for w in layer["a"]] == [("int4", 64), ("bf16", 48)]
    assert [w.format for w in layer["q"]] == ["int4"]
    assert [(gate_up.format, down.format) for gate_up, down in layer["experts"]] == [("int4", "bf16")] * 4
    assert {w.format for w in layer["value"]} == {"int4"} and {w.format for w in layer["key"]} == {"bf16"}
    expected = logits(load(oracle, dtype=torch.float32))
    in_bf16 = logits(load_for_inference(quantized, "bf16"))
    assert rms(logits(load_for_inference(quantized)) - expected) < 1.25 * rms(in_bf16 - expected)


def test_fp8_reaches_the_kernels_byte_by_byte(tmp_path: Path) -> None:
    """What is handed to ``pack`` are the file's E4M3 bits, and for each row its block's scales: nothing is rounded again."""
    quantized, _ = write(tmp_path, "fp8")
    tensors, given = load_file(quantized / "model.safetensors"), []
    recorder = SimpleNamespace(pack=lambda *args, **_: given.append(args))
    for fmt in (None, "fp8"):
        given.clear()
        Packer(Checkpoint(quantized, CONFIG), fmt, recorder).layer(0)
        for name, rows in (("self_attn.q_a_proj", slice(0, 64)), ("self_attn.kv_a_proj_with_mqa", slice(64, 104)),
                           ("self_attn.o_proj", slice(None)), ("mlp.down_proj", slice(None))):  # fmt: skip
            stored = tensors[f"model.layers.0.{name}.weight"].view(torch.uint8)
            scale = tensors[f"model.layers.0.{name}.weight_scale_inv"].repeat_interleave(BLOCK, 0)[: len(stored)]
            assert any(
                args[0] == "fp8" and torch.equal(args[1][rows], stored) and torch.equal(args[2][rows], scale)
                for args in given if len(args) == 4 and len(args[1][rows]) == len(stored)
            ), name  # fmt: skip


@needs_kernels
def test_fp8_heads_that_straddle_blocks_are_packed_as_stored(tmp_path: Path) -> None:
    """kv_b_proj is split by head and its key rows transposed: 224 rows a head, so the second one's keys cross row 256."""
    config = replace(CONFIG, qk_nope_head_dim=96, v_head_dim=128, kv_lora_rank=160)
    quantized, oracle = write(tmp_path, "fp8", config)
    layer = Packer(Checkpoint(quantized, config), None, ops.kernels()).layer(0)
    kv_b = load_file(oracle / "model.safetensors")["model.layers.0.self_attn.kv_b_proj.weight"].view(2, 224, 160)
    x, y = torch.eye(96), torch.empty(96, 160)
    for key, exact in zip(layer["key"], kv_b, strict=True):
        assert key.format == "fp8"
        ops.kernels().linear(x, key, y, 1)
        assert torch.equal(y, exact[:96])
    assert all(w.format == "fp8" for w in layer["value"])


CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown method": ("awq", {"quant_method": "modelopt"}, r"quant_method: expected 'fp8' or .* found 'modelopt'"),
    "awq for other kernels": ("awq", {"version": "gemv"}, "version"),
    "awq of other bits": ("awq", {"bits": 3}, "bits"),
    "gptq for marlin": ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format"),
    "gptq with settings by module": ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
    "odd group": ("gptq", {"group_size": 30}, "group_size"),
    "another group": ("gptq", {"group_size": 64}, "shape"),
    "fp8 of other blocks": ("fp8", {"weight_block_size": [64, 64]}, "weight_block_size"),
    "another format": ("w4a16", {"format": "nvfp4-pack-quantized"}, "format"),
    "no groups": ("w4a16", {"config_groups": {}}, "config_groups"),
    "rotated": ("w4a16", {"transform_config": {"config_groups": {"a": {}}}}, "transform_config"),
    "sparse": ("w4a16", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "no pattern": ("w4a16", {"ignore": ["re:("]}, "not a pattern"),
    "not an object": ("w4a16", {"config_groups": {"group_0": 3}}, "weights"),
    "quantised though excluded": ("w4a16", {"ignore": ["re:.*o_proj"]}, "o_proj"),
    "excluded by parts of its name": ("awq", {"modules_to_not_convert": ["self_attn.o_proj"]}, "o_proj"),
    "zeros that were not announced": ("w4a16 asymmetric", compressed("pack-quantized"), "weight_zero_point"),
    "zeros that are missing": ("w4a16", compressed("pack-quantized", symmetric=False), "weight_zero_point"),
    "the layout of another method": ("awq", compressed("pack-quantized"), "missing"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_understood_is_named(change: str, tmp_path: Path) -> None:
    name, update, named = CHANGES[change]
    quantized, _ = write(tmp_path, name)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] |= update
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=named):
        load(quantized)


def test_activation_order_is_refused(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, "gptq")
    tensors = load_file(quantized / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous() + 1
    save_file(tensors, quantized / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"o_proj\.g_idx.*activation order"):
        load(quantized)


@pytest.mark.parametrize(("name", "part", "spoil", "named"), [
    ("awq", "scales", None, "o_proj.scales.*get the folder again"),
    ("awq", "qzeros", lambda t: t[:1], r"o_proj.qzeros has shape \[1, 8\], expected \[2, 8\].*check"),
    ("awq", "qweight", lambda t: t.long(), "o_proj.qweight has dtype I64, expected I32.*check"),
    ("gptq", "qweight", lambda t: t.t(), "o_proj.qweight has shape.*check"),
    ("gptq", "qzeros", lambda t: t | 15, "o_proj.qzeros: expected zero points less one, 0 to 14, found 15.*gptq_v2"),
    ("w4a16", "weight_scale", lambda t: t.int(), "o_proj.weight_scale has dtype I32, expected F64 or F32.*check"),
    ("w4a16", "weight_shape", None, "o_proj.weight_shape.*get the folder again"),
    ("w4a16 asymmetric", "weight_zero_point", lambda t: t.t(), "o_proj.weight_zero_point has shape.*check"),
    ("fp8", "weight_scale_inv", None, "o_proj.weight_scale_inv.*get the folder again"),
])  # fmt: skip
def test_a_spoilt_tensor_is_named(
    name: str, part: str, spoil: Callable[[Tensor], Tensor] | None, named: str, tmp_path: Path
) -> None:
    quantized, _ = write(tmp_path, name, replace(CONFIG, v_head_dim=32))
    tensors = load_file(quantized / "model.safetensors")
    key = f"model.layers.0.self_attn.o_proj.{part}"
    old = tensors.pop(key)
    save_file(tensors | ({key: spoil(old).contiguous()} if spoil else {}), quantized / "model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        load(quantized)


def test_inspect_says_what_does_not_load(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, "awq")
    report = describe_checkpoint(quantized, replace(CONFIG, quantization_config={"quant_method": "modelopt"}))
    assert report["bytes"] and "modelopt" in report["does_not_load"]


@pytest.mark.parametrize("name", ["fp8", "awq", "w4a16"])
def test_inspect_counts_what_is_quantised(name: str, tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, name)
    report = describe_checkpoint(quantized, GLMConfig.read(quantized))
    tensors = load_file(quantized / "model.safetensors")
    kept = sum(t.nbytes for n, t in tensors.items() if any(k in n for k in KEPT))
    assert report["bytes"] == sum(t.nbytes for t in tensors.values())
    assert report["quantized"]["bytes"] == report["bytes"] - kept
    matrices = 4 * 5 + 3 * 2 + 3 + 3 * 5 * 3  # attention, indexers, dense MLP, experts
    assert report["quantized"]["kinds"] == {
        "fp8 in blocks of 128 x 128" if name == "fp8" else "int4 in groups of 32": matrices
    }
