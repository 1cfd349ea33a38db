"""The house rules that a machine can hold: imports go downward, and what must be light does not import torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import glm52

ROOT = Path(glm52.__file__).parent
FLOORS = (
    {"errors", "ids", "options", "__init__"},
    {"config", "tokenizer", "headers", "hub", "pages", "memory"},
    {"quant", "schemes", "cache", "chat", "shards"},
    {"ops", "layouts", "packing", "tasks", "contents", "grammar", "launch"},
    {"model", "checkpoint", "inspect"},
    {"native"},
    {"engine", "load"},
    {"session"},
    {"server", "train", "evaluate", "terminal"},
    {"clients"},
    {"cli"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LIGHT = ("", ".errors", ".options", ".config", ".tokenizer", ".chat", ".headers", ".schemes", ".contents", ".hub", ".pages", ".memory", ".inspect", ".grammar",
         ".tasks", ".launch", ".cli")  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Rooms of this package that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{a.name}" if node.module == "glm52" else node.module for a in node.names}
    return {n.split(".")[1] for n in names if n.startswith("glm52.")} - {"__version__"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    room = room_of(path)
    above = {other for other in imported(path) if other != room and FLOOR[other] >= FLOOR[room]}
    assert not above, f"{room} (floor {FLOOR[room]}) imports {above}"


def test_only_ops_knows_a_kernel_backend() -> None:
    for path in ROOT.rglob("*.py"):
        if room_of(path) != "ops":
            text = path.read_text("utf-8")
            assert "_kernels" not in text and "ops.cpu" not in text and "ops.reference" not in text, path


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, glm52{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0
