"""The rows of ``glm52 agent-check``, and lm-eval. SDKs run always, where they are installed; agents and lm-eval with
``-m clients``. CLIENTS_PYTHON is the interpreter that has the SDKs, CLIENTS_NPM the folder of the agents."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glm52 import cli
from glm52.cache import Spans
from glm52.clients.agents import AGENTS, play
from glm52.clients.check import Row, check_npm, check_sdk, matrix
from glm52.clients.probes import CLIENTS, FAULTS, SCENES
from glm52.clients.script import ANSWER, reply_to, shell_call
from glm52.clients.stage import Stage, stage
from glm52.engine import AsyncEngine
from glm52.hub import NANO
from glm52.load import load
from glm52.model import GLM
from glm52.server.service import Service
from glm52.session import Session
from glm52.tokenizer import Tokenizer
from tests.serving import running


@pytest.fixture(scope="module")
def on() -> Iterator[Stage]:
    with stage() as on:
        yield on


@pytest.fixture(scope="module")
def before() -> Iterator[Stage]:
    """A gateway before a server that fails."""
    with stage(is_gateway=True) as on:
        yield on


def failures(row: Row) -> dict[str, str]:
    assert not row.missing and set(row.cells) in (set(SCENES), {*SCENES, *FAULTS})
    return {scene: why for scene, (verdict, why) in row.cells.items() if verdict == "fail"}


@pytest.mark.parametrize("stage_name", ["on", "before"])
@pytest.mark.parametrize("name", CLIENTS)
def test_sdk(request: pytest.FixtureRequest, stage_name: str, name: str) -> None:
    """Those of the extra ``clients`` may be absent; the two official ones are not."""
    row = check_sdk(name, os.environ.get("CLIENTS_PYTHON", sys.executable), request.getfixturevalue(stage_name))
    if "is not installed" in row.missing and name not in ("openai", "anthropic"):
        pytest.skip(row.missing)
    shown = ("pass", "n/a") if name in ("langchain-openai", "llm") else ("pass",)
    assert not failures(row) and all(verdict in shown for verdict, _ in row.cells.values())


@pytest.mark.parametrize("stage_name", ["on", "before"])
def test_half_an_answer_does_not_pass(
    request: pytest.FixtureRequest, stage_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm52.clients.script.reply_to", lambda prompt: f"Hm.</think>{ANSWER[:-8]}")
    row = check_sdk("openai", sys.executable, request.getfixturevalue(stage_name))
    assert set(row.cells) - set(failures(row)) == {"hang-up", "overflow"}


@pytest.mark.clients
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage_name", ["on", "before"])
@pytest.mark.parametrize("name", AGENTS)
def test_npm_agent(request: pytest.FixtureRequest, stage_name: str, name: str) -> None:
    on = request.getfixturevalue(stage_name)
    assert not failures(check_npm(name, Path(os.environ.get("CLIENTS_NPM", ".")), on))


MCP_SERVER = """
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    schema = {"type": "object", "properties": {"file": {"type": "string"}}, "required": ["file"]}
    result = {}
    if message["method"] == "initialize":
        result = {"protocolVersion": message["params"]["protocolVersion"], "capabilities": {"tools": {}},
                  "serverInfo": {"name": "notes", "version": "1"}}
    elif message["method"] == "tools/list":
        result = {"tools": [{"name": "read_note", "description": "Read a note.", "inputSchema": schema}]}
    elif message["method"] == "tools/call":
        result = {"content": [{"type": "text", "text": open(message["params"]["arguments"]["file"]).read()}]}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
"""


@pytest.mark.clients
@pytest.mark.timeout(300)
def test_codex_calls_a_tool_of_an_mcp_server(on: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends such tools in namespaces, and calls without theirs are unsupported ones to it."""
    server = tmp_path / "notes.py"
    server.write_text(MCP_SERVER)
    config = f"{AGENTS['codex'].files['.codex/config.toml']}[mcp_servers.notes]\n"
    config += f"command = {json.dumps(sys.executable)}\nargs = {json.dumps([str(server)])}\n"
    call = "<tool_call>mcp__notes__read_note<arg_key>file</arg_key><arg_value>note-1.txt</arg_value></tool_call>"
    monkeypatch.setattr("glm52.clients.script.shell_call", lambda tools, command: call)
    agent = replace(AGENTS["codex"], files={".codex/config.toml": config})
    program = Path(os.environ.get("CLIENTS_NPM", ".")) / "node_modules" / ".bin" / agent.binary
    run = play(agent, program, on, on.url, "tools")
    assert run.exit_code == 0 and "word-alpha" in run.output, run.output
    assert f"{call}<|observation|><tool_response>" in run.turns[-1].prompt


def test_what_cannot_run_is_a_row_with_its_reason(
    on: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = matrix([check_npm("codex", tmp_path, on), check_sdk("openai", "/nowhere/python", on)], on.scenes)
    assert "pass" not in table and "@openai/codex is not installed" in table and "/nowhere/python" in table
    assert cli.main(["agent-check", "emacs"]) == 2
    assert "no client is called emacs" in capsys.readouterr().err


def test_the_matrix_names_what_failed() -> None:
    table = matrix(
        [Row("a", "1.0", {s: ("pass", "") for s in SCENES} | {"tools": ("fail", "no call came")})], tuple(SCENES)
    )
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


# ── lm-eval ──────────────────────────────────────────────────────────────────────────────────────────────────────

QUESTIONS = [
    {"question": "The opposite of hot is", "choices": ["cold", "round", "seven"], "answer": 0},
    {"question": "Two and two are", "choices": ["three", "four", "green"], "answer": 1},
    {"question": "A cat says", "choices": ["moo", "woof", "meow"], "answer": 2},
    {"question": "The capital of France is", "choices": ["Paris", "Berlin", "a banana, naturally"], "answer": 0},
]
TASK = """
task: glm52_mini
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/mini.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def nano() -> Iterator[str]:
    session = Session.open(NANO, context=2048)
    backend = AsyncEngine(session.engine)
    service = Service(backend, session.tokenizer, session.template, name="nano", defaults=session.defaults,
                      context_length=session.engine.context_length)  # fmt: skip
    with running(service) as url:
        yield url
    backend.close()


@pytest.mark.clients
@pytest.mark.parametrize("as_tokens", [True, False])
def test_lm_eval_scores_what_the_model_itself_does(nano: str, tmp_path: Path, as_tokens: bool) -> None:
    """Its log-likelihoods over HTTP are those of one forward in f32, to 1e-4 of rounding; docs/clients.md has more."""
    python = os.environ.get("CLIENTS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import lm_eval"], capture_output=True).returncode:
        pytest.skip(f"{python} has no lm_eval")
    (tmp_path / "mini.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "mini.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    arguments = {
        "model": "nano", "base_url": f"{nano}/v1/completions", "tokenizer_backend": "huggingface",
        "tokenizer": str(NANO), "tokenized_requests": as_tokens,
    }  # fmt: skip
    command = [
        python, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", "glm52_mini", "--batch_size", "4",
        "--model_args", ",".join(f"{k}={v}" for k, v in arguments.items()), "--include_path", str(tmp_path),
        "--output_path", str(tmp_path / "out"), "--log_samples",
    ]  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "any"}
    done = subprocess.run(command, env=clean | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("samples*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    told = {
        (a["arg_0"], a["arg_1"]): (float(score), is_greedy == "True")
        for s in samples for a, (score, is_greedy) in zip(s["arguments"].values(), s["filtered_resps"], strict=True)
    }  # fmt: skip
    assert len(told) == 12
    model, tokenizer = load(NANO, dtype=torch.float32), Tokenizer.read(NANO)
    computed = {pair: likelihood(model, tokenizer, *pair) for pair in told}
    worst = max(abs(told[pair][0] - computed[pair][0]) for pair in told)
    print(f"largest difference of log-likelihoods: {worst:.1e}")
    assert worst < 1e-4 and all(told[pair][1] == computed[pair][1] for pair in told)


def likelihood(model: GLM, tokenizer: Tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """The log-likelihood of a continuation by one forward of the reference model, and whether it is the greedy one."""
    begin, ids = len(tokenizer.encode(context)), tokenizer.encode(context + continuation)
    with torch.inference_mode():
        h_TD = model(torch.tensor(ids), Spans.of_sequence(0, len(ids)), model.new_cache(len(ids)))
        logp_TW = model.logits(h_TD[begin - 1 : -1]).float().log_softmax(-1)
    said = torch.tensor(ids[begin:])
    return float(logp_TW.gather(1, said[:, None]).sum()), bool((logp_TW.argmax(1) == said).all())


def test_a_client_that_was_asked_for_and_is_not_there_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["agent-check", "openai", "kilo", "--python", "/nonexistent/python"]) == 1
    assert capsys.readouterr().out.count("not run") == 2
