"""docs/thinking.md is true: every row of its tables, read and checked."""

import json
import re
from pathlib import Path

import pytest

from glm52.chat import BUDGETS, Thinking
from glm52.errors import RequestError
from glm52.server import thinking
from glm52.server.request import validated

DOC = Path(__file__).parent.parent.parent / "docs" / "thinking.md"
ROWS = re.findall(r"^\| `(\{.*\})` \| (on|off) \| (High|Max|) *\| (\d*) *\| (-|true|false) \|$", DOC.read_text(), re.M)


def read(body: dict[str, object]) -> Thinking:
    return thinking.read(validated(thinking.ThinkingFields, body))


@pytest.mark.parametrize(("body", "think", "effort", "budget", "clear"), ROWS, ids=[r[0] for r in ROWS])
def test_a_row(body: str, think: str, effort: str, budget: str, clear: str) -> None:
    found = read(json.loads(body))
    assert found.enabled is (think == "on")
    assert found.clear is {"-": None, "true": True, "false": False}[clear]
    if found.enabled:
        assert (found.effort, found.budget) == (effort.lower(), int(budget))
    else:
        assert found.budget is None and not effort and not budget


def test_every_field_stands_in_the_tables() -> None:
    assert len(ROWS) == DOC.read_text().count("\n| `{")
    unseen = {"include_reasoning"}  # decides what is shown, not what is thought
    bodies = [json.loads(row[0]) for row in ROWS]
    assert {key for body in bodies for key in body} | unseen == set(thinking.ThinkingFields.model_fields)
    assert {row[2].lower() for row in ROWS if row[2]} == set(BUDGETS)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"thinking": {"budget_tokens": -2}}, "thinking.budget_tokens"),
        ({"reasoning_effort": "high", "output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"thinking": {"budget_tokens": 2}, "thinking_budget": -9}, "thinking_budget"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"mode": "fast"}, "mode"),
    ],
)
def test_what_cannot_be_read_is_named(body: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ({}, True),
        ({"reasoning": {"exclude": True}}, False),
        ({"include_reasoning": False}, False),
        ({"thinking": {"type": "enabled", "display": "omitted"}}, False),
        ({"thinking": {"type": "enabled", "display": "summarized"}}, True),
    ],
)
def test_who_sees_it(body: dict[str, object], shown: bool) -> None:
    assert thinking.is_shown(validated(thinking.ThinkingFields, body)) is shown
