"""Where a prompt parts from the closest earlier conversation of the same client, and what is the likely cause.

The prefix cache holds equal beginnings only. A miss that nobody explains looks like slowness; so the last prompts, with
their replies, are kept, as token ids and in memory alone, and compared on request.
"""

import re
from collections import OrderedDict, deque
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm52.tokenizer import Tokenizer

Json = dict[str, Any]
_SHOWN = 24  # tokens of each side
_VOLATILE = (
    ("a timestamp", re.compile(r"\d{1,2}:\d\d(:\d\d)?|\d{4}-\d\d-\d\d|\b1[6-9]\d{8}\b")),
    ("a random identifier", re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-|\b[0-9a-f]{5,}\b|\b(msg|req|call|toolu)_\w+")),
    ("a counter or an amount", re.compile(r"\d")),
)
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


class PromptLog:
    """The last ``max_prompts`` prompts of each of the last ``max_clients`` clients, of ``max_tokens`` in all."""

    def __init__(self, tokenizer: Tokenizer, max_prompts: int = 16, max_clients: int = 64, max_tokens: int = 1 << 22):
        self._tokenizer = tokenizer
        self._max_prompts, self._max_clients, self._max_tokens = max_prompts, max_clients, max_tokens
        self._prompts: OrderedDict[str, deque[NDArray[np.int32]]] = OrderedDict()
        self._lock = Lock()  # large requests are rendered on other threads

    def add(self, client: str, tokens: Sequence[int]) -> None:
        """Remember a prompt and its reply."""
        with self._lock:
            mine = self._prompts.setdefault(client, deque(maxlen=self._max_prompts))
            self._prompts.move_to_end(client)
            mine.append(np.asarray(tokens, dtype=np.int32))
            while len(self._prompts) > self._max_clients or (
                len(self._prompts) > 1 and sum(len(p) for ps in self._prompts.values() for p in ps) > self._max_tokens
            ):
                self._prompts.popitem(last=False)

    def explain(self, client: str, prompt: Sequence[int]) -> Json:
        """The first difference to the closest earlier prompt: index in tokens, old and new text, likely cause."""
        new = np.asarray(prompt, dtype=np.int32)
        with self._lock:
            earlier = list(self._prompts.get(client, ()))
        shared = [_common(old, new) for old in earlier]
        if not earlier or max(shared) == 0:
            return {"index": 0, "old": "", "new": self._text(new[:_SHOWN]), "cause": "no earlier prompt is known"}
        # Of equally close ones the latest, and that which the prompt continues whole before all.
        best = max(range(len(shared)), key=lambda i: (shared[i], shared[i] == len(earlier[i]), i))
        index, old = shared[best], earlier[best]
        before, after = self._text(old[index : index + _SHOWN]), self._text(new[index : index + _SHOWN])
        return {"index": index, "old": before, "new": after, "cause": self._cause(old, new, index)}

    def _text(self, tokens: NDArray[np.int32]) -> str:
        return self._tokenizer.decode(tokens.tolist())

    def _cause(self, old: NDArray[np.int32], new: NDArray[np.int32], index: int) -> str:
        if index == len(old) or index == len(new):
            return "nothing changed: one continues the other"
        before = self._text(new[:index])
        old_text, new_text = self._text(old[index : index + _SHOWN]), self._text(new[index : index + _SHOWN])
        if old_text.startswith(new_text) or new_text.startswith(old_text):
            return "the same text came back in other tokens"
        section = _section(before)
        if section == "effort":
            return "thinking was switched or its effort changed, which changes the first line of the prompt"
        if section == "tools":
            return "the tools changed, or the order they are given in"
        if section == "thought":
            return "reasoning of an earlier turn was dropped, added or changed; see clear_thinking"
        where = {"system": "a system message", "user": "a message of the user", "tool": "the result of a tool",
                 "assistant": "an earlier reply"}[section]  # fmt: skip
        line = before[-48:].rpartition("\n")[2]
        for name, pattern in _VOLATILE:
            found = [pattern.search(line + t.split("\n")[0]) for t in (old_text, new_text)]
            if all(found):
                return f"{where} changed in what looks like {name}"
        return f"{where} changed or was replaced"


def _common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    n = min(len(a), len(b))
    differ = np.nonzero(a[:n] != b[:n])[0]
    return int(differ[0]) if len(differ) else n


def _section(before: str) -> str:
    """Which part of the prompt its text so far ends in."""
    at, role = max((before.rfind(r), r) for r in _ROLES)
    inside = before[at + len(role) :]
    if at < 0 or (role == "<|system|>" and inside.startswith("Reasoning Effort:") and len(inside) <= 22):
        return "effort"
    if role == "<|system|>":
        return "tools" if inside.startswith("\n# Tools") else "system"
    if role == "<|assistant|>":
        return "assistant" if "</think>" in inside else "thought"
    return "user" if role == "<|user|>" else "tool"
