"""What is measured while serving, for Prometheus. A registry of its own for each server."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    def __init__(self, engine: Any, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("glm52_requests", "Requests by dialect and status", ["dialect", "status"],
                                registry=registry)  # fmt: skip
        self.first_token_s = Histogram("glm52_time_to_first_token_seconds", "From the request to its first token",
                                       ["dialect"], buckets=_SECONDS, registry=registry)  # fmt: skip
        self.per_token_s = Histogram("glm52_time_per_output_token_seconds", "Between tokens of one reply, on average",
                                     ["dialect"], buckets=_PER_TOKEN, registry=registry)  # fmt: skip
        self.queue_s = Histogram("glm52_queue_seconds", "From the request to its turn", buckets=_SECONDS,
                                 registry=registry)  # fmt: skip
        self.prompt_tokens = Counter("glm52_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached_tokens = Counter("glm52_cached_prompt_tokens", "Of these, found in the prefix cache",
                                     registry=registry)  # fmt: skip
        self.output_tokens = Counter("glm52_output_tokens", "Tokens of replies", registry=registry)
        self.reasoning_tokens = Counter("glm52_reasoning_tokens", "Of these, reasoning", registry=registry)
        self.finishes = Counter("glm52_finished_replies", "Replies by the reason they ended", ["reason"],
                                registry=registry)  # fmt: skip
        self.thinking_closed = Counter("glm52_thinking_closed", "Reasoning ended by its budget", ["how"],
                                       registry=registry)  # fmt: skip
        Gauge("glm52_replies_running", "Replies being computed", registry=registry).set_function(running)
        Gauge("glm52_replies_waiting", "Replies waiting for a place", registry=registry).set_function(waiting)
        if engine is not None:
            registry.register(_EngineStats(engine))

    def count(self, dialect: str, status: int) -> None:
        """One more request that was answered."""
        self.requests.labels(dialect, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineStats(Collector):
    """Totals that the engine keeps itself."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        drafted = CounterMetricFamily("glm52_drafted_tokens", "Tokens drafted, by depth", labels=["position"])
        accepted = CounterMetricFamily("glm52_accepted_tokens", "Drafts that were right, by depth", labels=["position"])
        for depth, (proposed, right) in enumerate(zip(stats.drafted, stats.accepted, strict=True)):
            drafted.add_metric([str(depth + 1)], proposed)
            accepted.add_metric([str(depth + 1)], right)
        yield drafted
        yield accepted
        hits = CounterMetricFamily("glm52_expert_hits", "Tokens times routed experts, by layer", labels=["layer"])
        reads = CounterMetricFamily("glm52_expert_reads", "Times an expert's weights were read for them, by layer",
                                    labels=["layer"])  # fmt: skip
        for layer, (num_hits, num_reads) in getattr(self._engine.model, "expert_use", {}).items():
            hits.add_metric([str(layer)], num_hits)
            reads.add_metric([str(layer)], num_reads)
        yield hits
        yield reads
        yield CounterMetricFamily("glm52_engine_steps", "Steps of the engine", value=stats.steps)
        yield CounterMetricFamily("glm52_engine_seconds", "Time spent in steps", value=stats.forward_s)
        yield CounterMetricFamily("glm52_preemptions", "Sequences put back for lack of rows",
                                  value=self._engine.scheduler.num_preemptions)  # fmt: skip
        yield GaugeMetricFamily("glm52_cache_pages_unused", "Pages that no running reply holds",
                                value=self._engine.pages.available)  # fmt: skip
        yield GaugeMetricFamily("glm52_cache_pages", "Pages of the cache", value=self._engine.pages.num_pages)
