"""``glm52 agent-check``: clients against the server with a scripted model, and the matrix of what came of it."""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glm52.clients import probes
from glm52.clients.agents import AGENTS, check_agent, hung_up
from glm52.clients.stage import Stage, stage
from glm52.errors import RequestError

_PROBE_S = 180.0


@dataclass
class Row:
    """cells: a verdict for each scene and, unless it passed, why. missing: why the client could not be run at all."""

    client: str
    version: str = ""
    cells: dict[str, tuple[str, str]] = field(default_factory=dict)
    missing: str = ""


def check_sdk(name: str, python: str, on: Stage) -> Row:
    """One Python SDK in an interpreter of its own."""
    begun = len(on.script.turns)
    command = [python, "-P", str(Path(probes.__file__)), name, on.url, on.small_url, *on.scenes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Row(name, missing=str(error))
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return Row(name, missing=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    if "missing" in said:
        return Row(name, missing=said["missing"])
    row = Row(name, said["version"], {scene: (verdict, why) for scene, (verdict, why) in said["cells"].items()})
    if row.cells["hang-up"][0] == "pass":
        row.cells["hang-up"] = hung_up(on, begun)
    return row


def check_npm(name: str, folder: Path, on: Stage) -> Row:
    """One agent from the npm packages in ``folder``."""
    agent = AGENTS[name]
    program = folder / "node_modules" / ".bin" / agent.binary
    if not program.exists():
        return Row(name, missing=f"{agent.package} is not installed in {folder}")
    manifest = json.loads((folder / "node_modules" / agent.package / "package.json").read_text())
    return Row(name, manifest["version"], check_agent(agent, program, on))


def matrix(rows: list[Row], scenes: Sequence[str]) -> str:
    """As a table of Markdown, and below it why cells did not pass."""
    lines = ["| client | " + " | ".join(scenes) + " |", "|---" * (len(scenes) + 1) + "|"]
    notes = []
    for row in rows:
        name = f"{row.client} {row.version}".strip()
        cells = [row.cells.get(scene, ("n/a", "")) for scene in scenes]
        lines.append(f"| {name} | " + " | ".join(verdict for verdict, _ in cells) + " |")
        notes += [f"{name}: not run: {row.missing}"] if row.missing else []
        notes += [f"{name}, {s}: {v}: {why}" for s, (v, why) in zip(scenes, cells, strict=True) if why]
    return "\n".join([*lines, "", *notes]).rstrip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join([*probes.CLIENTS, *AGENTS])
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"which to run (default: all): {names}")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the Python SDKs (default: this)")
    parser.add_argument("--npm", type=Path, default=Path(), metavar="FOLDER",
        help="where npm has installed the agents (default: here)")  # fmt: skip
    parser.add_argument("--gateway", action="store_true",
        help="have a scripted upstream server compute, which also fails: "
             "502, streams that are cut, garbled or stall")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    known = [*probes.CLIENTS, *AGENTS]
    unknown = sorted(set(args.clients) - set(known))
    if unknown:
        raise RequestError(f"no client is called {unknown[0]}; there are {', '.join(known)}")
    rows = []
    with stage(is_gateway=args.gateway) as on:
        for name in args.clients or known:
            is_sdk = name in probes.CLIENTS
            rows.append(check_sdk(name, args.python, on) if is_sdk else check_npm(name, args.npm.absolute(), on))
    print(matrix(rows, on.scenes))
    has_failed = any(verdict == "fail" for row in rows for verdict, _ in row.cells.values())
    absent = [row for row in rows if row.missing]
    return int(has_failed or len(absent) == len(rows) or bool(args.clients and absent))
