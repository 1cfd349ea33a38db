"""How many tokens to draft: the depth that brought the most tokens a second, measured while serving.

Pure: it is told what steps brought and took, and answers with a depth. Depths are tried in stretches of steps; a depth
of 0 is one of them, so that drafting stops where it does not pay.
"""

from dataclasses import dataclass, field

STRETCH = 16  # steps at one depth; the first still verifies the drafts of the stretch before and is not counted
RETRY = 8  # stretches until a neighbour of the best depth is measured again


@dataclass
class _Rates:
    """Tokens per second by depth for one size of batch."""

    by_depth: dict[int, float] = field(default_factory=dict)
    stretches: int = 0


@dataclass
class DraftPolicy:
    """limit: the largest depth, also the one to start with. Batches of similar size share their measurements."""

    limit: int
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        self.depth = self.limit
        self._rates: dict[int, _Rates] = {}
        self._size = 0
        self._begin_stretch()

    def observe(self, num_seqs: int, tokens: int, seconds: float) -> None:
        """One step that only decoded brought ``tokens`` to ``num_seqs`` sequences in ``seconds``."""
        if num_seqs.bit_length() != self._size:
            self._size = num_seqs.bit_length()
            if self._size in self._rates:
                self.depth = self._next(self._rates[self._size])
            self._begin_stretch()
        self._steps += 1
        if self._steps == 1:
            return
        self._tokens += tokens
        self._seconds += seconds
        if self._steps == STRETCH:
            self._end_stretch()

    def _begin_stretch(self) -> None:
        self._steps = self._tokens = 0
        self._seconds = 0.0

    def _end_stretch(self) -> None:
        rates = self._rates.setdefault(self._size, _Rates())
        rate = self._tokens / self._seconds
        rates.by_depth[self.depth] = (rates.by_depth.get(self.depth, rate) + rate) / 2
        rates.stretches += 1
        self.depth = self._next(rates)
        self._begin_stretch()

    def _next(self, rates: _Rates) -> int:
        """Depths that were never measured, downwards; then the best, and now and then one of its neighbours."""
        unknown = [d for d in range(self.limit, -1, -1) if d not in rates.by_depth]
        if unknown:
            return unknown[0]
        best = max(rates.by_depth, key=lambda d: (rates.by_depth[d], -d))
        if rates.stretches % RETRY:
            return best
        step = 1 if rates.stretches // RETRY % 2 else -1
        return min(max(best + step, 0), self.limit)
