"""What this machine can hold, and whether a model and its cache are more than that: said before anything is loaded."""

import contextlib
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from glm52.errors import PlanError

_PAGE = 64  # rows that a cache is made of
_OF_CONTAINERS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def limit_bytes(mapped: int = 0) -> int:
    """The least of physical memory, what the container may take, and what is left of the limit on addresses (``ulimit
    -v``), which counts what is mapped, too: what is now, and ``mapped`` bytes of files that will be."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _OF_CONTAINERS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(Path(file).read_text()))
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError):
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            limits.append(max(addresses - taken - mapped, 0))
    return min(limits)


def require(name: str, weights: int, row: int, rows: int, *, mapped: int = 0) -> None:
    """PlanError if so many bytes of weights and rows of the cache are more than can be held. row: bytes of one."""
    limit, cache = limit_bytes(mapped), row * rows
    if weights + cache <= limit:
        return
    fitting = (9 * limit // 10 - weights) // row // _PAGE * _PAGE  # others want some, too
    advice = f"--context {fitting}" if fitting > 0 else "a smaller --format, or a machine with more"
    needed, w, c, has = (f"{n / 1e9:,.1f}" for n in (weights + cache, weights, cache, limit))
    raise PlanError(f"{name} needs {needed} GB of memory (weights {w}, {rows:,} rows of the cache {c}), and this "
                    f"machine has {has} for it; try {advice}")  # fmt: skip


@contextlib.contextmanager
def running_out(name: str) -> Iterator[None]:
    """Memory that runs out nevertheless, as others may take it meanwhile, becomes a PlanError."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not isinstance(error, MemoryError) and not re.search("memory|mmap", str(error)):
            raise
        raise PlanError(f"{name}: memory ran out; try a smaller --format or --context, or stop what else takes it; "
                        "GLM52_LOG=debug shows where") from error  # fmt: skip
