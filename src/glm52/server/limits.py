"""Who may ask, how much, and who is next: keys, bounds, and a gate that is fair between clients. No HTTP."""

import asyncio
import contextlib
import hashlib
import hmac
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from glm52.errors import CapacityError, RequestError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """head_s, body_s: the longest a client may take to send the head of its request, and the body. max_running: replies
    computed at once; max_waiting: replies that may wait for that. deadline_s: the longest a request may take. send_s:
    the longest a client may leave a stream unread. drain_s: how long running requests have to end once the server is
    told to stop."""

    max_body_bytes: int = 32 << 20
    head_s: float = 10.0
    body_s: float = 60.0
    max_running: int = 8
    max_waiting: int = 256
    deadline_s: float | None = None
    send_s: float = 60.0
    drain_s: float = 30.0
    keep_alive_s: float = 10.0
    first_wait_s: float = 2.0


class Keys:
    """API keys. Without any, every key is welcome, and none too."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(k) for k in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def client(self, authorization: str | None, x_api_key: str | None, peer: str) -> str:
        """A name for who asks: drawn from the key, or the address where none is given. RequestError 401 if the key is
        not one of ours. All keys are compared whole, so that time tells nothing."""
        scheme, _, token = (authorization or "").partition(" ")
        given = (token.strip() if scheme.lower() == "bearer" else "") or (x_api_key or "").strip()
        digest = _digest(given)
        known = sum(hmac.compare_digest(digest, d) for d in self._digests)
        if self._digests and not known:
            raise RequestError("a valid API key is required, as Authorization: Bearer KEY or as x-api-key: KEY",
                               status=401, code="invalid_api_key")  # fmt: skip
        return f"key-{digest.hex()[:12]}" if given else peer


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Gate:
    """Lets ``max_running`` replies run; the others wait, and clients take turns, whoever asks most."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self.running = self._admitted = 0
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def waiting(self) -> int:
        return sum(len(q) for q in self._waiting.values())

    def admit(self, count: int) -> None:
        """Count in the replies of a request, before they ask for their turn, until it is dismissed. CapacityError if
        they would overfill the queue; one request alone may always come."""
        if self._admitted and self._admitted + count > self.max_running + self.max_waiting:
            raise CapacityError(f"the queue is full with {self.waiting} replies waiting; try again later")
        self._admitted += count

    def dismiss(self, count: int) -> None:
        self._admitted -= count

    @contextlib.asynccontextmanager
    async def slot(self, client: str) -> AsyncIterator[None]:
        await self._enter(client)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, client: str) -> None:
        if self.running < self.max_running and not self._waiting:
            self.running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # the turn had come just now: the next one takes it
            else:
                self._forget(client, turn)
            raise

    def _forget(self, client: str, turn: "asyncio.Future[None]") -> None:
        queue = self._waiting.get(client)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[client]

    def _leave(self) -> None:
        """Hand the place to the client whose turn it is, and send that client to the end of the line."""
        while self._waiting:
            client, queue = next(iter(self._waiting.items()))
            turn = queue.popleft()
            if queue:
                self._waiting.move_to_end(client)
            else:
                del self._waiting[client]
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
