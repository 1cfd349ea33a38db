"""The engine on a thread of its own, and each reply as an asynchronous stream of events.

Leaving a stream early (a cancelled task, a client that hung up) aborts its sequence before the next step. An error in
the engine's thread reaches every stream; none waits for ever.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from glm52.engine.engine import Engine
from glm52.engine.params import SamplingParams
from glm52.engine.sequence import Event, Sequence
from glm52.errors import CapacityError

logger = logging.getLogger(__name__)

_Deliver = Callable[[Event | BaseException], None]


class AsyncEngine:
    """Owns the thread that steps ``engine``. ``max_waiting``: requests that may queue before more are refused.

    Only that thread touches the engine, but for ``submit``, which appends to a queue; so the event loop never waits for
    a step. Aborts are handed over and done between steps.
    """

    def __init__(self, engine: Engine, max_waiting: int = 256) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self._streams: dict[Sequence, _Deliver] = {}
        self._aborted: deque[Sequence] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="glm52-engine", daemon=True)
        self._thread.start()

    async def generate(self, tokens: Iterable[int], params: SamplingParams) -> AsyncIterator[Event]:
        """Events of one reply until its finish_reason. RequestError if it can never be served."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event | BaseException] = asyncio.Queue()

        def deliver(item: Event | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        if params.grammar is not None and self.engine.matchers is not None:
            await asyncio.to_thread(self.engine.matchers.compile, params.grammar)
        seq = self._submit(tokens, params, deliver)
        try:
            while True:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._streams.pop(seq, None)
            self._aborted.append(seq)
            self._wake.set()

    def close(self) -> None:
        """Let running replies end, then stop the thread; pages that wait for the disk are written."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        if self.engine.store is not None:
            self.engine.store.close()

    def _submit(self, tokens: Iterable[int], params: SamplingParams, deliver: _Deliver) -> Sequence:
        if self._failure is not None:
            raise self._failure
        if self._closing:
            raise CapacityError("the server is shutting down")
        if len(self.engine.scheduler.waiting) >= self.max_waiting:
            raise CapacityError(f"the queue is full with {self.max_waiting} requests; try again later")
        seq = self.engine.submit(tokens, params)
        self._streams[seq] = deliver
        self._wake.set()
        return seq

    def _run(self) -> None:
        try:
            while self.engine.has_work or not self._closing:
                self._wake.clear()
                while self._aborted:
                    self.engine.abort(self._aborted.popleft())
                for event in self.engine.step():
                    deliver = self._streams.get(event.seq)
                    if deliver is not None:
                        deliver(event)
                if not self.engine.has_work and not self._aborted and not self._closing:
                    self._wake.wait()
        except BaseException as error:  # a thread has no caller: every stream is told
            logger.exception("the engine stopped")
            self._failure = error
            for deliver in list(self._streams.values()):
                deliver(error)
