"""Prompts that stay equal where nothing changed, the reason where they do not, and reasoning that comes back."""

from typing import Any

import pytest

from glm52.chat import Reply, ToolCall
from glm52.server.prefixes import PromptLog
from glm52.server.recall import Recall
from glm52.server.stable import neutralised
from tests.scripted import TOKENIZER

DETAILS = """<environment_details>
# Visible Files
src/10:30/a.py
# Current Time
{time}
# Current Cost
{cost}
</environment_details>"""


def details(time: str, cost: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": "Do it. " + DETAILS.format(time=time, cost=cost)}]}]


def test_clocks_and_meters_of_environment_details_stand_still() -> None:
    one, done = neutralised(details("11/25/2026, 2:03:44 PM (Europe/Rome, UTC+1:00)", "$0.31"))
    two, _ = neutralised(details("11/25/2026, 2:09:01 PM (Europe/Rome, UTC+1:00)", "$1.07"))
    assert one == two and done == ["clock", "meter"]
    text = one[0]["content"][0]["text"]
    assert "11/25/2026" in text and "src/10:30/a.py" in text and "Do it." in text
    other_day, _ = neutralised(details("11/26/2026, 2:09:01 PM (Europe/Rome, UTC+1:00)", "$1.07"))
    assert other_day != one


@pytest.mark.parametrize(
    ("before", "after", "done"),
    [
        ("Current time: 2026-11-25T14:03:44Z. Be brief.", "Current time: 2026-11-25. Be brief.", ["clock"]),
        ("Today's date is 2026-11-25.", "Today's date is 2026-11-25.", []),
        ("It is now 2026-11-25 14:03.", "It is now 2026-11-25.", ["clock"]),
        *(
            (fact, fact, [])
            for fact in (
                "The train of 2026-11-25 14:03 is late.",
                "As you know, it leaves at 2026-05-01 17:45.",
                "Deadline date: 2026-05-01 17:00 sharp",
                "The candidate arrives 2026-05-01 09:30.",
            )
        ),
        (
            "Current time: 2026-01-01 10:00; we meet 2026-01-01 15:00",
            "Current time: 2026-01-01; we meet 2026-01-01 15:00",
            ["clock"],
        ),
        ("x-anthropic-billing-header: cch=a1;\nYou are an agent.", "You are an agent.", ["billing"]),
    ],
)
def test_system_messages(before: str, after: str, done: list[str]) -> None:
    messages = [{"role": "system", "content": before}, {"role": "user", "content": "Current time: 2026-11-25 14:03"}]
    found, what = neutralised(messages)
    assert found == [{"role": "system", "content": after}, messages[1]] and what == done


def test_a_message_that_was_nothing_else_goes() -> None:
    assert neutralised([{"role": "system", "content": "x-anthropic-billing-header: a"}]) == ([], ["billing"])


HEAD = "[gMASK]<sop><|system|>Reasoning Effort: Max"


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        (f"{HEAD}<|user|>Hi<|assistant|><think>", f"{HEAD}<|user|>Hi<|assistant|><think>ok</think>Yes<|user|>", "nothing changed"),
        (f"{HEAD}<|user|>Hi<|assistant|>", "[gMASK]<sop><|system|>Reasoning Effort: High<|user|>Hi<|assistant|>", "effort"),
        (f"{HEAD}<|user|>Hi<|assistant|>", "[gMASK]<sop><|user|>Hi<|assistant|>", "thinking was switched"),
        (f"{HEAD}<|system|>\n# Tools\na b c<|user|>", f"{HEAD}<|system|>\n# Tools\na d c<|user|>", "the tools changed"),
        (f"{HEAD}<|system|>Now 14:03:10 ok<|user|>", f"{HEAD}<|system|>Now 14:03:55 ok<|user|>", "a system message changed in what looks like a timestamp"),
        (f"{HEAD}<|system|>id 3fa9c1d2 ok<|user|>", f"{HEAD}<|system|>id 77b0aa91 ok<|user|>", "a random identifier"),
        (f"{HEAD}<|user|>Hi<|assistant|><think>a b c</think>x<|user|>y<|assistant|>", f"{HEAD}<|user|>Hi<|assistant|><think></think>x<|user|>y<|assistant|>", "reasoning of an earlier turn"),
        (f"{HEAD}<|user|>red<|assistant|><think>", f"{HEAD}<|user|>blue<|assistant|><think>", "a message of the user changed or was replaced"),
        (f"{HEAD}<|user|>x<|observation|><tool_response>red", f"{HEAD}<|user|>x<|observation|><tool_response>blue", "the result of a tool"),
    ],
)  # fmt: skip
def test_causes(old: str, new: str, cause: str) -> None:
    log = PromptLog(TOKENIZER)
    before, after = TOKENIZER.encode(old), TOKENIZER.encode(new)
    log.add("me", before)
    found = log.explain("me", after)
    assert cause in found["cause"], found
    at = found["index"]
    assert before[:at] == after[:at] and (at == min(len(before), len(after)) or before[at] != after[at])
    assert (
        TOKENIZER.decode(before[at : at + 24]) == found["old"] and TOKENIZER.decode(after[at : at + 24]) == found["new"]
    )
    assert log.explain("other", after)["cause"] == "no earlier prompt is known"


def test_the_log_is_bounded() -> None:
    log = PromptLog(TOKENIZER, max_prompts=2, max_clients=2, max_tokens=20)
    for client in ("a", "b", "c"):
        for i in range(3):
            log.add(client, [1, 2, i])
    assert log.explain("a", [1, 2])["index"] == 0 and log.explain("c", [1, 2, 2])["index"] == 3
    log.add("d", list(range(30)))
    assert log.explain("c", [1, 2, 2])["index"] == 0, "what is too long pushes the others out"


CALLS = [ToolCall("call_1", "f", '{"x": 1, "y": "a"}')]
ASKED = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "sent",
    [
        {"content": "Yes.", "tool_calls": [{"id": "other", "function": {"name": "f", "arguments": '{"y":"a","x":1}'}}]},
        {"content": [{"type": "text", "text": "Yes."}], "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1, "y": "a"}}}]},
    ],
)  # fmt: skip
def test_reasoning_is_found_by_its_turn(sent: dict[str, Any]) -> None:
    recall = Recall()
    recall.keep("me", ASKED, Reply(content="Yes.", tool_calls=CALLS), "Because.")
    turns = [*ASKED, {"role": "assistant", **sent}]
    found, count = recall.restored("me", turns)
    assert count == 1 and found[1]["reasoning_content"] == "Because."
    assert recall.restored("you", turns)[1] == 0, "another client's reasoning is not told"
    assert recall.restored("me", [{"role": "user", "content": "Ho"}, turns[1]])[1] == 0
    assert recall.restored("me", [*ASKED, turns[1] | {"content": "No."}])[1] == 0
    kept = turns[1] | {"reasoning_content": "Mine."}
    assert recall.restored("me", [*ASKED, kept]) == ([*ASKED, kept], 0)


@pytest.mark.parametrize("arguments", ["[" * 50_000 + "]" * 50_000, "1" * 5000, "{", "   "])
def test_arguments_of_any_shape_are_remembered(arguments: str) -> None:
    """Nested too deeply they were an error, after a whole reply."""
    recall, calls = Recall(), [ToolCall("call_1", "f", arguments)]
    recall.keep("me", ASKED, Reply(content="Yes.", tool_calls=calls), "Because.")
    turn = {"role": "assistant", "content": "Yes.", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert recall.restored("me", [*ASKED, turn])[1] == 1


def test_recall_is_bounded() -> None:
    recall = Recall(max_chars=1100)  # ten entries, two a turn
    for i in range(30):
        recall.keep("me", [{"role": "user", "content": str(i)}], Reply(content="x"), "r" * 10)
    answered = [
        recall.restored("me", [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "x"}])[1]
        for i in range(30)
    ]
    assert answered == [0] * 25 + [1] * 5


def test_reasoning_belongs_to_all_that_was_said_before() -> None:
    """The same message and reply again, with other reasoning and with none."""
    recall, turn = Recall(), [*ASKED, {"role": "assistant", "content": "Yes."}]
    recall.keep("me", ASKED, Reply(content="Yes."), "First.")
    assert recall.restored("me", [{"role": "user", "content": "Earlier"}, *turn])[1] == 1, "the only one of its kind"
    recall.keep("me", [*turn, *ASKED], Reply(content="Yes."), "Second.")
    found, count = recall.restored("me", [*turn, *turn])
    assert count == 2 and [m["reasoning_content"] for m in found[1::2]] == ["First.", "Second."]
    assert recall.restored("me", [{"role": "user", "content": "Earlier"}, *turn])[1] == 0, "which of them?"
    recall.keep("me", ASKED, Reply(content="Yes."), "")
    assert recall.restored("me", turn)[1] == 0, "the last time it was said without"
