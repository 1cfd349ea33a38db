"""The inference engine: sequences, scheduling, sampling, speculation, streams."""

from glm52.engine.engine import Engine, Model, Stats, generate
from glm52.engine.params import Repetition, SamplingParams
from glm52.engine.sequence import Event, FinishReason, Sequence, TokenLogprob, check_prompt, check_vocabulary
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
    "check_prompt",
    "check_vocabulary",
    "generate",
]
