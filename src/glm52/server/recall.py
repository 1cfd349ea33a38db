"""Reasoning that a client did not send back is found again by what it did send: the turn.

Many clients keep text and calls of a reply and lose its reasoning; the model then continues a tool loop without its own
thoughts, and the prefix cache misses from there on. What was said last is kept, in memory, bounded, for each client.

A turn is found by all that was said up to it, or, where a client has shortened that, by the message it answers, if its
like was never given with other reasoning or with none.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

from glm52.chat import Reply

Json = dict[str, Any]


_ENTRY = 100  # characters that an entry counts besides its reasoning


class Recall:
    """The reasoning of the last turns, ``max_chars`` of it; "" for a turn that has none, or one of several."""

    def __init__(self, max_chars: int = 1 << 25) -> None:
        self._max_chars, self._chars = max_chars, 0
        self._reasoning: OrderedDict[bytes, str] = OrderedDict()
        self._lock = Lock()  # large requests are rendered on other threads

    def keep(self, client: str, messages: Sequence[Json], reply: Reply, reasoning: str) -> None:
        """Remember the reasoning of the reply to ``messages``."""
        reasoning = reasoning if reasoning.strip() else ""
        turn = _turn("assistant", reply.content, [(c.name, c.arguments) for c in reply.tool_calls])
        before = _turn_of(messages[-1]) if messages else b""
        short = _digest(client.encode(), before, turn)
        with self._lock:
            self._put(_digest(_chain(client, messages), turn), reasoning)
            self._put(short, reasoning if self._reasoning.get(short, reasoning) == reasoning else "")
            while self._chars > self._max_chars:
                self._chars -= len(self._reasoning.popitem(last=False)[1]) + _ENTRY

    def restored(self, client: str, messages: Sequence[Json]) -> tuple[list[Json], int]:
        """The messages, with reasoning where it is known and was not sent; how many were restored."""
        out, count = [], 0
        chain, before = _chain(client, []), b""
        for message in messages:
            turn = _turn_of(message)
            is_bare = message.get("role") == "assistant" and not message.get("reasoning_content")
            if is_bare and "</think>" not in _text(message.get("content")):
                found = self._find(_digest(chain, turn), _digest(client.encode(), before, turn))
                if found:
                    message, count = message | {"reasoning_content": found}, count + 1
            chain, before = _digest(chain, turn), turn
            out.append(message)
        return out, count

    def _find(self, *keys: bytes) -> str | None:
        """Under the first key that is known."""
        with self._lock:
            key = next((k for k in keys if k in self._reasoning), None)
            if key is None:
                return None
            self._reasoning.move_to_end(key)
            return self._reasoning[key]

    def _put(self, key: bytes, reasoning: str) -> None:
        if key in self._reasoning:
            self._chars -= len(self._reasoning.pop(key)) + _ENTRY
        self._reasoning[key] = reasoning
        self._chars += len(reasoning) + _ENTRY


def _chain(client: str, messages: Sequence[Json]) -> bytes:
    """All turns so far, whatever their reasoning."""
    chain = _digest(client.encode())
    for message in messages:
        chain = _digest(chain, _turn_of(message))
    return chain


def _turn_of(message: Json) -> bytes:
    calls = [c.get("function", c) for c in message.get("tool_calls") or []]
    role = "system" if message.get("role") == "developer" else message.get("role")
    return _turn(role, _text(message.get("content")), [(c.get("name"), c.get("arguments")) for c in calls])


def _turn(role: Any, content: str, calls: Sequence[tuple[Any, Any]]) -> bytes:
    """Who said and called what; ids of calls are left out, since some clients make their own."""
    said = [role, content.strip(), [[name, _arguments(given)] for name, given in calls]]
    return json.dumps(said, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"\0".join(parts)).digest()


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(p.get("text") or p.get("output") or "") if isinstance(p, dict) else str(p) for p in content)
    return "" if content is None else str(content)


def _arguments(given: Any) -> Any:
    """One text for all ways to write the same; what is no JSON, or nested too deeply, as it is."""
    try:
        value = json.loads(given.strip() or "{}") if isinstance(given, str) else given or {}
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    except (ValueError, RecursionError):
        return given
