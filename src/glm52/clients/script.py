"""A model without weights that says what a check needs.

What it says is a function of the prompt: a mark such as ``[check:tools]`` in a user's text names the scene, the tools
that the client offers are called by their own schemas, and what a tool found is told in the answer.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from glm52.config import GLMConfig
from glm52.engine import Event, SamplingParams, Sequence
from glm52.engine.guide import Guide, Marks
from glm52.hub import NANO
from glm52.tokenizer import Tokenizer

THOUGHT = "Let me look at this first."
ANSWER = "The answer is forty-two."
_MARK = re.compile(r"\[check:([a-z-]+)\]")
_TOOLS = re.compile(r"<tools>\n(.*?)</tools>", re.DOTALL)
_KEYS = ("command", "cmd", "commands")
_ENDING = re.compile(r"terminal completion tools: (\w+)")  # what Cline wants called once a request has failed
_READ = ["cat note-1.txt"]
_COMMANDS = {  # of each reply to a question, until there are none
    "tools": [_READ], "cache": [_READ], "cut-call": [_READ], "parallel": [[*_READ, "cat note-2.txt"]],
    "session": [_READ, ["cat note-2.txt"], ["ls"]],
}  # fmt: skip


@dataclass
class Turn:
    """A prompt that is answered. is_cut: the reply is over and did not come to its end."""

    prompt: str
    num_tokens: int
    num_cached: int
    is_cut: bool = False


class Script:
    """The backend. Prompts share prefixes as in a cache that forgets nothing."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.read(NANO)
        self.eos = frozenset(GLMConfig.read(NANO).eos_token_id)
        self._marks = Marks.of(self.tokenizer)
        self._known: list[list[int]] = []
        self.turns: list[Turn] = []

    async def generate(self, tokens: Iterable[int], params: SamplingParams) -> AsyncIterator[Event]:
        prompt = list(tokens)
        text = self.tokenizer.decode(prompt)
        turn = Turn(text, len(prompt), self._cached(prompt))
        self.turns.append(turn)
        seq = Sequence(
            id=0, prompt=prompt, params=params, seed=0, tokens=list(prompt), max_tokens=params.max_tokens,
            detokenizer=self.tokenizer.stream(), guide=Guide(prompt=prompt, marks=self._marks),
            num_cached_tokens=turn.num_cached,
        )  # fmt: skip
        pause_s = 0.02 if scene_of(text) == "hang-up" else 0.0
        try:
            for token in [*self.tokenizer.encode(reply_to(text)), min(self.eos)]:
                await asyncio.sleep(pause_s)
                piece = seq.append(token, self.eos)
                rest = seq.close_text() if seq.finish_reason else ""
                yield Event(seq=seq, token_ids=[] if piece is None else [token], text=(piece or "") + rest,
                            finish_reason=seq.finish_reason)  # fmt: skip
                if seq.finish_reason is not None:
                    return
        finally:
            turn.is_cut = seq.finish_reason is None
            self._known.append(seq.tokens)

    def _cached(self, prompt: list[int]) -> int:
        return max((_shared(prompt[:-1], known) for known in self._known), default=0)


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def scene_of(prompt: str) -> str:
    marks = _MARK.findall(prompt)
    return marks[-1] if marks else ""


def reply_to(prompt: str) -> str:
    """What the model says after a rendered prompt. Pure."""
    thought = f"{THOUGHT}</think>" if prompt.endswith("<think>") else ""
    scene, since = scene_of(prompt), _MARK.split(prompt)[-1]
    if scene == "hang-up":
        return thought + "On and on it goes. " * 500
    step = since.count("<|assistant|>") - 1
    commands = _COMMANDS[scene][step] if step < len(_COMMANDS.get(scene, ())) else []
    found = _TOOLS.search(prompt)
    tools = [json.loads(line) for line in found[1].splitlines() if line.strip()] if found else []
    calls = [call for command in commands if (call := shell_call(tools, command))]
    if calls:
        return thought + "".join(calls)
    words = ", ".join(re.findall("word-[a-z0-9]+", since))
    answer = f"The notes say: {words}." if "<tool_response>" in since else ANSWER
    wanted = _ENDING.search(since.rpartition("<|user|>")[2])
    return thought + answer + "".join(_call(tool, {}) for tool in tools if wanted and tool["name"] == wanted[1])


def shell_call(tools: list[Any], command: str) -> str | None:
    """A call of whichever tool requires a command, its other required arguments filled by their types."""
    for tool in tools:
        parameters = tool.get("parameters") or {}
        properties, required = parameters.get("properties") or {}, parameters.get("required", ())
        key = next((k for k in _KEYS if k in properties and k in required), None)
        if key is not None:
            is_list = properties[key].get("type") == "array"
            value = (["bash", "-c", command] if key == "command" else [command]) if is_list else command
            return _call(tool, {key: value})
    return None


def _call(tool: Any, said: dict[str, Any]) -> str:
    parameters = tool.get("parameters") or {}
    properties = parameters.get("properties") or {}
    said = said | {k: _some(properties.get(k, {})) for k in parameters.get("required", ()) if k not in said}
    arguments = "".join(f"<arg_key>{k}</arg_key><arg_value>{_text(v)}</arg_value>" for k, v in said.items())
    return f"<tool_call>{tool['name']}{arguments}</tool_call>"


def _some(schema: Any) -> Any:
    if schema.get("enum"):
        return schema["enum"][0]
    return {"boolean": False, "integer": 1, "number": 1, "array": [], "object": {}}.get(
        schema.get("type", ""), "read a note"
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
