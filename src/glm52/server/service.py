"""One model behind the routes: from a request to prompts, replies and what is remembered of them. No HTTP.

A ``Call`` is one request being served. It renders the prompt once volatile blocks are stable and lost reasoning is
restored, waits for its turn, runs the backend and keeps account.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from glm52.chat import ChatTemplate, Delta
from glm52.engine import Event, SamplingParams, TokenLogprob, check_prompt
from glm52.errors import RequestError
from glm52.server.clock import Clock
from glm52.server.limits import Gate, Keys, Limits
from glm52.server.metrics import Metrics
from glm52.server.prefixes import PromptLog
from glm52.server.recall import Recall
from glm52.server.request import Answer, ChatRequest, Json, Usage, guided, in_order_of_calls, usage_of
from glm52.server.stable import neutralised
from glm52.tokenizer import Tokenizer

_LONG = "[1m]"  # how some clients ask for the window of a million tokens


class Backend(Protocol):
    """What answers: the engine's thread, or in a test a script."""

    def generate(self, tokens: Iterable[int], params: SamplingParams) -> AsyncIterator[Event]: ...


@dataclass(frozen=True, kw_only=True)
class Options:
    """neutralise: make volatile blocks stable. mode: coding makes that the default of every request. log_prompts: also
    write prompts and replies to the log of requests."""

    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    neutralise: bool = True
    mode: str | None = None
    log_prompts: bool = False


class Service:
    """names: what the model is called, its own name first."""

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer, template: ChatTemplate, *, name: str, context_length: int,
        defaults: dict[str, Any], aliases: Sequence[str] = (), options: Options | None = None,
    ) -> None:  # fmt: skip
        self.backend, self.tokenizer, self.template = backend, tokenizer, template
        self.names, self.context_length, self.defaults = (name, *aliases), context_length, defaults
        self.options = options or Options()
        self.created = int(time.time())
        self.gate = Gate(self.options.limits.max_running, self.options.limits.max_waiting)
        self.prompts, self.recall, self.clock = PromptLog(tokenizer), Recall(), Clock()
        engine = getattr(backend, "engine", None)
        self.vocab_size = engine.model.config.vocab_size if engine else tokenizer.vocab_size
        self.metrics = Metrics(engine, lambda: self.gate.running, lambda: self.gate.waiting)
        self.stops_at = math.inf

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def failure(self) -> BaseException | None:
        """Why the backend will never answer again, if that is so."""
        return getattr(self.backend, "failure", None)

    def drain(self, seconds: float) -> None:
        """Take no more requests; those that run have so long to end, and no longer than an earlier call gave them."""
        self.stops_at = min(self.stops_at, time.monotonic() + seconds)

    @property
    def is_draining(self) -> bool:
        return self.stops_at < math.inf

    async def trouble(self) -> str | None:
        """Why nothing can be answered now, in a word, if that is so."""
        if self.failure is not None or self.is_draining:
            return "draining" if self.failure is None else "failed"
        ask = getattr(self.backend, "trouble", None)
        return await ask() if ask else None

    def check_model(self, name: str, *, any_of: str | None = None) -> None:
        """RequestError unless it is one of ours; ``any_of``: a prefix of foreign names that mean this model too."""
        plain = name.removesuffix(_LONG)
        if plain and plain not in self.names and not (any_of and plain.startswith(any_of)):
            raise RequestError(f"The model {name!r} does not exist; this server has {', '.join(self.names)}.",
                               status=404, param="model", code="model_not_found")  # fmt: skip

    def call(
        self, request: ChatRequest, client: str, dialect: str, *, explain: bool, deadline_s: float | None
    ) -> "Call":
        """RequestError if it cannot be served."""
        if self.is_draining:
            raise RequestError("the server is shutting down", status=503, code="shutting_down")
        return Call(self, request, client, dialect, explain=explain, deadline_s=deadline_s)

    def render(
        self, request: ChatRequest, client: str, *, add_generation_prompt: bool = True
    ) -> tuple[ChatRequest, list[list[int]], list[str]]:
        """The request as the model will see it, its prompts, and what was done to it."""
        if request.prompts is not None:
            return request, [self.tokenizer.encode(p) if isinstance(p, str) else p for p in request.prompts], []
        ordered = in_order_of_calls(request.messages)
        messages, notes = neutralised(ordered) if self.options.neutralise else (ordered, [])
        if ordered != request.messages:
            notes.append("results sorted")
        messages, restored = self.recall.restored(client, messages)
        if restored:
            notes.append(f"reasoning restored in {restored} turns")
        if not messages:
            raise RequestError("messages: expected at least one message, found none", param="messages")
        request = dataclasses.replace(request, messages=messages)
        prompt = self.template.render_ids(
            self.tokenizer, messages, request.tools, request.thinking, add_generation_prompt=add_generation_prompt
        )
        return request, [prompt], notes


class Call:
    """One request being served. status, error: how it ended, once it did."""

    def __init__(
        self, service: Service, request: ChatRequest, client: str, dialect: str, *, explain: bool,
        deadline_s: float | None,
    ) -> None:  # fmt: skip
        self.service, self.client, self.dialect = service, client, dialect
        self.began = time.monotonic()
        self.request, prompts, self.notes = service.render(request, client)
        for prompt in prompts:  # all of them, before anything is done with one
            check_prompt(
                prompt, context_length=service.context_length, vocab_size=service.vocab_size,
                field="messages" if self.request.prompts is None else "prompt",
            )  # fmt: skip
        self.divergence = service.prompts.explain(client, prompts[0]) if explain else None
        self._params = guided(self.request)
        self.answers = [
            Answer(self.request, prompt, i, context_length=service.context_length)
            for i, prompt in enumerate(p for p in prompts for _ in range(self.request.n))
        ]
        bounds = [d for d in (deadline_s, service.options.limits.deadline_s) if d is not None]
        self._deadline = self.began + min(bounds, default=math.inf)
        self._first_s: float | None = None
        self.status: int | None = None
        self.error: RequestError | None = None

    @property
    def usage(self) -> Usage:
        return usage_of(self.answers, self.divergence)

    def time_left(self) -> float:
        """Seconds until this request must end; infinite without a bound."""
        return min(self._deadline, self.service.stops_at) - time.monotonic()

    def overdue(self) -> RequestError:
        if self.service.stops_at <= time.monotonic():
            return RequestError("the server is shutting down", status=503, code="shutting_down")
        return RequestError("the request took longer than its deadline", status=504, code="deadline_exceeded")

    async def run(self, answer: Answer) -> AsyncIterator[tuple[list[Delta], list[TokenLogprob]]]:
        """Deltas and log probabilities of each event; RequestError if the engine could not go on."""
        metrics = self.service.metrics
        async with self.service.gate.slot(self.client):
            metrics.queue_s.observe(time.monotonic() - self.began)
            first_s = None
            backend = self.service.backend.generate(answer.prompt, self._params_of(answer))
            async with contextlib.aclosing(backend) as events:  # type: ignore[type-var]
                async for event in events:
                    if event.error is not None:
                        raise RequestError(event.error, status=500, code="engine_error")
                    if first_s is None and event.token_ids:
                        first_s = time.monotonic()
                        metrics.first_token_s.labels(self.dialect).observe(first_s - self.began)
                        self._first_s = self._first_s or first_s - self.began
                    yield answer.take(event), event.logprobs
        if first_s is not None and answer.completion_tokens > 1:
            per_token = (time.monotonic() - first_s) / (answer.completion_tokens - 1)
            metrics.per_token_s.labels(self.dialect).observe(per_token)
        if self.request.prompts is None:
            self.service.prompts.add(self.client, answer.tokens)
            self.service.recall.keep(self.client, self.request.messages, answer.reply, answer.reasoning)

    @property
    def unheld(self) -> Sequence[str]:
        """What the schemas of the request say and the reply is not held to."""
        return self._params.grammar.warnings if self._params.grammar else ()

    def _params_of(self, answer: Answer) -> SamplingParams:
        """Each answer to one prompt is drawn with a seed of its own."""
        seed = self._params.seed
        return (
            self._params
            if seed is None
            else dataclasses.replace(self._params, seed=seed + answer.index % self.request.n)
        )

    def finish(self, status: int) -> None:
        """Account for the request, once, however it ended; another may take its place in the queue."""
        self.status = status
        self.service.gate.dismiss(len(self.answers))
        usage, metrics = self.usage, self.service.metrics
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.cached_tokens.inc(usage.cached_tokens)
        metrics.output_tokens.inc(usage.completion_tokens)
        metrics.reasoning_tokens.inc(usage.reasoning_tokens)
        for answer in self.answers:
            metrics.finishes.labels(answer.reason or "none").inc()
            if answer.thinking_closed:
                metrics.thinking_closed.labels(answer.thinking_closed).inc()

    def figures(self) -> Json:
        """What the log of requests says of it."""
        usage = self.usage
        figures: Json = {
            "stream": self.request.stream,
            "prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens, "reasoning_tokens": usage.reasoning_tokens,
            "finish": [a.reason for a in self.answers], "first_token_s": self._first_s and round(self._first_s, 4),
        }  # fmt: skip
        if self.service.options.log_prompts:
            figures |= {"messages": self.request.messages, "replies": [a.text for a in self.answers]}
        return figures
