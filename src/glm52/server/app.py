"""The ASGI application: routes, body limits, server-sent events, and cancellation when a client hangs up."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from glm52.chat import ChatTemplate, Delta, ReplyParser, ToolCallStart, collect
from glm52.engine import Event, SamplingParams, TokenLogprob
from glm52.errors import CapacityError, RequestError
from glm52.server import openai
from glm52.server.request import ChatRequest, Usage
from glm52.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 << 20
KEEP_ALIVE_S = 15.0


class Backend(Protocol):
    """What answers: the engine's thread, or in a test a script."""

    def generate(self, tokens: Iterable[int], params: SamplingParams) -> AsyncIterator[Event]: ...


class Service:
    """One model behind the routes: renders prompts, runs the backend, reads replies."""

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer, template: ChatTemplate, *, name: str, context_length: int,
        defaults: dict[str, Any],
    ) -> None:  # fmt: skip
        self.backend, self.tokenizer, self.template = backend, tokenizer, template
        self.name, self.context_length, self.defaults = name, context_length, defaults
        self.created = int(time.time())

    def prompt(self, request: ChatRequest) -> list[int]:
        if request.model and request.model != self.name:
            raise RequestError(f"The model {request.model!r} does not exist; this server has {self.name!r}.",
                               status=404, param="model", code="model_not_found")  # fmt: skip
        return self.template.render_ids(self.tokenizer, request.messages, request.tools, request.thinking)


class Choice:
    """One reply while it arrives: parses the text, counts what it was made of."""

    def __init__(self, service: Service, request: ChatRequest, prompt: list[int], index: int) -> None:
        params = request.params
        if index and params.seed is not None:
            params = SamplingParams(**{**params.__dict__, "seed": params.seed + index})
        self._events = service.backend.generate(prompt, params)
        self._parser = ReplyParser(request.tools, thinking=request.thinking.enabled)
        self._end_think = service.tokenizer.id("</think>")
        self._thinking = request.thinking.enabled
        self.deltas: list[Delta] = []
        self.logprobs: list[TokenLogprob] = []
        self.completion_tokens = self.reasoning_tokens = self.cached_tokens = 0
        self.reason = "stop"

    async def run(self) -> AsyncIterator[tuple[list[Delta], list[TokenLogprob]]]:
        """Deltas and log probabilities of each event; RequestError if the engine could not go on."""
        async with contextlib.aclosing(self._events) as events:  # type: ignore[type-var]
            async for event in events:
                if event.error is not None:
                    raise RequestError(event.error, status=500, code="engine_error")
                for token in event.token_ids:
                    self.completion_tokens += 1
                    self._thinking = self._thinking and token != self._end_think
                    self.reasoning_tokens += self._thinking
                self.cached_tokens = event.seq.num_cached_tokens
                new = self._parser.feed(event.text)
                if event.finish_reason is not None:
                    self.reason = event.finish_reason
                    new += self._parser.close()
                self.deltas += new
                self.logprobs += event.logprobs
                yield new, event.logprobs

    @property
    def finish_reason(self) -> str:
        return openai.finish_reason(self.reason, any(isinstance(d, ToolCallStart) for d in self.deltas))


def _usage(prompt: list[int], choices: list[Choice]) -> Usage:
    return Usage(
        prompt_tokens=len(prompt),
        completion_tokens=sum(c.completion_tokens for c in choices),
        cached_tokens=max(c.cached_tokens for c in choices),
        reasoning_tokens=sum(c.reasoning_tokens for c in choices),
    )


async def chat_completions(request: Request) -> Response:
    service: Service = request.app.state.service
    chat = openai.read_request(await _json_body(request), service.defaults)
    prompt = service.prompt(chat)
    writer = openai.Writer(chat, service.name)
    choices = [Choice(service, chat, prompt, i) for i in range(chat.n)]
    headers = {"x-glm52-ignored": ", ".join(chat.ignored)} if chat.ignored else {}
    if chat.stream:
        stream = _stream(service, chat, writer, prompt, choices)
        first = await anext(stream)  # errors of a request that cannot be served come as a status, not inside the stream
        return StreamingResponse(_prepend(first, stream), media_type="text/event-stream", headers=headers)
    await _until_disconnect(request, [_drain(c) for c in choices])
    with_logprobs = chat.params.logprobs is not None
    payloads = [
        openai.choice_payload(
            i, collect(c.deltas, thinking=chat.thinking.enabled), c.finish_reason,
            openai.logprobs_payload(service.tokenizer, c.logprobs) if with_logprobs else None,
        )
        for i, c in enumerate(choices)
    ]  # fmt: skip
    return JSONResponse(writer.completion(payloads, _usage(prompt, choices)), headers=headers)


async def _drain(choice: Choice) -> None:
    async for _ in choice.run():
        pass


async def _until_disconnect(request: Request, work: list[Any]) -> None:
    """Run to the end, or stop everything as soon as the client is gone."""
    done = asyncio.gather(*work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        both: tuple[asyncio.Future[Any], ...] = (done, watcher)
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
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


async def _prepend(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(rest):  # type: ignore[type-var]
        yield first
        async for item in rest:
            yield item


async def _stream(
    service: Service, chat: ChatRequest, writer: openai.Writer, prompt: list[int], choices: list[Choice]
) -> AsyncIterator[bytes]:
    """Server-sent events of all choices as they come; a comment when nothing came for a while."""
    queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()

    async def pump(index: int, choice: Choice) -> None:
        try:
            queue.put_nowait(_sse(writer.chunk(index, {"role": "assistant", "content": ""})))
            async for deltas, logprobs in choice.run():
                chunks = writer.chunks(index, deltas)
                if logprobs and chat.params.logprobs is not None:
                    chunks = chunks or [writer.chunk(index, {})]
                    chunks[0]["choices"][0]["logprobs"] = openai.logprobs_payload(service.tokenizer, logprobs)
                for chunk in chunks:
                    queue.put_nowait(_sse(chunk))
            queue.put_nowait(_sse(writer.chunk(index, {}, choice.finish_reason)))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(i, c)) for i, c in enumerate(choices)]
    begun, open_choices = False, len(choices)
    held: list[bytes] = []
    try:
        while open_choices:
            try:
                item = await asyncio.wait_for(queue.get(), KEEP_ALIVE_S)
            except TimeoutError:
                item = b": still working\n\n"
            if isinstance(item, BaseException):
                if not begun:
                    raise item
                yield _sse(_error(item)[0])
                return
            if item is None:
                open_choices -= 1
            elif not begun and len(held) < 1:
                held.append(item)  # the role chunk waits for a sign that the request is being served
            else:
                begun = True
                yield b"".join([*held, item])
                held = []
        if chat.include_usage:
            yield _sse(writer.usage_chunk(_usage(prompt, choices)))
        yield b"data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _sse(payload: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n".encode()


async def _json_body(request: Request) -> Any:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"the body is larger than {MAX_BODY_BYTES} bytes", status=413, code="body_too_large")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error


async def models(request: Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse(openai.models_payload([service.name], service.created, service.context_length))


async def model(request: Request) -> Response:
    service: Service = request.app.state.service
    name = request.path_params["name"]
    if name != service.name:
        raise RequestError(f"The model {name!r} does not exist; this server has {service.name!r}.", status=404,
                           param="model", code="model_not_found")  # fmt: skip
    return JSONResponse(openai.model_payload(service.name, service.created, service.context_length))


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok", "model": request.app.state.service.name})


def _error(error: BaseException) -> tuple[dict[str, Any], int]:
    """Envelope and status of any error; what is not ours is logged and named no further."""
    if isinstance(error, RequestError):
        return openai.error_payload(str(error), error.status, error.param, error.code), error.status
    if isinstance(error, CapacityError):
        return openai.error_payload(str(error), 429, code="queue_full"), 429
    if isinstance(error, HTTPException):
        return openai.error_payload(error.detail, error.status_code), error.status_code
    logger.error("request failed", exc_info=error)
    return openai.error_payload("internal error; the server's log has the details", 500), 500


async def _on_error(_: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    payload, status = _error(error)
    return JSONResponse(payload, status, headers={"retry-after": "1"} if status == 429 else {})


def create_app(service: Service) -> Starlette:
    routes = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
    ]
    handled: tuple[type[Exception], ...] = (RequestError, CapacityError, HTTPException, ClientDisconnect, Exception)
    app = Starlette(routes=routes, exception_handlers={kind: _on_error for kind in handled})
    app.state.service = service
    return app
