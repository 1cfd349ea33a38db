"""The engine's thread and its readers: what is late comes together, what fails is told."""

import asyncio
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from glm52.engine import AsyncEngine, Event, SamplingParams, generate
from glm52.errors import CapacityError, RequestError
from tests.scripted import TOKENIZER, ScriptedModel, always

PROMPT = TOKENIZER.encode("Hi")
PARAMS = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=1)


def read(backend: AsyncEngine, pause: Callable[[], None]) -> list[Event]:
    """The events of one reply; pause holds up the event loop after the first."""

    async def main() -> list[Event]:
        found = []
        async for event in backend.generate(PROMPT, PARAMS):
            found.append(event)
            if len(found) == 1:
                pause()
        return found

    return asyncio.run(main())


def test_a_reader_that_is_late_gets_the_rest_as_one_event() -> None:
    (expected,) = generate(ScriptedModel(always(" and so on")).engine(), [PROMPT], PARAMS)
    backend = AsyncEngine(ScriptedModel(always(" and so on")).engine())
    events = read(backend, pause=backend.close)
    assert len(events) <= 2 and events[-1].finish_reason == "length"
    assert [t for e in events for t in e.token_ids] == expected.output
    assert "".join(e.text for e in events) == TOKENIZER.decode(expected.output)
    assert [p.token_id for e in events for p in e.logprobs] == expected.output


def test_a_failure_is_told_after_what_came_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = AsyncEngine(ScriptedModel(always(" and so on")).engine())
    step, seen = backend.engine.step, []

    def failing() -> list[Event]:
        events = step()
        seen.extend(t for e in events for t in e.token_ids)
        if len(seen) > 3:
            raise MemoryError("no more")
        return events

    monkeypatch.setattr(backend.engine, "step", failing)
    found: list[Any] = []

    async def main() -> None:
        async for event in backend.generate(PROMPT, PARAMS):
            found.extend(event.token_ids)
            backend._thread.join()

    for _ in range(2):
        with pytest.raises(RequestError) as caught:
            asyncio.run(main())
        assert (caught.value.status, caught.value.code) == (503, "engine_failed")
        assert caught.value.__cause__ is backend.failure, "an error of its own for each"
    assert found == seen[:3] and str(backend.failure) == "no more" and not backend._aborted


def test_who_comes_while_it_closes_is_served_or_refused() -> None:
    """The thread had looked for work for the last time when a request came in at an open door."""
    backend = AsyncEngine(ScriptedModel(always(" and so on")).engine())
    submit, closing = backend.engine.submit, threading.Thread(target=backend.close)

    def late(*args: Any) -> Any:
        closing.start()
        backend._thread.join(0.2)
        return submit(*args)

    backend.engine.submit = late  # type: ignore[method-assign]
    assert read(backend, pause=lambda: None)[-1].finish_reason == "length"
    closing.join()
    with pytest.raises(CapacityError):
        read(backend, pause=lambda: None)


def paced(interval_s: float, step_s: float = 0.001) -> tuple[list[Event], list[float]]:
    """The events of one reply of a model that takes its time, and when each came."""
    backend = AsyncEngine(ScriptedModel(always(" and so on")).engine(), interval_s=interval_s)
    step = backend.engine.step

    def slow() -> list[Event]:
        time.sleep(step_s)
        return step()

    backend.engine.step = slow  # type: ignore[method-assign]
    found, times = [], []

    async def main() -> None:
        async for event in backend.generate(PROMPT, PARAMS):
            found.append(event)
            times.append(time.monotonic())

    asyncio.run(main())
    backend.close()
    return found, times


def test_what_comes_within_the_interval_is_one_event() -> None:
    (every, _), (few, times) = paced(0.0), paced(0.05)
    assert len(every) >= 30 and len(few) <= 6
    for pick in (lambda e: e.token_ids, lambda e: e.text, lambda e: [p.token_id for p in e.logprobs]):
        assert [x for e in every for x in pick(e)] == [x for e in few for x in pick(e)]
    assert len(few[0].token_ids) == 1, "the first waits for nothing"
    assert all(b - a >= 0.045 for a, b in pairwise(times[:-1])), "but for the last"


def test_a_slow_model_keeps_an_event_a_token() -> None:
    assert all(len(e.token_ids) <= 1 for e in paced(0.002, step_s=0.01)[0])


def test_the_end_waits_for_nothing() -> None:
    events, times = paced(30.0)
    assert len(events) == 2 and events[-1].finish_reason == "length" and times[-1] - times[0] < 10


def test_what_was_held_back_comes_in_time_though_the_engine_stands_still() -> None:
    """As when the long prompt of another is computed."""
    backend = AsyncEngine(ScriptedModel(always(" and so on")).engine(), interval_s=0.1)
    step, num_tokens = backend.engine.step, 0
    is_read, goes_on = threading.Event(), threading.Event()

    def stalling() -> list[Event]:
        nonlocal num_tokens
        if stall := {1: is_read, 4: goes_on}.get(num_tokens):
            stall.wait(30)
        events = step()
        num_tokens += sum(len(e.token_ids) for e in events)
        return events

    backend.engine.step = stalling  # type: ignore[method-assign]

    async def main() -> int:
        events = backend.generate(PROMPT, PARAMS)
        first = await anext(events)
        is_read.set()
        began = time.monotonic()
        second = await anext(events)
        assert not goes_on.is_set() and time.monotonic() - began < 10
        goes_on.set()
        assert len(first.token_ids) == 1
        await events.aclose()  # type: ignore[attr-defined]
        return len(first.token_ids) + len(second.token_ids)

    assert asyncio.run(main()) == 4
    backend.close()


def test_streams_fall_due_together() -> None:
    backend = AsyncEngine(ScriptedModel(always(" and so on")).engine(), interval_s=0.01)
    step, waits = backend.engine.step, []

    def slow() -> list[Event]:
        time.sleep(0.001)
        return step()

    backend.engine.step = slow  # type: ignore[method-assign]

    async def main() -> list[int]:
        async def follow() -> int:
            return sum([1 async for _ in backend.generate(PROMPT, PARAMS)])

        loop = asyncio.get_running_loop()
        call_later = loop.call_later
        loop.call_later = lambda s, *call: waits.append(s) or call_later(s, *call)  # type: ignore
        return await asyncio.gather(*[follow() for _ in range(4)])

    counts = asyncio.run(main())
    backend.close()
    assert min(counts) > 2 and 0 < sum(w >= 0.01 for w in waits) < sum(counts) / 2


def test_many_streams_are_told_more_rarely() -> None:
    """Readers that take a millisecond, ten in all, against an interval of twenty: two hundred times that, but no more than
    fourfold."""
    backend, waits = AsyncEngine(ScriptedModel(always(" and so on")).engine(max_seqs=10), interval_s=0.02), []

    async def main() -> None:
        async def follow() -> None:
            async for _ in backend.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=2000)):
                time.sleep(0.001)

        loop = asyncio.get_running_loop()
        call_later = loop.call_later
        loop.call_later = lambda s, *call: waits.append(s) or call_later(s, *call)  # type: ignore
        await asyncio.gather(*[follow() for _ in range(10)])

    asyncio.run(main())
    backend.close()
    ticks = [w for w in waits if w >= 0.02]
    assert ticks[0] == 0.02 and ticks[-1] == max(ticks) == pytest.approx(0.08)


def test_an_error_comes_after_what_was_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = AsyncEngine(ScriptedModel(always(" and so on")).engine(), interval_s=30.0)
    step, num_tokens = backend.engine.step, 0

    def failing() -> list[Event]:
        nonlocal num_tokens
        events = step()
        num_tokens += sum(len(e.token_ids) for e in events)
        if num_tokens < 5 or not events:
            return events
        backend.engine.abort(events[0].seq)
        return [Event(seq=events[0].seq, finish_reason="error", error="no more")]

    monkeypatch.setattr(backend.engine, "step", failing)

    async def main() -> list[Event]:
        return [event async for event in backend.generate(PROMPT, PARAMS)]

    *before, last = asyncio.run(main())
    assert (
        1 <= len(before) <= 2
        and sum(len(e.token_ids) for e in before) == 4
        and last.error == "no more"
        and not last.text
    )
    backend.close()
