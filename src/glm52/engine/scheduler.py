"""Who computes how many tokens in the next step. Plain data in, a plan out; the pages are its only resource.

Running sequences come first, oldest first, each with its next token and its drafts; what is left of the token budget
goes to prompts in chunks: while a reply runs in small ones, since it waits for each. When pages run out the youngest
running sequence is put back, whole, to be computed again.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from glm52.engine.sequence import Sequence
from glm52.pages import Pages

BESIDE_REPLIES = 512  # tokens of prompts in a step that replies wait for


@dataclass(frozen=True)
class Work:
    """Compute tokens [num_cached, num_cached + count) of a sequence; the last ``drafts`` of them are its drafts."""

    seq: Sequence
    count: int
    drafts: int


@dataclass
class Scheduler:
    """Queues and the budget of a step: at most ``max_batch_tokens`` tokens of at most ``max_seqs`` sequences; while a
    reply runs, at most BESIDE_REPLIES more than all that run need to go on."""

    pages: Pages
    max_batch_tokens: int
    max_seqs: int
    running: list[Sequence] = field(default_factory=list)
    waiting: deque[Sequence] = field(default_factory=deque)
    num_preemptions: int = 0

    def schedule(self, is_ready: Callable[[Sequence], bool] = lambda seq: True) -> list[Work]:
        """The next step's work; its pages are allocated. is_ready: whether a sequence may start now."""
        plan: list[Work] = []
        limit = budget = self._limit()
        for seq in list(self.running):
            if seq in self.running:  # an older one's need may have put it back
                work = self._continue(seq, budget - self._kept_from(seq, limit))
                if work is not None:
                    plan.append(work)
                    budget -= work.count
        while self.waiting and budget > 0 and len(self.running) < self.max_seqs:
            work = self._admit(self.waiting[0], budget) if is_ready(self.waiting[0]) else None
            if work is None:
                break
            self.running.append(self.waiting.popleft())
            plan.append(work)
            budget -= work.count
        return plan

    def _limit(self) -> int:
        """Tokens of the next step. Prompts alone may have all; a reply should not stutter for them."""
        if not any(seq.num_uncached == 1 for seq in self.running):
            return self.max_batch_tokens
        going_on = sum(1 + len(seq.drafts) for seq in self.running)
        return min(self.max_batch_tokens, going_on + BESIDE_REPLIES)

    def _kept_from(self, seq: Sequence, limit: int) -> int:
        """Tokens of a step's that are kept for others, so that a long prompt stalls nobody: one for every running
        sequence behind this one, and a quarter of the rest for who waits and may come."""
        behind = len(self.running) - self.running.index(seq) - 1
        if not self.waiting or len(self.running) == self.max_seqs or self._lacks_pages(self.waiting[0], 0):
            return behind
        return behind + (limit - len(self.running)) // 4

    def _lacks_pages(self, seq: Sequence, matched: int) -> bool:
        """Whether too few pages are free for a sequence to begin: those that running prompts will need are not."""
        promised = sum(max(0, self.pages.pages_for(len(s.tokens) + 1) - len(s.pages)) for s in self.running)
        return self.pages.pages_for(len(seq.tokens) + 1) - matched > self.pages.available - promised

    def _continue(self, seq: Sequence, budget: int) -> Work | None:
        count = min(seq.num_uncached, budget)
        drafts = min(len(seq.drafts), budget - count) if count == seq.num_uncached else 0
        if drafts and not self._grow(seq, seq.num_cached + count + drafts):
            drafts = 0  # guesses put nobody back
        while not self._grow(seq, seq.num_cached + count + drafts):
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is seq:
                return None
        return Work(seq, count + drafts, drafts)

    def _admit(self, seq: Sequence, budget: int) -> Work | None:
        """Start a sequence if all of its tokens would fit now, beginning after the prefix that is cached."""
        pages = self.pages.match(seq.tokens) if seq.is_scored else []
        if self._lacks_pages(seq, len(pages)):
            self.pages.release(pages)
            return None
        seq.pages = pages
        seq.num_cached = len(pages) * self.pages.page_size
        if not seq.has_begun:  # later the pages found are its own
            seq.has_begun, seq.num_cached_tokens = True, min(seq.num_cached, len(seq.prompt))
        count = min(seq.num_uncached, budget)
        grown = self._grow(seq, seq.num_cached + count)
        assert grown
        return Work(seq, count, 0)

    def _grow(self, seq: Sequence, num_rows: int) -> bool:
        """Allocate what the sequence lacks for that many rows; False if there are too few pages."""
        lacking = self.pages.pages_for(num_rows) - len(seq.pages)
        if lacking > self.pages.available:
            return False
        seq.pages += self.pages.allocate(max(0, lacking))
        return True

    def preempt(self, seq: Sequence) -> None:
        """Back to the head of the queue; its full pages stay findable until someone needs them."""
        self.leave(seq)
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def leave(self, seq: Sequence) -> None:
        """Take a sequence out of whichever queue it is in, and its pages back."""
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self.pages.release(seq.pages)
        seq.pages, seq.num_cached = [], 0
        seq.drafts = []
