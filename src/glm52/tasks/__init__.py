"""Families of questions with reference replies and scorers; see ``base``.

``MIXTURE`` is how often training draws each: arithmetic, copying and recall, JSON and tools above all.
"""

import random

from glm52.tasks.arithmetic import Compare, Equation, MultiTerm, Product, Sum, WordProblem
from glm52.tasks.base import Bucket, Example, Split, Task
from glm52.tasks.code import WhatPrints, WriteFunction
from glm52.tasks.dialogue import Fallback, SmallTalk
from glm52.tasks.recall import KeyValue, Needle, Passage
from glm52.tasks.text import Constrain, Copy, CountLetters, ExtractJSON, Reverse, Sort, Table
from glm52.tasks.tools import CallTool, NoTool

MIXTURE: dict[str, float] = {
    "add": 5, "sub": 5, "mul": 2, "multi_term": 1.5, "compare": 1, "equation": 1, "word_problem": 2,
    "copy": 3, "reverse": 1.5, "sort": 1.5, "count_letters": 1, "json": 4, "table": 1.5, "constrain": 1,
    "key_value": 3, "needle": 2.5, "passage": 1.5, "tool_call": 5, "no_tool": 0.7, "function": 2, "prints": 1.5,
    "small_talk": 0.5, "fallback": 1.5,
}  # fmt: skip

_ALL: tuple[Task, ...] = (
    Sum("+"), Sum("-"), Product(), MultiTerm(), Compare(), Equation(), WordProblem(), Copy(), Reverse(), Sort(),
    CountLetters(), ExtractJSON(), Table(), Constrain(), KeyValue(), Needle(), Passage(), CallTool(), NoTool(),
    WriteFunction(), WhatPrints(), SmallTalk(), Fallback(),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def draw(rng: random.Random, split: Split, bucket: Bucket | None = None) -> Example:
    """An example of the mixture, or of the part of it that belongs to a bucket."""
    names = [n for n in MIXTURE if bucket is None or TASKS[n].bucket == bucket]
    name = rng.choices(names, weights=[MIXTURE[n] for n in names])[0]
    return TASKS[name].generate(rng, split=split)
