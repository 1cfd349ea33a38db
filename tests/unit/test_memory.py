"""Whether a model fits is known before it is loaded, to within what fills up panels."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from glm52 import cli, memory, ops, packing
from glm52.checkpoint import Checkpoint
from glm52.config import GLMConfig
from glm52.errors import PlanError
from glm52.hub import NANO
from glm52.load import load_for_inference
from glm52.packing import packed_bytes
from glm52.quant import WeightFormat

needs_kernels = pytest.mark.skipif(ops.backend() == "reference", reason="built without native kernels")


@needs_kernels
@pytest.mark.parametrize("fmt", [None, *get_args(WeightFormat)])
def test_weights_are_counted_as_they_are_packed(fmt: WeightFormat | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the rows that fill up panels: the small model has 8 experts and 4 index heads, a panel 16 rows."""
    packed, pack_held = [], packing.pack_held

    def counted(*args: Any, **options: Any) -> Any:
        packed.append(pack_held(*args, **options))
        return packed[-1]

    monkeypatch.setattr(packing, "pack_held", counted)
    model = load_for_inference(NANO, fmt)
    checkpoint = Checkpoint(NANO, GLMConfig.read(NANO))
    vectors = sum(4 * math.prod(shape) for shape in checkpoint.shapes.values() if len(shape) == 1)
    embedding = model.config.vocab_size * model.config.hidden_size * model.dtype.itemsize
    total = sum(matrix.num_bytes for matrix in packed) + vectors + embedding
    counted_bytes = packed_bytes(checkpoint.shapes, checkpoint.quantized, fmt or "f32")
    assert counted_bytes == pytest.approx(total, rel=0.02)


@needs_kernels
@pytest.mark.parametrize(("cache", "fmt"), [("auto", "f32"), ("auto", "bf16"), ("fp8", "f32")])
def test_rows_are_counted_as_they_are_held(cache: Any, fmt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of fp8 were counted where rows of f32 were held. Floats are filled up to multiples of 32: here 144 to 160."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "require", lambda name, weights, row, rows, mapped: asked.append((row, rows)))
    held = load_for_inference(NANO, fmt, cache, num_rows=6400).new_cache(6400)
    ((row, rows),) = asked
    assert rows == 6400 and row * rows == pytest.approx(held.num_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (10**9, "weights 2.0, 1,000 rows of the cache 1.0), and this machine has 1.0 for it; try a smaller --format"),
        (2_500_000_000, "nano needs 3.0 GB"),
        (2_500_000_000, "try --context 192"),
    ],
)
def test_what_does_not_fit_is_said_with_what_would(limit: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "limit_bytes", lambda mapped: limit)
    with pytest.raises(PlanError) as caught:
        memory.require("nano", 2 * 10**9, 10**6, 1000)
    assert words in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError("std::bad_alloc"), RuntimeError("unable to mmap 9 bytes\nfrom file")])
def test_memory_that_runs_out_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was ``std::bad_alloc``, or a traceback."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Checkpoint, "weight", fail)
    assert cli.main(["chat", "--prompt", "Hi"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("glm52 chat: nano: memory ran out; ") and said.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="what is mapped is not told")
def test_a_limit_on_addresses_counts_what_is_mapped() -> None:
    code = "import resource; from glm52 import memory; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); "
    code += "print(memory.limit_bytes(1 << 20) < (1 << 30) - (2 << 20), memory.limit_bytes(1 << 40))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True 0\n", done.stderr
