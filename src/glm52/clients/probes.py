"""Python SDKs as a user holds them. Run in an interpreter that has the SDK, which need not have this package:

    python -P probes.py SDK URL SMALL_URL SCENE...

prints one JSON line: the version of the SDK, and for each scene "pass", "fail" or "n/a" with the reason.
"""

import functools
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

THOUGHT, ANSWER = "Let me look at this first.", "The answer is forty-two."
PREAMBLE = "You are an agent that reads, writes and runs what it is asked to. " * 200
PARAMETERS = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
TOOL = {"type": "function", "function": {"name": "shell", "description": "Runs it.", "parameters": PARAMETERS}}
# Of the server behind a gateway, and the words in which a client is told of each.
FAULTS = {"bad-gateway": "502", "cut": "broke", "cut-call": "broke", "garbage": "no event", "stall": "too long"}
NOTES = {"cat note-1.txt": "word-alpha", "cat note-2.txt": "word-beta"}


class NotApplicable(Exception):
    """The client has no such thing; says why."""


@dataclass
class Reply:
    """calls: id and arguments of each. message: as it is sent back. cached: the share of the prompt that was found."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    message: Any = None
    cached: float | None = None
    pieces: int = 0


class Chat:
    """A client of chat completions. ``ask`` raises what the SDK raises."""

    shows_reasoning = True

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, messages: list[Any], *, tools: bool = False, stream: bool = False, leave: bool = False) -> Reply:
        fields = {"messages": messages, **({"tools": [TOOL]} if tools else {})}
        if not stream:
            return read_message(self.create(**fields))
        chunks = self.create(**fields, stream=True)
        if leave:
            next(iter(chunks))
            self.leave(chunks)
            return Reply()
        return read_chunks(chunks)

    def create(self, **fields: Any) -> Any:
        raise NotImplementedError

    def leave(self, chunks: Any) -> None:
        """Hang up."""
        chunks.close()

    def results(self, reply: Reply, results: list[str]) -> list[Any]:
        """Messages that follow once its calls are done."""
        return [
            reply.message,
            *(
                {"role": "tool", "tool_call_id": i, "content": r}
                for (i, _), r in zip(reply.calls, results, strict=True)
            ),
        ]


def read_message(response: Any) -> Reply:
    message, usage = response.choices[0].message, response.usage
    calls = [(c.id, json.loads(c.function.arguments)) for c in message.tool_calls or ()]
    details = getattr(usage, "prompt_tokens_details", None)
    cached = None if details is None else (details.cached_tokens or 0) / usage.prompt_tokens
    return Reply(message.content or "", getattr(message, "reasoning_content", None) or "", calls,
                 message.model_dump(exclude_none=True), cached)  # fmt: skip


def read_chunks(chunks: Any) -> Reply:
    reply = Reply()
    parts: dict[int, list[str]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            reply.pieces += bool(choice.delta.content)
            reply.text += choice.delta.content or ""
            reply.reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                part = parts.setdefault(call.index, ["", ""])
                part[0] += call.id or ""
                part[1] += call.function.arguments or ""
    reply.calls = [(i, json.loads(arguments)) for i, arguments in parts.values()]
    return reply


class OpenAI(Chat):
    package = "openai"

    def create(self, **fields: Any) -> Any:
        import openai

        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0)
        return client.chat.completions.create(model="glm-5.2", **fields)


class Zai(Chat):
    package = "zai-sdk"

    def create(self, **fields: Any) -> Any:
        from zai import ZaiClient

        client = ZaiClient(base_url=f"{self.url}/api/paas/v4", api_key="any.any", max_retries=0)
        return client.chat.completions.create(model="glm-5.2", **fields)

    def leave(self, chunks: Any) -> None:
        chunks.response.close()


class LiteLLM(Chat):
    package = "litellm"

    def create(self, **fields: Any) -> Any:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch a table of prices
        import litellm

        litellm.suppress_debug_info = True
        return litellm.completion(
            "hosted_vllm/glm-5.2", api_base=f"{self.url}/v1", api_key="any", num_retries=0, **fields
        )

    def leave(self, chunks: Any) -> None:
        chunks.completion_stream.close()


class LangChain(Chat):
    package = "langchain-openai"
    shows_reasoning = False

    def ask(self, messages: list[Any], *, tools: bool = False, stream: bool = False, leave: bool = False) -> Reply:
        from langchain_openai import ChatOpenAI

        key: Any = "any"  # its type is that of a secret, which it makes of this itself
        model: Any = ChatOpenAI(model="glm-5.2", base_url=f"{self.url}/v1", api_key=key, max_retries=0)
        model = model.bind_tools([TOOL]) if tools else model
        if not stream:
            return self._reply(model.invoke(messages))
        chunks, whole, pieces = model.stream(messages), None, 0
        for chunk in chunks:
            if leave:
                chunks.close()
                return Reply()
            pieces += bool(chunk.content)
            whole = chunk if whole is None else whole + chunk
        reply = self._reply(whole)
        reply.pieces = pieces
        return reply

    def _reply(self, message: Any) -> Reply:
        usage = message.usage_metadata or {}
        found = (usage.get("input_token_details") or {}).get("cache_read", 0)
        cached = found / usage["input_tokens"] if usage else None
        return Reply(message.content, "", [(c["id"], c["args"]) for c in message.tool_calls], message, cached)


class Anthropic(Chat):
    package = "anthropic"

    def ask(self, messages: list[Any], *, tools: bool = False, stream: bool = False, leave: bool = False) -> Reply:
        import anthropic

        client = anthropic.Anthropic(base_url=self.url, api_key="any", max_retries=0)
        system = [m["content"] for m in messages if m["role"] == "system"]
        fields: Any = {"model": "glm-5.2", "max_tokens": 4000, "thinking": {"type": "enabled", "budget_tokens": 2000},
                       "messages": [m for m in messages if m["role"] != "system"]}  # fmt: skip
        fields |= {"system": system[0]} if system else {}
        if tools:
            fields["tools"] = [{"name": "shell", "description": "Runs it.", "input_schema": PARAMETERS}]
        if not stream:
            return self._reply(client.messages.create(**fields))
        with client.messages.stream(**fields) as events:
            if leave:
                next(iter(events))
                return Reply()
            pieces = sum(e.type == "content_block_delta" and e.delta.type == "text_delta" for e in events)
            reply = self._reply(events.get_final_message())
        reply.pieces = pieces
        return reply

    def _reply(self, message: Any) -> Reply:
        def joined(kind: str, name: str) -> str:
            return "".join(getattr(b, name) for b in message.content if b.type == kind)

        found = message.usage.cache_read_input_tokens or 0
        return Reply(
            joined("text", "text"), joined("thinking", "thinking"),
            [(b.id, b.input) for b in message.content if b.type == "tool_use"],
            {"role": "assistant", "content": [b.model_dump(exclude_none=True) for b in message.content]},
            found / (found + message.usage.input_tokens),
        )  # fmt: skip

    def results(self, reply: Reply, results: list[str]) -> list[Any]:
        blocks = [{"type": "tool_result", "tool_use_id": i, "content": r}
                  for (i, _), r in zip(reply.calls, results, strict=True)]  # fmt: skip
        return [reply.message, {"role": "user", "content": blocks}]


class Llm(Chat):
    """Simon Willison's ``llm``, configured by its file; it keeps the conversation itself and runs the tools."""

    package = "llm"
    shows_reasoning = False

    def _conversation(self) -> Any:
        import llm

        folder = Path(os.environ.setdefault("LLM_USER_PATH", tempfile.mkdtemp()))
        entry = {"model_id": "local", "model_name": "glm-5.2", "api_base": f"{self.url}/v1", "supports_tools": True}
        (folder / "extra-openai-models.yaml").write_text(json.dumps([entry]))
        return llm.get_model("local").conversation()

    def ask(self, messages: list[Any], *, tools: bool = False, stream: bool = False, leave: bool = False) -> Reply:
        chat = self._conversation()
        system = next((m["content"] for m in messages if m["role"] == "system"), None)
        response = chat.prompt(messages[-1]["content"], system=system, stream=stream, tools=[shell] if tools else None)
        if leave:
            next(iter(response))
            response = None
            return Reply()
        pieces = sum(1 for _ in response)
        self._last = response
        calls = [(c.tool_call_id, c.arguments) for c in response.tool_calls()]
        return Reply(response.text(), "", calls, chat, self._share(response), pieces)

    def _share(self, response: Any) -> float | None:
        usage = response.usage()
        details = (usage.details or {}).get("prompt_tokens_details") or {}
        return details.get("cached_tokens", 0) / usage.input if usage.input else None

    def results(self, reply: Reply, results: list[str]) -> list[Any]:
        return [reply]

    def follow(self, reply: Reply) -> Reply:
        response = reply.message.prompt(tools=[shell], tool_results=self._last.execute_tool_calls(), stream=False)
        return Reply(response.text(), cached=self._share(response))


def shell(command: str) -> str:
    """Runs it."""
    return NOTES[command]


# ── The scenes ───────────────────────────────────────────────────────────────────────────────────────────────────


def question(scene: str) -> list[Any]:
    return [{"role": "user", "content": f"[check:{scene}] What do the notes say?"}]


def expect(condition: bool, why: str) -> None:
    if not condition:
        raise AssertionError(why)


def plain(client: Chat) -> None:
    reply = client.ask(question("plain"))
    expect(reply.text.strip() == ANSWER, f"the answer reads {reply.text!r}")


def streamed(client: Chat) -> None:
    reply = client.ask(question("streamed"), stream=True)
    expect(reply.text.strip() == ANSWER, f"the answer reads {reply.text!r}")
    expect(reply.pieces > 1, f"it came in {reply.pieces} piece")


def reasoning(client: Chat) -> None:
    if not client.shows_reasoning:
        raise NotApplicable("the client has no field for it")
    for stream in (False, True):
        reply = client.ask(question("plain"), stream=stream)
        expect(reply.reasoning.strip() == THOUGHT, f"the reasoning reads {reply.reasoning!r}")


def round_trip(client: Chat, messages: list[Any], words: list[str]) -> Reply:
    first = client.ask(messages, tools=True)
    expect(len(first.calls) == len(words), f"{len(first.calls)} calls instead of {len(words)}")
    outputs = [NOTES[arguments["command"]] for _, arguments in first.calls]
    if isinstance(client, Llm):
        last = client.follow(first)
    else:
        last = client.ask([*messages, *client.results(first, outputs)], tools=True)
    expect(all(word in last.text for word in words), f"the answer reads {last.text!r}")
    return last


def tools(client: Chat) -> None:
    round_trip(client, question("tools"), ["word-alpha"])
    again = client.ask(question("tools"), tools=True, stream=True)
    expect([a for _, a in again.calls] == [{"command": "cat note-1.txt"}], f"streamed, the calls are {again.calls}")


def parallel(client: Chat) -> None:
    round_trip(client, question("parallel"), ["word-alpha", "word-beta"])


def cache(client: Chat) -> None:
    last = round_trip(client, [{"role": "system", "content": PREAMBLE}, *question("cache")], ["word-alpha"])
    if last.cached is None:
        raise NotApplicable("the client does not show it")
    expect(last.cached > 0.95, f"{last.cached:.0%} of the second prompt were cached")


def hang_up(client: Chat) -> None:
    client.ask(question("hang-up"), stream=True, leave=True)


def overflow(client: Chat) -> None:
    try:
        client.ask([{"role": "system", "content": PREAMBLE * 4}, *question("plain")])
    except Exception as error:
        expect("context" in str(error) or "too long" in str(error), f"{type(error).__name__}: {error}")
        expect("4096" in str(error), f"no numbers in: {error}")
        return
    raise AssertionError("no error was raised")


def fault(client: Chat, name: str) -> None:
    """An error says what happened, and asking again brings the whole answer; or the client has asked again itself."""
    is_call = name == "cut-call"
    for stream in (False, True):
        try:
            reply = client.ask(question(name), stream=stream, tools=is_call)
        except Exception as error:
            told = f"{error} {vars(error)}"  # zai-sdk keeps the words in json_data
            expect(re.search(FAULTS[name], told) is not None, f"{type(error).__name__}: {error}")
            reply = client.ask(question(name), stream=stream, tools=is_call)
        said, due = (reply.calls[0][1]["command"], "cat note-1.txt") if is_call else (reply.text.strip(), ANSWER)
        expect(said == due, f"passed off as whole: {said!r}")


SCENES: dict[str, Callable[[Chat], None]] = {
    "plain": plain, "streamed": streamed, "reasoning": reasoning, "tools": tools, "parallel": parallel, "cache": cache,
    "hang-up": hang_up, "overflow": overflow,
}  # fmt: skip
ALL = SCENES | {name: functools.partial(fault, name=name) for name in FAULTS}
CLIENTS: dict[str, Any] = {c.package: c for c in (OpenAI, Anthropic, Zai, LiteLLM, LangChain, Llm)}


def run(scene: Callable[[Chat], None], client: Chat) -> tuple[str, str]:
    try:
        scene(client)
    except NotApplicable as why:
        return "n/a", str(why)
    except Exception as error:
        traceback.print_exc()
        return "fail", f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return "pass", ""


def main(name: str, url: str, small_url: str, *scenes: str) -> None:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        print(json.dumps({"missing": f"{name} is not installed in {sys.executable}"}))
        return
    kind = CLIENTS[name]
    cells = {s: run(ALL[s], kind(small_url if s == "overflow" else url)) for s in scenes}
    print(json.dumps({"version": version, "cells": cells}))


if __name__ == "__main__":
    main(*sys.argv[1:])
