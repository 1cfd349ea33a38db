"""What every benchmark prints first and last: the machine's ceilings, and one line of JSON."""

import json
import mmap
import platform
import subprocess
from functools import cache
from typing import Any

import torch

from glm52 import ops
from glm52.train.command import matmul_peak_flops


@cache
def _large() -> torch.Tensor:
    """1 GiB, far beyond any cache, in huge pages where the system has them, as weights are."""
    memory = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)


def read_bandwidth(threads: int, repeats: int = 3) -> float:
    """Bytes per second of a plain read by our own thread pool: the best of a few."""
    data = _large()
    return data.nbytes / min(ops.kernels().read_seconds(data, threads) for _ in range(repeats))


def matmul_peak(threads: int) -> float:
    """FLOP/s of torch's own matrix product, in bf16 where the CPU has instructions for it, else fp32: the best of a
    few."""
    torch.set_num_threads(threads)
    return matmul_peak_flops(size=2048, repeats=4)


def finish(results: dict[str, Any]) -> None:
    """The last line: what was measured, on what."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = bool(subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout)
    with open("/proc/cpuinfo") as f:
        cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.machine())
    print(json.dumps({"commit": commit, "dirty": dirty, "cpu": cpu, "isa": ops.backend(), "torch": torch.__version__}
                     | results))  # fmt: skip
