"""Every generator's reference reply scores 1, a corrupted one less, and test operands are never trained on."""

import json
import random
import re
from dataclasses import replace

import pytest

from glm52.chat import Reply, Thinking, ToolCall
from glm52.tasks import MIXTURE, TASKS, draw
from glm52.tasks.arithmetic import add_trace, mul_trace, sub_trace
from glm52.tasks.base import Example
from glm52.tasks.code import evaluate


def reference(example: Example) -> Reply:
    last = example.target[-1]

    calls = [
        ToolCall("x", c["function"]["name"], json.dumps(c["function"]["arguments"])) for c in last.get("tool_calls", [])
    ]
    return Reply(content=last["content"], reasoning=last.get("reasoning_content"), tool_calls=calls)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", TASKS)
def test_reference_scores_one_and_corruption_less(name: str, split: str) -> None:
    task, rng = TASKS[name], random.Random(1)
    for _ in range(150):
        example = task.generate(rng, split=split)
        reply = reference(example)
        assert task.score(example, reply) == 1.0, example
        corrupted = replace(
            reply, content="0 " + reply.content + "z 123456", tool_calls=[ToolCall("x", "nothing", "{}")]
        )
        assert task.score(example, corrupted) < 1.0 or name in ("needle", "key_value", "passage")
        assert task.score(example, Reply(content="")) == 0.0
        assert (example.target[-1].get("reasoning_content") is not None) == example.thinking.enabled


def test_generation_is_a_function_of_the_seed() -> None:
    a, b = ([draw(random.Random(f"s{i}"), "train") for i in range(50)] for _ in range(2))
    assert a == b


def test_levels_and_thinking_can_be_asked_for() -> None:
    for name, task in TASKS.items():
        for level in range(task.levels):
            example = task.generate(random.Random(0), split="train", level=level, thinking=Thinking(enabled=False))
            assert not example.thinking.enabled and "reasoning_content" not in example.target[-1], name
    assert set(MIXTURE) == set(TASKS)


@pytest.mark.parametrize("name", ["add", "sub"])
def test_operands_of_the_test_split_are_never_trained(name: str) -> None:

    def operands(split: str) -> set[tuple[str, ...]]:
        rng = random.Random(3)
        examples = [TASKS[name].generate(rng, split=split, level=2) for _ in range(3000)]
        return {tuple(re.findall(r"\d+", e.messages[0]["content"])) for e in examples}

    assert not operands("train") & operands("test")


def test_traces() -> None:
    assert add_trace(347, 589) == "7+9=16 c1: 6\n4+8+1=13 c1: 36\n3+5+1=9: 936"
    assert add_trace(99, 1) == "9+1=10 c1: 0\n9+1=10: 100"
    assert sub_trace(103, 98) == "3-8+10=5 b1: 5\n0-9-1+10=0 b1: 05\n1-0-1=0: 005\n5"
    assert sub_trace(3, 5) == "3<5 so -(5-3)\n5-3=2: 2\n-2"
    assert mul_trace(23, 17) == "23*7=161\n23*10=230\n161+230=391"


@pytest.mark.parametrize("text", ["__import__('os')", "x.__class__", "open('f')", "9**9**9", "(lambda: 1)()"])
def test_scoring_code_runs_nothing_dangerous(text: str) -> None:
    with pytest.raises(ValueError):
        evaluate(text, x=1)
