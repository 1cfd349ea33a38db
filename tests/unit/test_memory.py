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
from glm52.load import load_for_inference, look_into
from glm52.packing import packed_bytes
from glm52.quant import WeightFormat
from glm52.session import Session

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
def test_rows_are_counted_as_they_are_held(cache: Any, fmt: Any) -> None:
    """Rows of fp8 were counted where rows of f32 were held. Floats are filled up to multiples of 32: here 144 to 160."""
    source = look_into(NANO, fmt, cache)
    assert source.needs.row * 6400 == pytest.approx(source.load().new_cache(6400).num_bytes, rel=0.1)


GREW = """
import re, sys, torch
from pathlib import Path
from glm52.cache import Spans
from glm52.native import NativeGLM, rounded_bytes
from tests.fixtures import random_model, tiny_config

def resident() -> int:
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

@torch.inference_mode()
def step(begin: int, end: int) -> None:
    tokens, spans = torch.full((end - begin,), 7), Spans.of_sequence(begin, end)
    h_TD = model(tokens, spans, cache)
    model.propose(h_TD, tokens, spans, cache, torch.tensor([end - begin - 1]), 1)

config = tiny_config(
    hidden_size=128, num_attention_heads=4, q_lora_rank=64, kv_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=16,
    v_head_dim=32, intermediate_size=256, moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=3,
    index_n_heads=4, index_head_dim=32, index_topk=256,
)
model = NativeGLM(random_model(config), sys.argv[1], threads=2)
cache = model.new_cache(4160)
for pool in cache.pools():
    pool.zero_()
step(0, 64)
before = resident()
step(64, 4160)
print((resident() - before) / (4096 - 64) / config.scratch_bytes(2, rounded_bytes=rounded_bytes(sys.argv[1])))
"""


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what is resident is not told")
@pytest.mark.parametrize("fmt", ["f32", "bf16", "int8"])
def test_scratch_is_counted_as_it_is_taken(fmt: str) -> None:
    """What a step of 4,096 tokens adds to a process that had one of 64. Large buffers lie in huge pages."""
    done = subprocess.run([sys.executable, "-c", GREW, fmt], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(1.0, abs=0.1)


def needs(**changes: Any) -> memory.Needs:
    """Of a model with 2 GB of weights, for which 512 tokens would do."""
    fields = {"name": "nano", "weights": 2 * 10**9, "row": 10**6, "scratch": 10**6, "mapped": 0, "experts": 4.0}
    return memory.Needs(**fields | changes)


def with_memory(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "limit_bytes", lambda mapped: num_bytes)


@pytest.mark.parametrize(
    ("limit", "tokens", "words"),
    [
        (10**9, 64, "weights 2.0, 1,000 rows of the cache 1.0, steps of 64 tokens 0.1), and this machine has 1.0 for it; "
                    "try a smaller --format"),
        (2_500_000_000, 64, "nano needs 3.1 GB"),
        (2_500_000_000, 64, "try --context 128"),
        (2_500_000_000, 512, "try a smaller --max-batch-tokens or --max-seqs"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_what_would(
    limit: int, tokens: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(limit, monkeypatch)
    with pytest.raises(PlanError) as caught:
        needs().require(1000, tokens)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("left", "max_seqs", "experts", "tokens"),
    [
        (10**12, 8, 4.0, 512),  # 256 would do
        (10**12, 8, 32.0, 2048),
        (10**12, 8, 10.5, 640),  # 672
        (10**12, 8, 256.0, 8192),
        (6_000_000_000, 8, 32.0, 1472),  # of 1,500, which take a quarter
        (1_000_000_000, 8, 4.0, 192),
        (100_000_000, 8, 32.0, 64),
        (-(10**9), 8, 32.0, 64),  # for ``require`` to refuse
        (100_000_000, 65, 32.0, 128),
        (10**12, 600, 4.0, 640),
    ],
)
def test_steps_suit_the_experts_and_the_memory(
    left: int, max_seqs: int, experts: float, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(3 * 10**9 + left, monkeypatch)
    assert needs(experts=experts).step_tokens(1000, max_seqs) == tokens


def test_steps_of_glm_5_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens of 2,048 for each of 256 experts: 1.9 GB of scratch with 32 threads."""
    config = GLMConfig.preset("glm-5.2")
    scratch = config.scratch_bytes(32)
    large = needs(scratch=scratch, row=config.cache_bytes("bf16"), weights=392 * 10**9, experts=256 / 8)
    with_memory(512 * 10**9, monkeypatch)
    assert large.step_tokens(131_072, 8) == 2048 and 1.8e9 < 2048 * scratch < 2e9
    with_memory(407 * 10**9, monkeypatch)
    assert large.step_tokens(131_072, 8) == 640


def test_a_session_takes_what_was_chosen_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Session.open(NANO, context=128).engine.scheduler.max_batch_tokens == 512
    assert Session.open(NANO, context=128, max_batch_tokens=100).engine.scheduler.max_batch_tokens == 100
    source = look_into(NANO)
    with_memory(source.needs.weights + 128 * source.needs.row + 4 * 200 * source.needs.scratch, monkeypatch)
    session = Session.open(NANO, context=128)
    assert session.chunks == "prompts are read in chunks of up to 192 tokens"
    assert Session.open(NANO, context=128, max_batch_tokens=100_000).engine.context_length == 128
    with pytest.raises(PlanError, match="steps of 1,024 tokens"):
        Session.open(NANO, context=1024, max_batch_tokens=100_000)


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
