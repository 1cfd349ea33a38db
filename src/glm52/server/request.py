"""The one request every dialect translates to."""

from dataclasses import dataclass, field
from typing import Any

from glm52.chat import Thinking
from glm52.engine import SamplingParams


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A conversation to continue. ignored: fields of the body that were accepted and have no meaning here."""

    model: str
    messages: list[dict[str, Any]]
    params: SamplingParams
    thinking: Thinking = field(default_factory=Thinking)
    tools: list[dict[str, Any]] | None = None
    stream: bool = False
    include_usage: bool = False
    n: int = 1
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
