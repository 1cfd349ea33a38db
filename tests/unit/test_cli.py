"""The command line as a user meets it: help, clear errors, a conversation through pipes."""

import argparse
import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from glm52 import cli
from glm52.server import command as serve
from glm52.session import Session
from tests.fixtures import write_tiny

DOC = Path(__file__).parent.parent.parent / "docs" / "cli.md"


def glm52(*args: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "glm52.cli", *args], input=text, capture_output=True, text=True,
                          timeout=120, env=os.environ | environment)  # fmt: skip


def test_help_is_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/cli.md holds the help of every command. To write it anew: COLUMNS=110 python -m tests.unit.test_cli"""
    monkeypatch.setenv("COLUMNS", "110")
    assert DOC.read_text() == documentation()


def documentation() -> str:
    out = ["# The command line\n\nWhat `glm52 COMMAND --help` prints.\n"]
    commands = [
        "",
        "chat",
        "serve",
        "launch",
        "agent-check",
        "inspect",
        "eval",
        "data build",
        "data tokenizer",
        "train",
    ]
    for command in commands:
        buffer = io.StringIO()
        with contextlib.redirect_stdout(buffer), contextlib.suppress(SystemExit):
            cli.main([*command.split(), "--help"])
        out.append(f"## glm52 {command}".rstrip() + f"\n\n```\n{buffer.getvalue()}```\n")
    return "\n".join(out)


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["chat", "/nowhere"], "no such folder"),
        (["chat", "./nosuch"], "./nosuch: no such folder"),
        (["serve", "../nosuch"], "../nosuch: no such folder"),
        (["inspect", "a--b/c.."], "a--b/c..: no such folder"),
        (["chat", "README.md"], "expected a model folder"),
        (["chat", "tests"], "config.json"),
        (["inspect", "glm-9"], "glm-5.2"),
        (["inspect", "glm-5.2", "--context", "0"], "--context"),
        (["serve", "--port", "99999"], "--port"),
        (["serve", "--prefix-cache-size", "9"], "--prefix-cache too"),
        (["train", "nothing.py", "--data", "x", "--out", "y"], "nothing.py"),
        (["serve", "--context", "2147483647", "--port", "0"], "this machine has"),
        (["serve", "--prefix-cache", ""], "--prefix-cache: expected a path"),
        (["serve", "--api-key", "schl\xfcssel"], "--api-key: expected printable ASCII"),
        (["serve", "--host", "\udcff", "--insecure"], "expected text in UTF-8"),
        (["serve", "--host", "x" * 64, "--insecure"], "--host"),
        (["serve", "--upstream-key", "x"], "--upstream too"),
        (["eval", "--tasks", ","], "--tasks: expected some of add, sub"),
        (["eval", "-x"], "see glm52 eval --help"),
        (["data", "build", "--out", "x", "-x"], "-x; see glm52 data --help"),
        (["data", "build", "--out", "x", "--model", "glm-9"], "glm-9: no such folder"),
        (["train", "tests", "--data", "x", "--out", "y"], "expected a Python file, found a folder at tests"),
        (["eval", "--tasks", "nothing"], "--tasks: expected some of add, sub"),
        (["eval", "--tasks", "add,copy:4"], "--tasks: copy: expected a level from 0 to 3, found 4"),
        (["eval", "--tasks", "copy:x"], "--tasks: copy: expected a level"),
        (["eval", "--items", "0"], "--items"),
        (["eval", "--samples", "-5"], "--samples"),
        (["eval", "--json", "/nonexistent/x"], "--json: expected a file"),
        (["eval", "--json", "tests"], "--json: expected a file"),
        (["eval", "--text", "/nonexistent"], "--text: expected token shards"),
        (["inspect", ""], "model: expected a folder or a name"),
        (["chat", "--frobnicate"], "--frobnicate"),
        (["chat", "--think", "off", "--effort", "high"], "--effort: expected thinking to be on"),
        (["dance"], "'dance'"),
        (["data", "build"], "--out"),
        (
            ["serve", "--served-model-name", "a", "nano"],
            "--served-model-name: a, nano are all names now; MODEL goes first",
        ),
        (["serve", "--served-model-name", ""], "argument --served-model-name: expected a name"),
        (["launch", "vllm", "--served-model-name", " "], "argument --served-model-name: expected a name"),
        (
            ["serve", "--port", "0", "--max-seqs", "600", "--max-batch-tokens", "512"],
            "--max-seqs: expected at most the 512 of --max-batch-tokens",
        ),
        (["serve", "--port", "0", "--max-batch-tokens", "4"], "found 8; lower it, or raise --max-batch-tokens"),
        (["inspect", "x" * 5000], "xxx"),
        (["chat", "--prompt", "\udcff"], r"--prompt \udcff': expected text in UTF-8"),
        (["chat", "\udcff"], r"chat \udcff': expected text in UTF-8"),
        (["data", "build", "--out", "x", "--only", "nonsense"], "--only: expected some of code, prose"),
        (["data", "build", "--out", "x", "--only", ""], "--only: expected some of code, prose"),
        (["data", "build", "--out", "x", "--tokens", "nan"], "--tokens"),
        (["data", "build", "--out", "x", "--tokens", "inf"], "--tokens"),
        (["data", "tokenizer", "--out", "x", "--vocab-size", "10"], "--vocab-size: expected an integer from 292"),
        (["data", "build", "--out", "README.md"], "README.md"),
        (["data", "build", "--out", "/proc/x"], "/proc/x"),
    ],
)
def test_mistakes_are_answered_in_one_line(args: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "option", [("--upstream-key", "\xe9"), ("--prefix-cache", "x"), ("--max-batch-tokens", "9"), ("--context", "-3")]
)
def test_options_that_a_gateway_cannot_use(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """They had no effect, or the upstream server never got the key."""
    assert cli.main(["serve", "nano", "--port", "0", "--upstream", "http://127.0.0.1:9", *option]) == 2
    error = capsys.readouterr().err
    assert option[0] in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ["nano", "--served-model-name", "a", "b"],
        ["nano", "--served-model-name", "a", "--served-model-name", "b"],
        ["--served-model-name", "a", "--served-model-name", "b"],
        ["--served-model-name", "a", "--served-model-name", "b", "--port", "0", "nano"],
    ],
)
def test_a_model_may_have_several_names(args: list[str]) -> None:
    """As vLLM takes them, several behind one flag: the second became the MODEL."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    parsed = parser.parse_args(args)
    assert serve._names(parsed, "nano") == ["a", "b"] and parsed.model in ("nano", None)


def test_files_of_keys_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_bytes(b"one\n\xff\n")
    assert cli.main(["serve", "--api-key", f"@{tmp_path / 'keys'}"]) == 2
    assert f"--api-key: cannot read {tmp_path / 'keys'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("serve", "--context", ["63", str(10**14), "9" * 5000, "1e3", ""]),
        ("serve", "--port", ["-1", "65536"]),
        ("serve", "--max-batch-tokens", ["0", "-7"]),
        ("chat", "--temperature", ["nan", "inf", "-1", "2.1", "warm"]),
        ("chat", "--drafts", ["6"]),
        ("chat", "--max-tokens", ["0"]),
        ("inspect", "--context", ["0", "1" + "0" * 400]),
        ("launch", "--drafts", ["-3"]),
        ("launch", "--port", ["99999999"]),
        ("launch", "--max-model-len", ["-5"]),
        ("launch", "--tensor-parallel-size", ["-8", "0"]),
    ],
)
def test_numbers_out_of_range_name_the_option(
    command: str, option: str, values: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Some were a traceback, some were printed into the command of another server."""
    for value in values:
        assert cli.main([command, *["vllm"] * (command == "launch"), option, value]) == 2
        error = capsys.readouterr().err
        assert f"argument {option}" in error and "expected a" in error and error.count("\n") == 1


def test_a_conversation_through_pipes(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    lines = "/help\n/think off\nHi\n/effort high\n/think maybe\n/dance\n/stats\n/reset\n/exit\nnever read\n"
    done = glm52("chat", str(tmp_path), "--max-tokens", "8", text=lines)
    assert done.returncode == 1 and done.stderr.endswith(" (length)\n")  # /dance could not be done
    for expected in ("/think on|off", "thinking is off", "effort high", "/think on or /think off",
                     "/dance is not a command", "tokens/s", "a new conversation"):  # fmt: skip
        assert expected in done.stdout
    assert "\x1b" not in done.stdout and "never" not in done.stdout


def test_rows_of_the_cache_bound_a_conversation(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    done = glm52("chat", str(tmp_path), "--context", "64", "--prompt", "word " * 100)
    assert "maximum context length is 64" in done.stdout + done.stderr


def test_one_prompt_and_too_long_a_prompt(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    done = glm52("chat", str(tmp_path), "--max-tokens", "4", "--prompt", "Hi")
    assert done.returncode == 0 and "thinking: " in done.stderr and "thinking" not in done.stdout
    for long in (
        glm52("chat", str(tmp_path), "--prompt", "word " * 600),
        glm52("chat", str(tmp_path), text="word " * 600 + "\n"),
    ):
        assert long.returncode == 1 and not long.stdout and "maximum context length is 512" in long.stderr


def test_what_is_typed_is_text(tmp_path: Path) -> None:
    """Whether the locale lets other bytes through or not."""
    write_tiny(tmp_path)
    for encoding in ("utf-8:strict", "utf-8:surrogateescape"):
        done = subprocess.run([sys.executable, "-m", "glm52.cli", "chat", str(tmp_path)], input=b"\xff\xfe\n",
                              capture_output=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": encoding})  # fmt: skip
        assert done.returncode == 2
        *_, last = done.stderr.splitlines()  # a line may say that there are no native kernels
        assert last.startswith(b"glm52 chat: stdin: expected text in UTF-8") and b"Traceback" not in done.stderr


def test_a_model_that_computes_nothing_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reason was dropped, and an empty reply stood in the history and in the scores."""
    write_tiny(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    assert cli.main(["chat", str(tmp_path), "--prompt", "Hi"]) == 1
    assert "error: the model produced logits that are not finite" in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path), "--tasks", "add", "--items", "1"]) == 2
    assert "glm52 eval: the model produced logits that are not finite" in capsys.readouterr().err


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``glm52 serve .`` called its model nothing."""
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert Session.open(Path(".")).name == tmp_path.name


def test_the_reference_backend_runs_the_same_chat(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    args = ("chat", str(tmp_path), "--max-tokens", "16", "--think", "off", "--prompt", "Hi")
    assert glm52(*args, GLM52_BACKEND="reference").stdout == glm52(*args).stdout
    assert "GLM52_BACKEND" in glm52(*args, GLM52_BACKEND="cuda").stderr


if __name__ == "__main__":
    DOC.write_text(documentation())
