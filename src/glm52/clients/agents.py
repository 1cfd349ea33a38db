"""Coding agents from npm, without a terminal: how each is pointed at a server, and what is read off a run of it."""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from glm52.clients.probes import ANSWER, FAULTS, PREAMBLE, THOUGHT
from glm52.clients.script import Turn, scene_of
from glm52.clients.stage import Stage

Verdict = tuple[str, str]
PASS: Verdict = ("pass", "")
_RUN_S, _CUT_S = 120.0, 3.0
_NOTES = {"note-1.txt": "word-alpha\n", "note-2.txt": "word-beta\n"}

_OPENCODE = {
    "provider": {"glm52": {
        "npm": "@ai-sdk/openai-compatible", "options": {"baseURL": "SERVER/v1", "apiKey": "any"},
        "models": {"glm-5.2": {"reasoning": True, "tool_call": True, "interleaved": {"field": "reasoning_content"},
                               "limit": {"context": 200000, "output": 32000}}},
    }},
    "model": "glm52/glm-5.2", "small_model": "glm52/glm-5.2", "permission": {"bash": "allow"}, "autoupdate": False,
}  # fmt: skip
_CLINE = {
    "version": 1, "lastUsedProvider": "openai-compatible", "modes": {},
    "providers": {"openai-compatible": {"tokenSource": "manual", "updatedAt": "2026-01-01T00:00:00.000Z", "settings": {
        "provider": "openai-compatible", "apiKey": "any", "model": "glm-5.2", "baseUrl": "SERVER/v1"}}},
}  # fmt: skip
_CODEX = """
model = "glm-5.2"
model_provider = "glm52"
[model_providers.glm52]
name = "glm52"
base_url = "SERVER/v1"
env_key = "OPENAI_API_KEY"
wire_api = "responses"
"""


@dataclass(frozen=True, kw_only=True)
class Agent:
    """arguments: what stands before the prompt. files: configuration, below its home. SERVER stands for its address."""

    package: str
    binary: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


AGENTS = {
    "claude-code": Agent(
        package="@anthropic-ai/claude-code", binary="claude", arguments=("--allowedTools=Bash", "-p"),
        environment={"ANTHROPIC_BASE_URL": "SERVER", "ANTHROPIC_AUTH_TOKEN": "any", "ANTHROPIC_MODEL": "glm-5.2",
                     "ANTHROPIC_SMALL_FAST_MODEL": "glm-5.2", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"},
    ),
    "codex": Agent(
        package="@openai/codex", binary="codex", files={".codex/config.toml": _CODEX},
        environment={"OPENAI_API_KEY": "any"},
        arguments=("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"),
    ),
    "opencode": Agent(
        package="opencode-ai", binary="opencode", arguments=("run",),
        files={".config/opencode/opencode.json": json.dumps(_OPENCODE)},
        environment={"OPENCODE_DISABLE_MODELS_FETCH": "1"},
    ),
    "kilo": Agent(
        package="@kilocode/cli", binary="kilo", arguments=("run", "--auto"),
        files={".config/kilo/kilo.json": json.dumps(_OPENCODE)}, environment={"KILO_DISABLE_MODELS_FETCH": "1"},
    ),
    "cline": Agent(
        package="cline", binary="cline", arguments=("--yolo",),
        files={".cline/data/settings/providers.json": json.dumps(_CLINE)},
    ),
    "qwen-code": Agent(
        package="@qwen-code/qwen-code", binary="qwen",
        arguments=("--auth-type", "openai", "--openai-api-key", "any", "--openai-base-url", "SERVER/v1",
                   "-m", "glm-5.2", "--yolo"),
    ),
}  # fmt: skip


@dataclass
class Run:
    """What one prompt led to. streams: whether each request with a body asked for a stream."""

    output: str
    turns: list[Turn]
    streams: list[bool]
    exit_code: int | None


@contextmanager
def at_home(agent: Agent, url: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder to work in and an environment, whose home is the agent's own, configured."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        work = Path(home) / "work"
        work.mkdir()
        for name, text in _NOTES.items():
            (work / name).write_text(text)
        for name, text in agent.files.items():
            (Path(home) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(home) / name).write_text(text.replace("SERVER", url))
        environment = {"HOME": home, "PATH": os.environ["PATH"], "TERM": "dumb", "NO_COLOR": "1", "CI": "1"}
        yield work, environment | {k: v.replace("SERVER", url) for k, v in agent.environment.items()}


@contextmanager
def _started(agent: Agent, program: Path, url: str, scene: str) -> Iterator[subprocess.Popen[str]]:
    """The agent at work; whatever it started ends with the context. The prompt of an overflow is too long by itself:
    what agents do about one, to compact and try again, must not help."""
    with at_home(agent, url) as (work, environment):
        arguments = [a.replace("SERVER", url) for a in agent.arguments]
        question = f"[check:{scene}] What do the notes say?" + (PREAMBLE * 4 if scene == "overflow" else "")
        process = subprocess.Popen(
            [str(program), *arguments, question], cwd=work, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            _end(process)


def _end(process: "subprocess.Popen[str]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def play(agent: Agent, program: Path, on: Stage, url: str, scene: str) -> Run:
    """One prompt to its end, or until time is up."""
    turn, exchange = len(on.script.turns), len(on.recorder.exchanges)
    with _started(agent, program, url, scene) as process:
        try:
            output, _ = process.communicate(timeout=_RUN_S)
            exit_code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            _end(process)
            output, exit_code = process.communicate()[0], None
    bodies = [e.body for e in on.recorder.exchanges[exchange:] if e.body and "count_tokens" not in e.path]
    streams = [bool(json.loads(b).get("stream")) for b in bodies]
    return Run(output, [t for t in on.script.turns[turn:] if scene_of(t.prompt) == scene], streams, exit_code)


def check_agent(agent: Agent, program: Path, on: Stage) -> dict[str, Verdict]:
    """The cells of one agent's row."""
    first = play(agent, program, on, on.url, "streamed")
    cells = {"streamed": _says(first, [ANSWER])}
    cells["plain"] = ("n/a", "it always streams") if first.streams and all(first.streams) else cells["streamed"]
    loop = play(agent, program, on, on.url, "tools")
    cells["tools"] = _says(loop, ["word-alpha"])
    cells["reasoning"], cells["cache"] = _kept(loop), _hit(loop)
    cells["parallel"] = _says(play(agent, program, on, on.url, "parallel"), ["word-alpha", "word-beta"])
    cells["hang-up"] = _killed(agent, program, on)
    cells["overflow"] = _overflows(play(agent, program, on, on.small_url, "overflow"))
    for fault in (s for s in on.scenes if s in FAULTS):
        cells[fault] = _survives(play(agent, program, on, on.url, fault), fault)
    return cells


def _says(run: Run, words: list[str]) -> Verdict:
    if all(word in run.output for word in words):
        return PASS
    return "fail", _tail(run)


def _tail(run: Run) -> str:
    """One line for what went wrong."""
    lines = [line.strip() for line in run.output.splitlines() if line.strip()]
    end = f"no end within {_RUN_S:g} s" if run.exit_code is None else f"exit code {run.exit_code}"
    return f"{end}, {len(run.turns)} replies; it says {lines[-1][:160] if lines else 'nothing'!r}"


def _second(run: Run) -> Turn | None:
    """The turn that answers a tool's result."""
    return next((t for t in run.turns if "<tool_response>" in t.prompt.rpartition("[check:")[2]), None)


def _kept(run: Run) -> Verdict:
    """The reasoning stands in the prompt that follows the tool's result."""
    turn = _second(run)
    if turn is None:
        return "fail", _tail(run)
    is_kept = f"<think>{THOUGHT}</think><tool_call>" in turn.prompt
    return PASS if is_kept else ("fail", "the second prompt of a tool loop has lost it")


def _hit(run: Run) -> Verdict:
    turn = _second(run)
    if turn is None:
        return "fail", _tail(run)
    share = turn.num_cached / turn.num_tokens
    return PASS if share > 0.95 else ("fail", f"{share:.0%} of {turn.num_tokens} tokens were cached")


def _killed(agent: Agent, program: Path, on: Stage) -> Verdict:
    begun = len(on.script.turns)
    with _started(agent, program, on.url, "hang-up"):
        is_begun = _until(lambda: any(scene_of(t.prompt) == "hang-up" for t in on.script.turns[begun:]), _RUN_S)
        time.sleep(0.5)
    return hung_up(on, begun) if is_begun else ("fail", "it asked nothing")


def hung_up(on: Stage, begun: int) -> Verdict:
    """Whether a reply since turn ``begun`` was ended by its client, soon."""
    is_cut = _until(lambda: any(t.is_cut and scene_of(t.prompt) == "hang-up" for t in on.script.turns[begun:]), _CUT_S)
    return PASS if is_cut else ("fail", f"the server still wrote {_CUT_S:g} s after the client had left")


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _survives(run: Run, fault: str) -> Verdict:
    """It has asked again and has all of the answer, or it ends and says why."""
    answer = "word-alpha" if fault == "cut-call" else ANSWER
    is_told = answer in run.output or re.search(FAULTS[fault], run.output)
    return PASS if is_told and run.exit_code is not None else ("fail", _tail(run))


def _overflows(run: Run) -> Verdict:
    """It ends, and says why."""
    is_told = re.search("context|too long|too large|exceed", run.output, re.IGNORECASE)
    return PASS if is_told and run.exit_code is not None else ("fail", _tail(run))
