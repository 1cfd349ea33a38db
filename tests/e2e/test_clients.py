"""The rows of ``glm52 agent-check``. The SDKs that tests depend on run always; the others with ``-m clients``, from the
interpreter CLIENTS_PYTHON and the npm folder CLIENTS_NPM."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm52 import cli
from glm52.clients.agents import AGENTS
from glm52.clients.check import SCENES, Row, check_npm, check_sdk, matrix
from glm52.clients.probes import CLIENTS
from glm52.clients.script import ANSWER, Stage, reply_to, shell_call, stage


@pytest.fixture(scope="module")
def on() -> Iterator[Stage]:
    with stage() as on:
        yield on


def failures(row: Row) -> dict[str, str]:
    assert not row.missing and set(row.cells) == set(SCENES)
    return {scene: why for scene, (verdict, why) in row.cells.items() if verdict == "fail"}


@pytest.mark.parametrize("name", ["openai", "anthropic"])
def test_official_sdk(on: Stage, name: str) -> None:
    row = check_sdk(name, sys.executable, on)
    assert not failures(row) and all(verdict == "pass" for verdict, _ in row.cells.values())


def test_a_server_that_says_something_else_does_not_pass(on: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm52.clients.script.reply_to", lambda prompt: "Hm.</think>No.")
    assert {"plain", "streamed", "reasoning", "tools", "parallel", "cache"} <= set(
        failures(check_sdk("openai", sys.executable, on))
    )


@pytest.mark.clients
@pytest.mark.parametrize("name", [c for c in CLIENTS if c not in ("openai", "anthropic")])
def test_sdk(on: Stage, name: str) -> None:
    assert not failures(check_sdk(name, os.environ.get("CLIENTS_PYTHON", sys.executable), on))


@pytest.mark.clients
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", AGENTS)
def test_npm_agent(on: Stage, name: str) -> None:
    assert not failures(check_npm(name, Path(os.environ.get("CLIENTS_NPM", ".")), on))


def test_what_cannot_run_is_a_row_with_its_reason(
    on: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = matrix([check_npm("codex", tmp_path, on), check_sdk("openai", "/nowhere/python", on)])
    assert "pass" not in table and "@openai/codex is not installed" in table and "/nowhere/python" in table
    assert cli.main(["agent-check", "emacs"]) == 2
    assert "no client is called emacs" in capsys.readouterr().err


def test_the_matrix_names_what_failed() -> None:
    table = matrix([Row("a", "1.0", {s: ("pass", "") for s in SCENES} | {"tools": ("fail", "no call came")})])
    assert table.count("| pass ") == len(SCENES) - 1 and "a 1.0, tools: fail: no call came" in table


def test_the_script_calls_whatever_runs_commands() -> None:
    assert reply_to("<|user|>A title, please.<|assistant|><think>").endswith(f"</think>{ANSWER}")
    assert reply_to("<|user|>[check:plain] Hi<|assistant|></think>") == ANSWER
    parameters = {"properties": {"cmd": {"type": "string"}, "sure": {"type": "boolean"}}, "required": ["cmd", "sure"]}
    optional = {"properties": {"command": {"type": "string"}}, "required": []}
    tools = [{"name": "look", "parameters": optional}, {"name": "exec", "parameters": parameters}]
    assert shell_call(tools, "ls") == (
        "<tool_call>exec<arg_key>cmd</arg_key><arg_value>ls</arg_value>"
        "<arg_key>sure</arg_key><arg_value>false</arg_value></tool_call>"
    )
    assert shell_call(tools[:1], "ls") is None
