"""What this machine can hold, and whether a model, its cache and its steps are more than that: said before anything is
loaded. How large steps are to be follows from the same figures."""

import contextlib
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm52.errors import PlanError

_PAGE = 64  # rows that a cache is made of
_TILE = 64  # what numbers of tokens are multiples of
FOR_EXPERT = 64  # tokens of an expert at which its weights are read for enough of them: see docs/performance.md
FEWEST, MOST = 512, 8192  # tokens of a step where memory has nothing to say
SHARE = 0.25  # of what weights and cache leave, for scratch
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


def suited_tokens(experts: float) -> int:
    """Tokens of a step that suit a model: FOR_EXPERT for each of a layer's experts, if all are chosen alike, within
    what is worth it for others' sake. experts: how many there are for each that a token takes."""
    return min(max(int(FOR_EXPERT * experts) // _TILE * _TILE, FEWEST), MOST)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a model takes, in bytes: all weights, a row of the cache, the scratch of a token of a step; files that will
    be mapped. experts: see ``suited_tokens``."""

    name: str
    weights: int
    row: int
    scratch: int
    mapped: int
    experts: float

    def step_tokens(self, rows: int, max_seqs: int) -> int:
        """Tokens that a step may have, a multiple of 64: what suits the model, but no more than take a SHARE of what
        weights and a cache of so many rows leave, which is counted as if nobody else were here; and one for each
        sequence, whatever they take."""
        left = limit_bytes(self.mapped) - self.weights - self.row * rows
        fitting = max(int(SHARE * left) // self.scratch, 0) // _TILE * _TILE
        return max(min(suited_tokens(self.experts), fitting), -(-max_seqs // _TILE) * _TILE)

    def require(self, rows: int, tokens: int) -> None:
        """PlanError if a cache of so many rows and steps of so many tokens are more than can be held."""
        tokens = min(tokens, rows)  # each writes one
        limit, cache, scratch = limit_bytes(self.mapped), self.row * rows, self.scratch * tokens
        needed = self.weights + cache + scratch
        if needed <= limit:
            return
        left = 9 * limit // 10 - self.weights  # others want some, too
        fitting = (left - scratch) // self.row // _PAGE * _PAGE
        advice = "a smaller --format, or a machine with more"
        if fitting > 0:
            advice = f"--context {fitting}"
        elif left > 0 and tokens > _TILE:
            advice = "a smaller --max-batch-tokens or --max-seqs"
        n, w, c, s, has = (f"{n / 1e9:,.1f}" for n in (needed, self.weights, cache, scratch, limit))
        raise PlanError(f"{self.name} needs {n} GB of memory (weights {w}, {rows:,} rows of the cache {c}, steps of "
                        f"{tokens:,} tokens {s}), and this machine has {has} for it; try {advice}")  # fmt: skip


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
