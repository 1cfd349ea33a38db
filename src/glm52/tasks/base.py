"""What a task is: a generator of questions with reference replies, and a scorer of any reply.

A task knows messages, not engines or tokens. Training reads ``messages + target``; evaluation shows ``messages`` to a
model, parses what comes back and asks ``score``. Operands of arithmetic beyond one digit are split once, by hash, into
train and test, and so are phrasings; no such test operand is ever seen in training. Where there is little to draw from
(small functions, words, small talk), whole questions of the test split occur in training: ``docs/nano.md`` says how many.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from glm52.chat import Reply, Thinking

Split = Literal["train", "test"]
Bucket = Literal["code", "maths", "general"]
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question and the reference way to answer it.

    messages: everything the model sees (OpenAI-style dicts). target: the reference continuation, one assistant message
    or, for a tool loop, assistant, tool, assistant. answer: what ``score`` compares with. level: 0 is the easiest.
    """

    task: str
    messages: list[Message]
    target: list[Message]
    answer: Any
    thinking: Thinking = field(default_factory=Thinking)
    tools: list[dict[str, Any]] | None = None
    level: int = 0


class Task(Protocol):
    """One family of questions. Instances are stateless; all randomness comes in as ``rng``."""

    name: str
    bucket: Bucket
    levels: int

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        """Draw an example; ``level`` or ``thinking`` of None means: draw those too."""
        ...

    def score(self, example: Example, reply: Reply) -> float:
        """How right a reply is, in [0, 1]."""
        ...


def held_out(*key: object) -> bool:
    """True for the one key in 50 that belongs to the test split. Stable across runs and machines."""
    return zlib.crc32(repr(key).encode()) % 50 == 0


def choose_phrasing(rng: random.Random, phrasings: Sequence[str], split: Split) -> str:
    """Draw a phrasing. The last tenth of the list (at least one) is kept for the test split.

    Half of the test questions use a kept phrasing, the other half a trained one, so that both can be told apart.
    """
    kept = max(1, len(phrasings) // 10)
    if split == "test" and rng.random() < 0.5:
        return rng.choice(phrasings[-kept:])
    return rng.choice(phrasings[:-kept])


def draw_thinking(rng: random.Random) -> Thinking:
    """The mix that training uses: half Max, a fifth High, the rest without thinking."""
    u = rng.random()
    if u < 0.5:
        return Thinking(effort="max")
    if u < 0.7:
        return Thinking(effort="high")
    return Thinking(enabled=False)


def assistant(content: str, reasoning: str | None = None, tool_calls: list[dict[str, Any]] | None = None) -> Message:
    """An assistant message; keys that carry nothing are left out."""
    message: Message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if tool_calls:
        message["tool_calls"] = tool_calls
    return message


def user(content: str) -> Message:
    return {"role": "user", "content": content}
