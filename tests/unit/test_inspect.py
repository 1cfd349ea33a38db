"""``glm52 inspect``: what it says of folders, good and bad."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm52 import cli
from glm52.checkpoint import Checkpoint
from glm52.config import GLMConfig
from glm52.errors import CheckpointError
from tests.fixtures import write_tiny

Tensors = dict[str, torch.Tensor]
NORM, DOWN = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"


def inspect(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.main(["inspect", *args])
    return code, *capsys.readouterr()


def edit(folder: Path, change: Callable[[Tensors], Any], **config: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (lambda t: None, {"n_routed_experts": 6}, "tensors (model.layers.1.mlp.experts.4.gate_proj.weight, "),
        (lambda t: None, {"hidden_size": 64}, "has shape [4096, 32], expected [4096, 64]"),
        (lambda t: t.update(extra=torch.zeros(1)), {}, "1 tensor (extra) is not of this model"),
        (lambda t: t.update({"other": t.pop(NORM)}), {}, f"1 tensor ({NORM}) is missing"),
        (lambda t: t.update({DOWN: t[DOWN].t().contiguous()}), {}, f"{DOWN} has shape"),
        (lambda t: t.update({DOWN: t[DOWN].to(torch.int16)}), {}, f"{DOWN} has dtype I16"),
    ],
)
def test_what_does_not_load_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Tensors], Any], config: Any, words: str
) -> None:
    """Such folders were called checked, and ``glm52 chat`` refused them."""
    write_tiny(tmp_path)
    assert inspect(capsys, str(tmp_path))[1].endswith("headers checked\n")
    edit(tmp_path, change, **config)
    code, out, _ = inspect(capsys, str(tmp_path))
    assert code == 1 and "headers checked" not in out
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path, GLMConfig.read(tmp_path))
    assert words in str(caught.value) and out.splitlines()[-1] == f"does not load: {caught.value}"
    assert str(caught.value).count("model.layers.") <= 3


def test_units_fit_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    """The small model had 0.0 GFLOP and 0.01 GiB. A context that no model has was described without a word."""
    code, out, err = inspect(capsys)
    assert code == 0 and not err
    assert "9.2   MFLOP" in out and "19,752,384   bytes = 18.84 MiB" in out and "GiB" not in out
    code, out, err = inspect(capsys, "nano", "--context", "1000000")
    assert code == 0 and "bytes = 1.91 GiB" in out
    assert "--context: the model's longest is 8,192" in err and err.count("\n") == 1


def test_a_damaged_file_is_described_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    code, out, _ = inspect(capsys, str(tmp_path))
    assert code == 1 and "7 layers" in out and "truncated" in out.splitlines()[-1]
