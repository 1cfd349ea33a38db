"""Sessions of real agents with the scripted model, as their requests came: what ``test_sessions.py`` plays again.

    python -m tests.e2e.record_sessions NPM_FOLDER

runs each agent twice in one session: a question that takes three calls, then, resumed, one that takes one. A recording
begins with a line that says who was recorded, and the fields that no request changed; then each line has the others of
one request. Texts that every request repeats are the client's own prose, unless they tell its environment: their words
are replaced, the long ones cut in their middle. Folders have other names; all else stays as it was sent. What an agent
asks without tools beside its session, a title, is left out.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm52.clients.agents import AGENTS, at_home
from glm52.clients.stage import Exchange, stage

SESSIONS = Path(__file__).parents[1] / "data" / "sessions"
QUESTIONS = ("[check:session] What do the notes say?", "[check:tools] And the first note alone?")
RESUMED = {
    "claude-code": ("--continue", *AGENTS["claude-code"].arguments),
    "codex": ("exec", "resume", "--last", *AGENTS["codex"].arguments[1:]),
    "kilo": ("run", "--auto", "--continue"),
}
PROSE = 120  # characters from which on a text is some
LONG, KEPT = 800, 300  # characters of a text that is cut, and of each end that stays


def record(name: str, npm: Path) -> list[str]:
    """The lines of one agent's recording."""
    agent = AGENTS[name]
    program = npm.absolute() / "node_modules" / ".bin" / agent.binary
    version = json.loads((npm / "node_modules" / agent.package / "package.json").read_text())["version"]
    with stage() as on, at_home(agent, on.url) as (work, environment):
        for arguments, question in zip((agent.arguments, RESUMED[name]), QUESTIONS, strict=True):
            command = [str(program), *arguments, question]
            subprocess.run(command, cwd=work, env=environment, stdin=subprocess.DEVNULL, check=True, timeout=300)
        asked = [e for e in on.recorder.exchanges if b'"tools"' in e.body]
        bodies = [_renamed(e, work) for e in asked]
    repeated = set[str].intersection(*(set(filter(_is_prose, _texts(body))) for body in bodies))
    bodies = [_masked(body, repeated) for body in bodies]
    same = {k: v for k, v in bodies[0].items() if all(body.get(k) == v for body in bodies)}
    head = {"client": name, "version": version, "path": asked[0].path, "same": same}
    lines = [head, *({k: v for k, v in body.items() if k not in same} for body in bodies)]
    return [json.dumps(line, ensure_ascii=False) for line in lines]


def _renamed(exchange: Exchange, work: Path) -> Any:
    text = exchange.body.decode()
    return json.loads(text.replace(str(work), "/project").replace(str(work.parent), "/home/user"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _is_prose(text: str) -> bool:
    return len(text) > PROSE and "<environment" not in text


def _masked(value: Any, repeated: set[str]) -> Any:
    if isinstance(value, dict):
        return {k: _masked(v, repeated) for k, v in value.items()}
    if isinstance(value, list):
        return [_masked(v, repeated) for v in value]
    return _wordless(value) if isinstance(value, str) and value in repeated else value


def _wordless(text: str) -> str:
    """Its tags, figures and marks."""
    if len(text) > LONG:
        text = f"{text[:KEPT]}\n[...]\n{text[-KEPT:]}"
    return re.sub(r"(<[^<>]*>)|[^\W\d_]{3,}", lambda found: found[1] or "any", text)


if __name__ == "__main__":
    for name in RESUMED:
        lines = record(name, Path(sys.argv[1]))
        (SESSIONS / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
