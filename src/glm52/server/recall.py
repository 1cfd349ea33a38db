"""Reasoning that a client did not send back is found again by what it did send: the turn.

Many clients keep text and calls of a reply and lose its reasoning; the model then continues a tool loop without its own
thoughts, and the prefix cache misses from there on. What was said last is kept, in memory, bounded, for each client.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

from glm52.chat import Reply

Json = dict[str, Any]


class Recall:
    """The reasoning of the last turns, ``max_chars`` of it."""

    def __init__(self, max_chars: int = 1 << 25) -> None:
        self._max_chars, self._chars = max_chars, 0
        self._reasoning: OrderedDict[bytes, str] = OrderedDict()
        self._lock = Lock()  # large requests are rendered on other threads

    def __len__(self) -> int:
        return len(self._reasoning)

    def keep(self, client: str, messages: Sequence[Json], reply: Reply, reasoning: str) -> None:
        """Remember the reasoning of the reply to ``messages``."""
        if not reasoning.strip():
            return
        calls = [(c.name, c.arguments) for c in reply.tool_calls]
        key = _key(client, messages[-1] if messages else {}, reply.content, calls)
        with self._lock:
            self._chars += len(reasoning) - len(self._reasoning.pop(key, ""))
            self._reasoning[key] = reasoning
            while self._chars > self._max_chars:
                self._chars -= len(self._reasoning.popitem(last=False)[1])

    def restored(self, client: str, messages: Sequence[Json]) -> tuple[list[Json], int]:
        """The messages, with reasoning where it is known and was not sent; how many were restored."""
        out, count = [], 0
        for i, message in enumerate(messages):
            if message.get("role") == "assistant" and not message.get("reasoning_content"):
                found = self._find(client, messages[i - 1] if i else {}, message)
                if found is not None:
                    message, count = message | {"reasoning_content": found}, count + 1
            out.append(message)
        return out, count

    def _find(self, client: str, before: Json, message: Json) -> str | None:
        calls = [c.get("function", c) for c in message.get("tool_calls") or []]
        text = _text(message.get("content"))
        if "</think>" in text:
            return None
        key = _key(client, before, text, [(c.get("name"), c.get("arguments")) for c in calls])
        with self._lock:
            if key in self._reasoning:
                self._reasoning.move_to_end(key)
            return self._reasoning.get(key)


def _key(client: str, before: Json, content: str, calls: Sequence[tuple[Any, Any]]) -> bytes:
    """A turn is who said what to which message; ids of calls are left out, since some clients make their own."""
    role = "system" if before.get("role") == "developer" else before.get("role")
    said = [client, role, _text(before.get("content")), content.strip(), [[n, _arguments(a)] for n, a in calls]]
    return hashlib.sha256(json.dumps(said, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")).digest()


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(p.get("text") or p.get("output") or "") if isinstance(p, dict) else str(p) for p in content)
    return "" if content is None else str(content)


def _arguments(given: Any) -> Any:
    if not isinstance(given, str):
        return given or {}
    try:
        return json.loads(given) if given.strip() else {}
    except ValueError:
        return given
