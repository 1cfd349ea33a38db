"""Parts of a prompt that change with every request and say nothing to the model are made stable, so that prefixes hit.

What is done to a message depends on that message alone: where a client sends it back unchanged, it stays the same.

    billing   the ``x-anthropic-billing-header`` line of a system message is left out; it holds a hash per request
    clock     in system messages and ``<environment_details>``, a line that says what time it is keeps its date and
              loses the time of day
    meter     in ``<environment_details>``, the amounts of cost and of context used so far are left out
"""

import re
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]
_BILLING = re.compile(r"^x-anthropic-billing-header:[^\n]*\n*", re.MULTILINE)
_DETAILS = re.compile(r"<environment_details>.*?</environment_details>", re.DOTALL)
_NAMED = re.compile(
    r"\b(?:(?:current|local|system|today'?s) (?:local )?(?:date|time)|date and time|date/time|time now)\b.{0,40}$"
    r"|\b(?:now|today)(?: is| it is)?\W{0,5}$",
    re.IGNORECASE,
)
_DATE = r"\d{4}-\d\d-\d\d|\d{1,2}/\d{1,2}/\d{4}|[A-Z][a-z]{2} [A-Z][a-z]{2} \d{1,2} \d{4}"
_CLOCK = r"\d{1,2}:\d\d(?::\d\d(?:\.\d+)?)?(?: ?[AaPp][Mm])?"
_ZONE = r"(?: ?Z| ?(?:UTC|GMT)?[+-]\d\d:?\d\d)?"
_MOMENT = re.compile(rf"(?P<date>{_DATE})(?:[T,]? ?{_CLOCK}{_ZONE})")
_METER = re.compile(
    r"^(#+ *(?:Current Cost|Context Window Usage|Current Context Size \(Tokens\))[^\n]*)\n[^\n]*", re.MULTILINE
)


def neutralised(messages: list[Json]) -> tuple[list[Json], list[str]]:
    """The messages with their volatile parts made stable, and the names of what was done."""
    done: set[str] = set()

    def apply(text: str, role: str) -> str:
        if role == "system":
            text = _note(done, "billing", text, _BILLING.sub("", text))
            return _note(done, "clock", text, _still_clock(text))
        return (
            _DETAILS.sub(lambda m: _still_details(m.group(), done), text) if "<environment_details>" in text else text
        )

    out = [_map_text(m, apply) for m in messages]
    return [m for m in out if not (m.get("role") == "system" and m.get("content") in ("", []))], sorted(done)


def _map_text(message: Json, apply: Callable[[str, str], str]) -> Json:
    role = "system" if message.get("role") == "developer" else message.get("role", "")
    content = message.get("content")
    if role not in ("system", "user"):
        return message
    if isinstance(content, str):
        return message | {"content": apply(content, role)}
    if isinstance(content, list):
        parts = [p | {"text": apply(p["text"], role)} if isinstance(p.get("text"), str) else p for p in content]
        return message | {"content": parts}
    return message


def _still_details(text: str, done: set[str]) -> str:
    text = _note(done, "meter", text, _METER.sub(r"\1", text))
    return _note(done, "clock", text, _still_clock(text))


def _still_clock(text: str) -> str:
    """Moments become dates where their own line, or a heading right above them, says that they are the present."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        found = _MOMENT.search(line)
        if found:
            above = lines[i - 1] if i and lines[i - 1].startswith("#") else ""
            if _NAMED.search(line[: found.start()]) or _NAMED.search(above):
                lines[i] = _MOMENT.sub(lambda m: m.group("date"), line, count=1)
    return "\n".join(lines)


def _note(done: set[str], name: str, before: str, after: str) -> str:
    if before != after:
        done.add(name)
    return after
