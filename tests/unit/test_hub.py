"""Where models are: folders, and repositories of the hub, of which nothing is fetched that is not needed."""

import fnmatch
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from glm52 import cli
from glm52.hub import NANO, name_of, resolve
from tests.fixtures import tiny_config

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with one repository of two shards; what was fetched of it."""
    files = ["config.json", "model.safetensors.index.json", "tokenizer.json", SHARD]
    fetched: list[str] = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        assert repository == "owner/name"
        for file in files:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                fetched.append(file)
                (tmp_path / file).write_text(contents[file])
        return str(tmp_path)

    index: dict[str, Any] = {"weight_map": {"a": SHARD, "b": SHARD, "c": SHARD.replace("1", "2")}}
    contents = {
        "config.json": json.dumps(tiny_config().to_dict()), "model.safetensors.index.json": json.dumps(index),
        "tokenizer.json": "{}", SHARD: "",
    }  # fmt: skip
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return fetched


def test_weights_are_fetched_where_they_are_needed(hub: list[str]) -> None:
    resolve("owner/name", weights=False)
    assert hub == ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    resolve("owner/name")
    assert SHARD in hub


def test_inspect_fetches_no_weights(hub: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It fetched the whole checkpoint, 755 GB for GLM-5.2."""
    assert cli.main(["inspect", "owner/name"]) == 0
    out = capsys.readouterr().out
    assert "7 layers" in out and SHARD not in hub
    assert out.endswith("3 tensors in 2 file(s), says the index; the weights are not here\n")


def test_a_repository_is_called_by_its_name_and_not_by_its_commit(tmp_path: Path) -> None:
    """``glm52 serve owner/name`` called its model by forty hexadecimal digits."""
    assert name_of(tmp_path / "models--zai-org--GLM-5.2-FP8" / "snapshots" / "0123abcd") == "GLM-5.2-FP8"
    assert name_of(NANO) == "nano"
