"""One timer for all that waits on an event loop."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

_LOOK_S = 1.0  # the longest between two looks


class Clock:
    """Looks at everything that is being watched, together: a timer for each wakes the event loop for each, and on cores
    that a model computes on a waking costs a hundred times what a look does."""

    def __init__(self) -> None:
        self._looks: list[Callable[[], float]] = []
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def watching(self, look: Callable[[], float]) -> Iterator[None]:
        """Calls ``look`` now, then within the seconds that it returned last, and at least once a second. It raises
        nothing."""
        self._looks.append(look)
        self._arm(look())
        try:
            yield
        finally:
            self._looks.remove(look)
            if not self._looks and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _arm(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + min(seconds, _LOOK_S)
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._arm(min(look() for look in self._looks))
