"""Official checkpoints: read back what was written, and refuse with a clear word everything that is wrong."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glm52.checkpoint import Checkpoint, write_checkpoint
from glm52.config import GLMConfig
from glm52.contents import expected_tensors
from glm52.errors import CheckpointError, ConfigError, GLMError
from glm52.headers import read_header
from glm52.load import load, save
from glm52.quant import quantize_fp8
from tests.fixtures import random_model, tiny_config


def dequantize_fp8(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """By the definition of the FP8 checkpoint: W[i, j] = data[i, j] * scale[i // 128, j // 128]."""
    i, j = (torch.arange(n) // 128 for n in data.shape)
    return data.float() * scale[i][:, j]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    model = random_model(tiny_config())
    write_checkpoint(folder, model.config, model.state_dict().items(), max_shard_bytes=100_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "model")
    return tmp_path / "model"


def test_sharded_round_trip(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    state = random_model(tiny_config()).state_dict()
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())
    save(model, tmp_path / "again")
    assert set(read_header(tmp_path / "again" / "model.safetensors")) == set(expected_tensors(model.config))


def test_a_write_that_is_cut_off_leaves_no_mixture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a new model beside the index and config.json of an old one, or half an index, would have been loaded."""
    model, replace = random_model(tiny_config(), seed=1), Path.replace
    old, new = (random_model(tiny_config(), seed).lm_head.weight for seed in (0, 1))
    count = len(list(folder.glob("*.safetensors"))) + 2
    for done in range(count + 1):
        calls = iter(range(count))

        def cut(path: Path, target: Path, done: int = done, calls: Iterator[int] = calls) -> None:
            if next(calls) == done:
                raise OSError("no space left")
            replace(path, target)

        with monkeypatch.context() as patch, contextlib.suppress(OSError):
            patch.setattr(Path, "replace", cut)
            write_checkpoint(folder, model.config, model.state_dict().items(), max_shard_bytes=100_000)
        if done < count:
            with pytest.raises(ConfigError, match=r"config\.json"):
                load(folder)
    assert torch.equal(load(folder).lm_head.weight, new) and not torch.equal(old, new)
    assert not list(folder.glob(".*"))


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    change(data["weight_map"])
    path.write_text(json.dumps(data))


def edit_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the first shard, and the index with it."""
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    before = set(tensors)
    change(tensors)
    save_file(tensors, path)

    def update(weight_map: dict[str, str]) -> None:
        for name in before - set(tensors):
            del weight_map[name]
        weight_map.update(dict.fromkeys(set(tensors) - before, path.name))

    edit_index(folder, update)


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def overwrite(path: Path, at: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data)] = data
    path.write_bytes(raw)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: first_shard(f).unlink(), "missing"),
    "truncated shard": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-10]), "truncated"),
    "oversized shard": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes() + b"x"), "longer"),
    "empty shard": (lambda f: first_shard(f).write_bytes(b""), "truncated"),
    "header length": (lambda f: overwrite(first_shard(f), 0, b"\xff" * 8), "truncated or not"),
    "header bytes": (lambda f: overwrite(first_shard(f), 8, b"{{{"), "JSON"),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "weight_map"),
    "bottomless index": (lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000), "weight_map"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "expected model.safetensors"),
    "path leaves the folder": (
        lambda f: edit_index(f, lambda m: m.update({next(iter(m)): "../secret.safetensors"})), "leaves the folder"),
    "tensor in another shard": (
        lambda f: edit_index(f, lambda m: m.update({next(iter(m)): first_shard(f).name, list(m)[-1]: first_shard(f).name})),
        "different versions"),
    "missing tensor": (lambda f: edit_shard(f, lambda t: t.pop("model.embed_tokens.weight")), "1 tensor .* is missing"),
    "unexpected tensor": (lambda f: edit_shard(f, lambda t: t.update(extra=torch.zeros(1))), "not of this model"),
    "mis-shaped tensor": (
        lambda f: edit_shard(f, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(3, 3)})), "shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(folder: Path, name: str) -> None:
    damage, word = DAMAGE[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=word) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_without_the_mtp_layer_a_checkpoint_still_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(tiny_config())
    main = {n: t for n, t in model.state_dict().items() if not n.startswith("model.layers.7.")}
    write_checkpoint(tmp_path, model.config, main.items())
    assert load(tmp_path).mtp is None
    assert "MTP" in caplog.text


def test_published_extras_are_ignored(folder: Path) -> None:
    edit_shard(folder, lambda t: t.update({
        "model.layers.7.embed_tokens.weight": torch.zeros(1), "model.layers.7.shared_head.head.weight": torch.zeros(1),
        "model.layers.3.self_attn.indexer.wk.weight": torch.zeros(1), "model.rotary_emb.inv_freq": torch.zeros(1)}))  # fmt: skip
    load(folder)


def test_fp8_checkpoints_are_dequantized(tmp_path: Path) -> None:
    """Blocks of 128 x 128, partial ones at the edges, scales multiplied."""
    config = tiny_config(hidden_size=160, intermediate_size=200)
    model = random_model(config)
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    exact = dict(tensors)
    for name in [n for n in tensors if n.endswith(("_proj.weight", "wq_b.weight", "wk.weight")) and "eh_proj" not in n]:
        if "weights_proj" not in name:
            tensors[name], tensors[name + "_scale_inv"] = quantize_fp8(exact[name])
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load(tmp_path, dtype=torch.float32)
    name = "model.layers.0.mlp.down_proj.weight"
    assert Checkpoint(tmp_path, config).tensors[name].dtype == "F8_E4M3"
    assert torch.equal(loaded.state_dict()[name], dequantize_fp8(tensors[name], tensors[name + "_scale_inv"]))
    tensors[name + "_scale_inv"] = tensors[name + "_scale_inv"][:1, :1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="shape"):
        load(tmp_path)


def test_fp8_of_a_partial_block() -> None:
    """kv_a_proj_with_mqa has 4.5 blocks of rows: a [576, K] matrix goes with a scale of [5, K / 128]."""
    w = torch.randn(576, 300, generator=torch.Generator().manual_seed(0))
    w[512:] *= 100.0
    data, scale = quantize_fp8(w)
    assert tuple(scale.shape) == (5, 3)
    for block in (slice(0, 128), slice(512, 576)):
        bound = w[block].abs() * 2**-4 + scale.max() * 2**-10
        assert ((dequantize_fp8(data, scale) - w)[block].abs() <= bound).all()
    by_hand = data[575, 299].float() * scale[4, 2]
    assert dequantize_fp8(data, scale)[575, 299] == by_hand


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_loads_or_is_refused(pristine: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Any change to a header's bytes either leaves a consistent file or raises CheckpointError, nothing else."""
    raw = bytearray(first_shard(pristine).read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(raw)
    try:
        infos = read_header(path)
    except CheckpointError:
        return
    assert sum(i.num_bytes for i in infos.values()) == len(raw) - 8 - int.from_bytes(raw[:8], "little")


def test_config_and_weights_of_different_models(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_routed_experts": 3}))
    with pytest.raises(GLMError, match=r"config\.json"):
        load(folder)
    assert GLMConfig.read(folder).n_routed_experts == 3
