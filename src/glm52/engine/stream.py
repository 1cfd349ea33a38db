"""The engine on a thread of its own, and each reply as an asynchronous stream of events.

A stream may be told at most once in an interval: what comes sooner is joined to one event, and until then costs no trip
to the event loop. Leaving a stream early (a cancelled task, a client that hung up) aborts its sequence before the next
step. An error in the engine's thread reaches every stream; none waits for ever.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from glm52.engine.engine import Engine
from glm52.engine.params import SamplingParams
from glm52.engine.sequence import Event, Sequence
from glm52.errors import CapacityError, RequestError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Stream:
    """One reply between the two threads. pending: what the engine's thread left here and ``loop`` has not taken, which
    changes behind ``door``; arrival: what the reader waits for where there is nothing to take; is_due: whether it
    wants to know of whatever comes, or of the end only."""

    loop: asyncio.AbstractEventLoop
    pending: deque[Event] = field(default_factory=deque)
    door: threading.Lock = field(default_factory=threading.Lock)
    arrival: asyncio.Future[None] | None = None
    is_due: bool = True

    @property
    def is_ready(self) -> bool:
        return bool(self.pending) and (self.is_due or self.pending[-1].finish_reason is not None)

    def put(self, event: Event) -> None:
        """What is pending already grows by it, on the core that has both in its caches: what a reader would have to
        join is cold there, and an event a token fills the caches of both. But a failure comes alone, after that."""
        with self.door:
            if self.pending and event.error is None:
                self.pending[-1].extend(event)
            else:
                self.pending.append(event)

    def take(self) -> Event:
        with self.door:  # so that nothing is added to what is taken
            return self.pending.popleft()

    def wake(self) -> None:
        if self.arrival is not None and not self.arrival.done():
            self.arrival.set_result(None)


_SHARE = 200  # intervals are so many times as long as telling all their streams takes,
_STRETCH = 4  # up to so many times what was asked for


class _Ticks:
    """Streams of one event loop that hold back what comes: all fall due together, though no further token comes. Where
    there are many, they fall due more rarely: what telling them takes is taken from the model."""

    def __init__(self, loop: asyncio.AbstractEventLoop, interval_s: float) -> None:
        self._loop, self._interval_s = loop, interval_s
        self._held: list[_Stream] = []
        self._telling_s = 0.0

    def hold(self, stream: _Stream) -> None:
        """Until an interval has passed since the first was held."""
        stream.is_due = False
        if not self._held:
            longest = _STRETCH * self._interval_s
            self._loop.call_later(min(max(self._interval_s, _SHARE * self._telling_s), longest), self._fall_due)
        self._held.append(stream)

    def _fall_due(self) -> None:
        held, self._held = self._held, []
        for stream in held:
            stream.is_due = True  # then the look at pending: the engine's thread does both the other way round
            if stream.pending:
                stream.wake()
        self._loop.call_soon(self._all_told, time.perf_counter())

    def _all_told(self, began: float) -> None:
        """Runs behind the readers that were woken, which have said what they had by then."""
        self._telling_s += (time.perf_counter() - began - self._telling_s) / 4


class AsyncEngine:
    """Owns the thread that steps ``engine``. ``max_waiting``: requests that may queue before more are refused.
    ``interval_s``: how long a stream holds back text after an event with text (up to four times as long where there are
    many); its first and its last never wait.

    Only that thread touches the engine, but for ``submit``, which appends to a queue; so the event loop never waits for
    a step. Aborts are handed over and done between steps.
    """

    def __init__(self, engine: Engine, max_waiting: int = 256, interval_s: float = 0.0) -> None:
        self.engine, self.max_waiting, self.interval_s = engine, max_waiting, interval_s
        self._streams: dict[Sequence, _Stream] = {}
        self._ticks: WeakKeyDictionary[asyncio.AbstractEventLoop, _Ticks] = WeakKeyDictionary()
        self._aborted: deque[Sequence] = deque()
        self._wake = threading.Event()
        self._door = threading.Lock()  # closed once nobody is in it
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="glm52-engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread before its time; nothing can be served after it."""
        return self._failure

    async def generate(self, tokens: Iterable[int], params: SamplingParams) -> AsyncIterator[Event]:
        """Events of one reply until its finish_reason. RequestError if it can never be served.

        What several steps brought while it was held back, or while nobody took it, comes as one event.
        """
        if params.grammar is not None and self.engine.matchers is not None:
            await asyncio.to_thread(self.engine.matchers.compile, params.grammar)
        loop = asyncio.get_running_loop()
        stream, ticks = _Stream(loop), self._ticks.setdefault(loop, _Ticks(loop, self.interval_s))
        seq = self._submit(tokens, params, stream)
        try:
            while True:
                while not stream.is_ready and self._failure is None:
                    stream.arrival = loop.create_future()
                    await stream.arrival
                if not stream.pending:
                    raise self._refusal()
                event = stream.take()
                yield event
                if event.finish_reason is not None:
                    return
                if event.text and self.interval_s > 0:
                    ticks.hold(stream)
        finally:
            self._streams.pop(seq, None)
            if seq.finish_reason is None and self._failure is None:
                self._aborted.append(seq)
                self._wake.set()

    def close(self) -> None:
        """Let running replies end, then stop the thread; pages that wait for the disk are written."""
        with self._door:
            self._closing = True
        self._wake.set()
        self._thread.join()
        if self.engine.store is not None:
            self.engine.store.close()

    def _refusal(self) -> RequestError:
        message = "the engine has failed; the server's log has the details"
        error = RequestError(message, status=503, code="engine_failed")
        error.__cause__ = self._failure
        return error

    def _submit(self, tokens: Iterable[int], params: SamplingParams, stream: _Stream) -> Sequence:
        with self._door:
            if self._failure is not None:
                raise self._refusal()
            if self._closing:
                raise CapacityError("the server is shutting down")
            if len(self.engine.scheduler.waiting) >= self.max_waiting:
                raise CapacityError(f"the queue is full with {self.max_waiting} requests; try again later")
            seq = self.engine.submit(tokens, params)
            self._streams[seq] = stream
        self._wake.set()
        return seq

    def _run(self) -> None:
        try:
            while not self._closing or self.engine.has_work:  # in this order: nothing is submitted after closing
                self._wake.clear()
                while self._aborted:
                    self.engine.abort(self._aborted.popleft())
                self._deliver(self.engine.step())
                if not self.engine.has_work and not self._aborted and not self._closing:
                    self._wake.wait()
        except BaseException as error:  # a thread has no caller: every stream is told
            logger.exception("the engine stopped")
            self._failure = error
            self._aborted.clear()
            _alert(list(self._streams.values()))

    def _deliver(self, events: Iterable[Event]) -> None:
        told = []
        for event in events:
            stream = self._streams.get(event.seq)
            if stream is not None:
                stream.put(event)
                if stream.is_due or event.finish_reason is not None:
                    told.append(stream)
        _alert(told)


def _alert(streams: list[_Stream]) -> None:
    """One trip to the event loop for all streams of a step: a trip each would cost more than what it brings."""
    for loop in {s.loop for s in streams}:
        with contextlib.suppress(RuntimeError):  # it is closed, so that nobody reads there
            loop.call_soon_threadsafe(_wake_readers, [s for s in streams if s.loop is loop])


def _wake_readers(streams: list[_Stream]) -> None:
    for stream in streams:
        stream.wake()
