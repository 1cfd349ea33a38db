"""The engine's thread and its readers: what is late comes together, what fails is told."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from glm52.engine import AsyncEngine, Event, SamplingParams, generate
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

    with pytest.raises(MemoryError, match="no more"):
        asyncio.run(main())
    assert found == seen[:3]
