"""The inference engine: sequences, scheduling, sampling, speculation, streams."""

from glm52.engine.engine import Engine, Model, Stats, generate
from glm52.engine.params import Repetition, SamplingParams
from glm52.engine.sequence import Event, FinishReason, Sequence, TokenLogprob
from glm52.engine.stream import AsyncEngine

__all__ = [
    "AsyncEngine",
    "Engine",
    "Event",
    "FinishReason",
    "Model",
    "Repetition",
    "SamplingParams",
    "Sequence",
    "Stats",
    "TokenLogprob",
    "generate",
]
