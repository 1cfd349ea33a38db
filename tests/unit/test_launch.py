"""Commands for other servers, and their flags where they mean little."""

import argparse
from pathlib import Path

import pytest

from glm52 import cli
from glm52.server import foreign


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(["launch", *args]) == 0
    return capsys.readouterr().out


def test_vllm_as_the_recipe_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    line = printed(capsys, "vllm")
    assert line.startswith(
        "vllm serve zai-org/GLM-5.2-FP8 --tensor-parallel-size 8 --kv-cache-dtype fp8 --speculative-config.method mtp "
        "--speculative-config.num_speculative_tokens 5 --max-model-len auto --enable-auto-tool-choice"
    )
    assert "--tool-call-parser glm47 --reasoning-parser glm45" in line
    assert "--kv-cache-dtype" not in printed(capsys, "vllm", "--gpu", "h20")
    assert "--kv-cache-dtype fp8_e4m3" in (blackwell := printed(capsys, "vllm", "--gpu", "b200"))
    assert "--max-num-seqs 32" in blackwell
    amd = printed(capsys, "vllm", "--gpu", "mi300x")
    assert amd.startswith("VLLM_ROCM_USE_AITER=1 VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=1 vllm serve")
    assert "--max-model-len 524288 --gpu-memory-utilization 0.80 --max-num-seqs 32 --linear-backend aiter" in amd
    assert "--trust-remote-code" in printed(capsys, "vllm", "amd/GLM-5.2-MXFP4", "--gpu", "mi355x")
    assert "--max-model-len 131072" in printed(capsys, "vllm", "--max-model-len", "131072")
    assert "speculative" not in printed(capsys, "vllm", "--drafts", "0")


def test_sglang_as_the_cookbook_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    line = printed(capsys, "sglang", "--served-model-name", "my glm", "--drafts", "3")
    assert "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4" in line
    assert "--served-model-name 'my glm'" in line and "--kv-cache-dtype" not in line


@pytest.mark.parametrize(("args", "words"), [
    (["vllm", "zai-org/GLM-5.2"], "needs 1786 GB"),
    (["vllm", "somebody/GLM-5.2-BF16"], "needs 1786 GB"),
    (["sglang", "--gpu", "h100"], "needs 893 GB of GPU memory; 8 x h100 have 640 GB"),
    (["vllm", "--tensor-parallel-size", "7"], "expected a divisor of 64"),
    (["vllm", "--max-model-len", "2000000"], "--max-model-len"),
    (["vllm", "--exec"], "there is no vllm here"),
])  # fmt: skip
def test_what_cannot_run(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", *args]) == 2
    assert words in capsys.readouterr().err


def test_a_form_on_other_gpus_than_the_recipe_s_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "vllm", "nvidia/GLM-5.2-NVFP4"]) == 0
    assert "has NVFP4 for b200, b300 alone" in capsys.readouterr().err
    assert cli.main(["launch", "vllm", "nvidia/GLM-5.2-NVFP4", "--gpu", "b300"]) == 0
    assert not capsys.readouterr().err


def test_a_folder_is_as_large_as_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "model-00001-of-00001.safetensors").open("wb") as file:
        file.truncate(1000 * 10**9)  # a hole of a terabyte
    assert str(tmp_path) in printed(capsys, "vllm", str(tmp_path), "--gpu", "b300")
    assert cli.main(["launch", "vllm", str(tmp_path)]) == 2
    assert "needs 1200 GB of GPU memory; 8 x h200 have 1128 GB" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["cyankiwi/GLM-5.2-AWQ-INT4", "/models/glm-5.2-w4a8"])
def test_what_nothing_tells_the_size_of_is_not_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "sglang", model]) == 0
    shown = capsys.readouterr()
    assert f"--model-path {model}" in shown.out and "was not checked" in shown.err


def test_serve_takes_the_flags_of_vllm_and_names_those_without_meaning() -> None:
    parser = argparse.ArgumentParser()
    foreign.add_arguments(parser)
    known = ["--tool-call-parser", "glm47", "--reasoning-parser", "glm45", "--enable-auto-tool-choice"]
    assert foreign.notes(parser.parse_args([*known, "--tensor-parallel-size", "1"])) == []
    notes = foreign.notes(parser.parse_args(["--tensor-parallel-size", "8"]))
    assert [n.split(" means")[0] for n in notes] == ["--tensor-parallel-size 8"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--tool-call-parser", "hermes"])
