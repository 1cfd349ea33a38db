"""How many tokens to draft: the depth that brought the most tokens a second, measured while serving.

Pure: it is told what steps brought and took, and answers with a depth. Depths are tried in stretches of steps; a depth
of 0 is one of them, so that drafting stops where it does not pay.
"""

from dataclasses import dataclass, field

STRETCH = 16  # steps at one depth
RETRY = 8  # stretches until a neighbour of the best depth is measured again


@dataclass
class _Size:
    """Batches of similar size: tokens per second by depth, and the stretch under way, which others may interrupt."""

    depth: int
    rates: dict[int, float] = field(default_factory=dict)
    stretches: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class DraftPolicy:
    """limit: the largest depth, also the one to start with. Batches of similar size share their measurements."""

    limit: int
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        self.depth = self._verified = self.limit
        self._sizes: dict[int, _Size] = {}

    def observe(self, num_seqs: int, tokens: int, seconds: float) -> None:
        """One step that only decoded brought ``tokens`` to ``num_seqs`` sequences in ``seconds``."""
        size = self._sizes.setdefault(num_seqs.bit_length(), _Size(self.depth))
        # After a change a step drafts at another depth than its size is measured at, and the next still verifies that.
        if self._verified == self.depth == size.depth:
            size.steps += 1
            size.tokens += tokens
            size.seconds += seconds
            if size.steps == STRETCH:
                self._end_stretch(size)
        self._verified, self.depth = self.depth, size.depth

    def _end_stretch(self, size: _Size) -> None:
        rate = size.tokens / size.seconds
        size.rates[size.depth] = (size.rates.get(size.depth, rate) + rate) / 2
        size.stretches += 1
        size.steps, size.tokens, size.seconds = 0, 0, 0.0
        size.depth = self._next(size)

    def _next(self, size: _Size) -> int:
        """Depths that were never measured, downwards; then the best, and now and then one of its neighbours."""
        unknown = [d for d in range(self.limit, -1, -1) if d not in size.rates]
        if unknown:
            return unknown[0]
        best = max(size.rates, key=lambda d: (size.rates[d], -d))
        if size.stretches % RETRY:
            return best
        step = 1 if size.stretches // RETRY % 2 else -1
        return min(max(best + step, 0), self.limit)
