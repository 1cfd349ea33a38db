"""Bodies in, events out: what HTTP needs, whatever the dialect."""

import asyncio
import contextlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from glm52.errors import CapacityError, RequestError
from glm52.server.limits import Limits
from glm52.server.request import Answer, Frame, encoded
from glm52.server.service import Call

logger = logging.getLogger(__name__)

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# What httpx and others take for the end of a line; in JSON, and so in events, they stand in strings alone.
_LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_LAST_S = 1.0  # for what is said last, when time is up


async def json_body(request: Request, limits: Limits) -> Any:
    """The decoded body, within its bounds of size and time. What is too large is read on and dropped, since a client
    that is still sending would not see the answer."""
    body, size, is_late = bytearray(), 0, False
    try:
        async with asyncio.timeout(limits.body_s):
            async for piece in request.stream():
                size += len(piece)
                if size <= limits.max_body_bytes:
                    body += piece
    except TimeoutError:
        is_late = True
    if size > limits.max_body_bytes:
        raise RequestError(f"the body is larger than {limits.max_body_bytes} bytes", status=413, code="body_too_large")
    if is_late:
        raise RequestError(f"the body took longer than {limits.body_s:g} s", status=408, code="body_timeout")
    try:
        value = json.loads(body, parse_constant=_no_constant, parse_float=_finite)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    return _mended(value) if _SURROGATE.search(body) else value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """A number that can be said back: JSON has no infinity."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is out of range")
    return number


def _mended(value: Any) -> Any:
    """Halves of characters, which clients that cut texts send, as the replacement character."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_mended(k): _mended(v) for k, v in value.items()}
    return [_mended(v) for v in value] if isinstance(value, list) else value


def sse(frames: Iterable[Frame]) -> bytes:
    out = []
    for name, data in frames:
        text = data if isinstance(data, str) else encoded(data)
        out.append(f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n")
    said = "".join(out)
    for end, escape in _LINE_ENDS.items():  # str.translate looks up every character, which takes thirty times as long
        said = said.replace(end, escape)
    return said.encode("utf-8", "replace")


def as_request_error(error: BaseException) -> RequestError:
    """Any error as one with a status; what is not ours is logged and named no further."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, CapacityError):
        return RequestError(str(error), status=429, code="queue_full")
    if isinstance(error, RecursionError):
        return RequestError("the body is nested too deeply", code="too_deep")
    if isinstance(error, HTTPException):
        return RequestError(error.detail, status=error.status_code)
    logger.error("request failed", exc_info=error)
    return RequestError("internal error; the server's log has the details", status=500)


async def run_whole(request: Request, call: Call) -> None:
    """All answers to their end."""

    async def drain(answer: Answer) -> None:
        async for _ in call.run(answer):
            pass

    await _to_the_end(call, map(drain, call.answers), request.receive)


class EventStream:
    """A response of server-sent events: those of all answers as they come, and a sign of life when nothing came for a
    while. The head goes out with the first token, or after ``first_wait_s`` without one: an error before that is
    raised, so that it becomes a status; after that it is an event.
    """

    def __init__(self, call: Call, writer: Any, headers: Mapping[str, str]) -> None:
        self._call, self._writer = call, writer
        self._headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **headers}
        self._is_begun = False
        self._unsaid: list[Frame] = []
        self._said_at = time.monotonic()
        self._sending: list[float] = []  # when what the client has not taken yet was begun, the oldest first
        self._failure: BaseException | None = None  # of a sign of life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send, call, status = send, self._call, 499
        try:
            await _to_the_end(call, map(self._follow, call.answers), receive, self._look)
            await self._in_time(self._say(self._writer.close(call.answers, call.usage), is_last=True))
            status = 200
        except ClientDisconnect:
            if not self._is_begun:
                raise
        except Exception as error:
            known = as_request_error(error)
            status, call.error = known.status, known
            if not self._is_begun:
                raise known from error
            with contextlib.suppress(ClientDisconnect):
                await self._in_time(self._say(self._writer.fail(known), is_last=True))
        finally:
            call.finish(status)

    async def _follow(self, answer: Answer) -> None:
        async for deltas, logprobs in self._call.run(answer):
            if not self._is_begun:
                await self._begin()
            self._unsaid += self._writer.more(answer, deltas, logprobs)
            if not answer.reason:
                await self._say()
        self._unsaid += self._writer.end(answer)
        if not all(a.reason for a in self._call.answers):  # the last goes out with what closes the stream
            await self._say()

    def _look(self) -> float:
        """Seconds until the next look. A sign of life if nothing was said for a while; ClientDisconnect once the client
        has left something unread for too long."""
        if self._failure is not None:
            raise self._failure
        limits = self._call.service.options.limits
        patience = limits.keep_alive_s if self._is_begun else limits.first_wait_s
        since, patience = (self._sending[0], limits.send_s) if self._sending else (self._said_at, patience)
        left = since + patience - time.monotonic()
        if left > 0:
            return left
        if self._sending:
            raise ClientDisconnect
        # What it has begun to say is said, though the replies end meanwhile; then nobody asks how that went.
        asyncio.ensure_future(self._in_time(self._sign())).add_done_callback(self._signed)
        return patience

    def _signed(self, sign: asyncio.Future[None]) -> None:
        if not sign.cancelled():
            self._failure = sign.exception()

    async def _sign(self) -> None:
        if not self._is_begun:
            await self._begin()
        await self._say(sign=self._writer.keep_alive)

    async def _begin(self) -> None:
        self._is_begun = True
        usage = self._call.usage
        self._unsaid += self._writer.begin(usage.prompt_tokens, usage.cached_tokens)
        headers = [(k.encode(), v.encode()) for k, v in self._headers.items()]
        await self._put({"type": "http.response.start", "status": 200, "headers": headers})

    async def _say(self, frames: Iterable[Frame] = (), *, sign: bytes = b"", is_last: bool = False) -> None:
        """What is yet unsaid, these frames, a sign of life: together, for each trip to the socket costs more than its
        bytes."""
        self._said_at = time.monotonic()
        body = sse([*self._unsaid, *frames]) + sign
        self._unsaid.clear()
        if body or is_last:
            await self._put({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def _put(self, message: Message) -> None:
        began = time.monotonic()
        self._sending.append(began)
        try:
            await self._send(message)
        finally:
            self._sending.remove(began)

    async def _in_time(self, saying: Coroutine[Any, Any, None]) -> None:
        """Something that may be said when nobody watches any more. ClientDisconnect if the client does not read."""
        patience = min(self._call.service.options.limits.send_s, max(self._call.time_left(), _LAST_S))
        try:
            async with asyncio.timeout(patience):
                await saying
        except TimeoutError:
            raise ClientDisconnect from None


async def _to_the_end(
    call: Call, replies: Iterable[Coroutine[Any, Any, None]], receive: Receive, look: Callable[[], float] | None = None
) -> None:
    """All replies to their end; everything stops as soon as one fails, the client hangs up, time is up or ``look``
    raises, which returns the seconds until it must be called again."""
    tasks = [asyncio.ensure_future(r) for r in replies]
    done, gone = asyncio.gather(*tasks), asyncio.ensure_future(_disconnected(receive))
    stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(ended: asyncio.Future[Any]) -> None:
        error = asyncio.CancelledError() if ended.cancelled() else ended.exception()
        if not stop.done():
            stop.set_exception(error) if error else stop.set_result(None)

    def watch() -> float:
        try:
            if call.time_left() <= 0:
                raise call.overdue()
            return min(call.time_left(), look() if look else math.inf)
        except Exception as error:
            if not stop.done():
                stop.set_exception(error)
            return math.inf

    for ending in (done, gone):
        ending.add_done_callback(end)
    try:
        with call.service.clock.watching(watch):
            await stop
    finally:
        for waiting in (*tasks, gone):
            waiting.cancel()
        await asyncio.gather(*tasks, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect
