"""Bodies in, events out: what HTTP needs, whatever the dialect."""

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Iterable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from glm52.chat import Delta
from glm52.engine import TokenLogprob
from glm52.errors import CapacityError, RequestError
from glm52.server.limits import Limits
from glm52.server.request import Answer, Frame
from glm52.server.service import Call

logger = logging.getLogger(__name__)

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_Item = tuple[Answer, list[Delta], list[TokenLogprob]] | Answer | Exception


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
        value = json.loads(body, parse_constant=_no_constant)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    return _mended(value) if _SURROGATE.search(body) else value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


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
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        out.append(f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n")
    return "".join(out).encode("utf-8", "replace")


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
    """All answers to their end; everything stops as soon as the client is gone or time is up."""

    async def drain(answer: Answer) -> None:
        async for _ in call.run(answer):
            pass

    done = asyncio.gather(*(drain(a) for a in call.answers))
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        while not done.done():
            left = call.time_left()
            if left <= 0:
                raise call.overdue()
            both: tuple[asyncio.Future[Any], ...] = (done, watcher)
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED, timeout=min(left, 1.0))
            if watcher.done() and not done.done():
                raise ClientDisconnect
        await done
    finally:
        watcher.cancel()
        done.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await done


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def events(call: Call, writer: Any) -> AsyncIterator[bytes]:
    """Server-sent events of all answers as they come; a sign of life when nothing came for a while.

    An error before the first item is raised, so that it becomes a status; after that it is an event. The first item
    comes with the first token, or after ``first_wait_s`` without one.
    """
    limits = call.service.options.limits
    queue: asyncio.Queue[_Item] = asyncio.Queue()

    async def pump(answer: Answer) -> None:
        try:
            async for deltas, logprobs in call.run(answer):
                queue.put_nowait((answer, deltas, logprobs))
            queue.put_nowait(answer)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(a)) for a in call.answers]
    begun, unfinished, status = False, len(tasks), 499
    try:
        while unfinished:
            item = await _next(queue, call, limits.keep_alive_s if begun else limits.first_wait_s)
            if isinstance(item, Exception):
                status = as_request_error(item).status
                if not begun:
                    raise item
                yield sse(writer.fail(as_request_error(item)))
                return
            head = b"" if begun else sse(writer.begin(call.usage.prompt_tokens, call.usage.cached_tokens))
            begun = True
            if item is None:
                yield head + writer.keep_alive
            elif isinstance(item, Answer):
                unfinished -= 1
                yield head + sse(writer.end(item))
            elif body := head + sse(writer.more(*item)):
                yield body
        yield sse(writer.close(call.answers, call.usage))
        status = 200
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        call.finish(status)


async def _next(queue: "asyncio.Queue[_Item]", call: Call, patience_s: float) -> _Item | None:
    """What comes next; None after ``patience_s`` without anything; an error once time is up."""
    left = call.time_left()
    if left <= 0:
        return call.overdue()
    try:
        async with asyncio.timeout(min(left, patience_s)):
            return await queue.get()
    except TimeoutError:
        return call.overdue() if call.time_left() <= 0 else None
