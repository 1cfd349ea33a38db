"""Page accounting and scheduling under random traffic, checked against a model of what should be there."""

import random
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from glm52.engine.params import SamplingParams
from glm52.engine.scheduler import Scheduler
from glm52.engine.sequence import Sequence
from glm52.errors import CapacityError
from glm52.pages import Pages


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 30), num_pages=st.integers(1, 12), page_size=st.integers(1, 4))
def test_pages_under_random_traffic(seed: int, num_pages: int, page_size: int) -> None:
    """What a page is said to hold is what was written to it, whoever writes and releases."""
    rng, pages = random.Random(seed), Pages(num_pages, page_size)
    content: dict[int, tuple[int, ...]] = {}
    living: list[list[int]] = []
    for _ in range(60):
        tokens = [rng.randrange(2) for _ in range(rng.randint(1, 3 * page_size + 1))]
        if rng.random() < 0.6:
            mine = pages.match(tokens)
            for i, page in enumerate(mine):
                assert content[page] == tuple(tokens[: (i + 1) * page_size]), "a match is the same prefix"
            assert len(mine) * page_size < len(tokens), "the last token is always computed"
            lacking = pages.pages_for(len(tokens)) - len(mine)
            if lacking > pages.available:
                try:
                    pages.allocate(lacking)
                    raise AssertionError("more pages than there are")
                except CapacityError:
                    pages.release(mine)
            else:
                mine += pages.allocate(lacking)
                for i, page in enumerate(mine):
                    content[page] = tuple(tokens[: (i + 1) * page_size])
                pages.commit(mine, tokens)
                living.append(mine)
        elif living:
            pages.release(living.pop(rng.randrange(len(living))))
        pages.check(living)
    for mine in living:
        pages.release(mine)
    pages.check()
    assert pages.available == num_pages


def sequence(id: int, length: int, rng: random.Random) -> Sequence:
    prompt = [rng.randrange(3) for _ in range(length)]
    return Sequence(id=id, prompt=prompt, tokens=list(prompt), params=SamplingParams(), seed=0, max_tokens=8)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 30), max_seqs=st.integers(1, 4), spare=st.integers(0, 12), beside=st.integers(1, 12))
def test_the_scheduler_keeps_its_budget_and_starves_nobody(seed: int, max_seqs: int, spare: int, beside: int) -> None:
    """No model: every scheduled sequence simply gets a token when its prompt is computed, and ends after eight."""
    with patch("glm52.engine.scheduler.BESIDE_REPLIES", beside):
        _play(random.Random(seed), max_seqs, spare, beside)


def _play(rng: random.Random, max_seqs: int, spare: int, beside: int) -> None:
    scheduler = Scheduler(Pages(12, 2), max_seqs + spare, max_seqs)
    for i in range(rng.randint(1, 8)):
        scheduler.waiting.append(sequence(i, rng.randint(1, 14), rng))
    total, steps, done = len(scheduler.waiting), 0, 0
    while scheduler.running or scheduler.waiting:
        going_on = sum(1 + len(s.drafts) for s in scheduler.running)
        is_awaited = any(s.num_uncached == 1 for s in scheduler.running)
        work = scheduler.schedule()
        assert work, "something always moves"
        assert sum(w.count for w in work) <= scheduler.max_batch_tokens and len(work) <= max_seqs
        assert not is_awaited or sum(w.count for w in work) <= going_on + beside
        assert all(w.count > 0 and len(w.seq.pages) * 2 >= w.seq.num_cached + w.count for w in work)
        assert len(work) == len(scheduler.running), "every running sequence moves in every step"
        for w in work:
            w.seq.num_cached += w.count - w.drafts
            scheduler.pages.commit(w.seq.pages, w.seq.tokens[: w.seq.num_cached])
            if w.seq.num_cached == len(w.seq.tokens):
                w.seq.tokens.append(rng.randrange(3))
                w.seq.drafts = [0] * rng.randint(0, 2)
                if len(w.seq.output) == 8:
                    scheduler.leave(w.seq)
                    done += 1
        scheduler.pages.check([s.pages for s in scheduler.running])
        steps += 1
        assert steps < 2000
    assert done == total
