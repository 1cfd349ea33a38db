"""``glm52 chat``: a conversation in the terminal. Reasoning is shown apart; Ctrl-C stops a reply, not the program.

Where standard output is no terminal, it gets the answers; reasoning, remarks and errors go to standard error.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TextIO

from glm52.chat import (
    BUDGETS,
    ContentDelta,
    Delta,
    Diagnostic,
    ReasoningDelta,
    Reply,
    ReplyParser,
    Thinking,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    collect,
)
from glm52.engine import Repetition, SamplingParams
from glm52.errors import GLMError, RequestError
from glm52.hub import resolve
from glm52.options import integer, number
from glm52.session import Session, add_context_argument, add_format_argument

HELP = """\
/think on|off       think before answering, or not
/effort high|max    how hard to think
/system TEXT        set the system message (empty: none)
/stats              tokens, speed and accepted drafts so far
/examples           questions the small model was made for
/reset              forget the conversation
/exit               leave (also Ctrl-D)"""
EXAMPLES = """\
What is 347+589?
81 - 37 = ?
Repeat: "blue garden"
Who wrote the book about the river?
Extract name, age as JSON: Maria is a 34 year old nurse from Oslo.
Write a Python function f(x) that returns x times 7."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="folder or hub name (default: the small model that is shipped)")
    parser.add_argument("--prompt", help="answer this and exit")
    parser.add_argument("--think", choices=("on", "off"), default="on")
    parser.add_argument("--effort", choices=("high", "max"), help="how hard to think (default: max)")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-tokens", type=integer(1), default=1024, help="longest reply (default: 1024)")
    parser.add_argument("--temperature", type=number(0, 2), help="0 is greedy (default: the model's)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--drafts", type=integer(0, 5),
                        help="tokens drafted per step, 0 to 5 (default: up to 3, as many as pay)")  # fmt: skip
    add_context_argument(parser)
    add_format_argument(parser)


def run(args: argparse.Namespace) -> int:
    if args.think == "off" and args.effort:
        raise RequestError("--effort: expected thinking to be on; leave out --think off")
    session = Session.open(resolve(args.model), fmt=args.format, context=args.context, num_drafts=args.drafts,
                           cache=args.kv_cache_dtype)  # fmt: skip
    chat = Chat(session, args, sys.stdout, aside=sys.stdout if sys.stdout.isatty() else sys.stderr)
    if args.prompt is not None:
        return 0 if chat.say(args.prompt) else 1
    failures = 0
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing for input())

        chat.greet()
    while True:
        try:
            line = input(chat.style("> ", "1") if sys.stdin.isatty() else "")
            line.encode()
        except EOFError:
            break
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)")
            continue
        except UnicodeError as error:  # from decoding, or from bytes that were let through
            raise RequestError(f"stdin: expected text in UTF-8 ({error})") from error
        if line.strip() in ("/exit", "/quit"):
            break
        if line.strip():
            failures += not chat.handle(line)
    return 1 if failures and not sys.stdin.isatty() else 0


class Chat:
    """One conversation: its messages, its settings, and how they are shown: answers on ``out``, what is beside them on
    ``aside``."""

    def __init__(self, session: Session, args: argparse.Namespace, out: TextIO, aside: TextIO) -> None:
        self.session, self.out, self.aside = session, out, aside
        self.thinking = Thinking(enabled=args.think == "on", effort=args.effort or "max")
        self.system = args.system
        self.messages: list[dict[str, Any]] = []
        defaults = session.defaults
        temperature = defaults.get("temperature", 1.0) if args.temperature is None else args.temperature
        self.params = SamplingParams(
            max_tokens=args.max_tokens, temperature=temperature, top_p=defaults.get("top_p", 1.0), seed=args.seed,
            repetition=Repetition(),
        )  # fmt: skip
        self.output_tokens, self.seconds = 0, 0.0

    def style(self, text: str, code: str) -> str:
        """ANSI styling where the output is a terminal."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.out.isatty() else text

    def greet(self) -> None:
        card = self.session.folder / "README.md"
        lines = card.read_text("utf-8", "replace").splitlines() if card.is_file() else []
        about = next((line[2:] for line in lines if line.startswith("> ")), f"Model: {self.session.name}")
        print(f"{about}\n/help lists commands, /examples shows what to ask.\n", file=self.out)

    def handle(self, line: str) -> bool:
        """A command or a message -> whether it could be done."""
        if not line.startswith("/"):
            return self.say(line)
        command, _, argument = line[1:].strip().partition(" ")
        commands: dict[str, Callable[[str], str]] = {
            "help": lambda _: HELP, "examples": lambda _: EXAMPLES, "stats": lambda _: self.stats(),
            "think": self._think, "effort": self._effort, "system": self._system, "reset": self._reset,
        }  # fmt: skip
        action = commands.get(command)
        print(action(argument.strip()) if action else f"/{command} is not a command; /help lists them", file=self.out)
        return action is not None

    def _think(self, argument: str) -> str:
        if argument not in ("on", "off"):
            return f"thinking is {'on' if self.thinking.enabled else 'off'}; say /think on or /think off"
        self.thinking = Thinking(enabled=argument == "on", effort=self.thinking.effort)
        return f"thinking is {argument}"

    def _effort(self, argument: str) -> str:
        if argument not in ("high", "max"):
            return f"effort is {self.thinking.effort}; say /effort high or /effort max"
        self.thinking = Thinking(enabled=True, effort="high" if argument == "high" else "max")
        return f"thinking is on with effort {argument}"

    def _system(self, argument: str) -> str:
        self.system = argument or None
        return "system message set" if argument else "no system message"

    def _reset(self, _: str) -> str:
        self.messages = []
        return "a new conversation"

    def stats(self) -> str:
        s = self.session.engine.stats
        speed = self.output_tokens / self.seconds if self.seconds else 0.0
        rates = [f"{a / d:.0%}" for a, d in zip(s.accepted, s.drafted, strict=True) if d]
        return (
            f"prompt {s.prompt_tokens} tokens ({s.cached_tokens} from the cache), reply {s.output_tokens} tokens, "
            f"{speed:.1f} tokens/s; drafting {self.session.engine.draft_depth} tokens a step, accepted by depth: "
            f"{', '.join(rates) or 'none drafted'}; {self.session.chunks}"
        )

    def say(self, text: str) -> bool:
        """Send a message and stream the reply -> whether it came to its end. One that did not is forgotten."""
        self.messages.append({"role": "user", "content": text})
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            reply = self._stream([*system, *self.messages])
        except KeyboardInterrupt:
            print(self.style(" (stopped)", "2"), file=self.aside)
            self.messages.pop()
        except GLMError as error:
            print(self.style(f"error: {error}", "31"), file=self.aside)
            self.messages.pop()
        else:
            message: dict[str, Any] = {"role": "assistant", "content": reply.content}
            if reply.reasoning:
                message["reasoning_content"] = reply.reasoning
            self.messages.append(message)
            return True
        return False

    def _stream(self, messages: list[dict[str, Any]]) -> Reply:
        session = self.session
        ids = session.template.render_ids(session.tokenizer, messages, None, self.thinking)
        parser = ReplyParser(None, thinking=self.thinking.enabled)
        deltas: list[Delta] = []
        shown = Display(self)
        seq = session.engine.submit(ids, replace(self.params, thinking_budget=BUDGETS[self.thinking.effort]))
        began = time.perf_counter()
        try:
            while seq.finish_reason is None:
                for event in session.engine.step():
                    if event.error is not None:
                        raise GLMError(event.error)
                    new = parser.feed(event.text)
                    deltas += new
                    shown.show(new)
        finally:
            session.engine.abort(seq)
            self.output_tokens += len(seq.output)
            self.seconds += time.perf_counter() - began
        last = parser.close()
        shown.show(last)
        shown.end(seq.finish_reason, cut=seq.thinking_closed is not None)
        return collect([*deltas, *last], thinking=self.thinking.enabled)


class Display:
    """Deltas on a terminal: reasoning dim and apart from the answer, calls as lines."""

    def __init__(self, chat: Chat) -> None:
        self._chat, self._began, self._in_reasoning = chat, time.perf_counter(), False

    def show(self, deltas: list[Delta]) -> None:
        for d in deltas:
            if isinstance(d, ReasoningDelta):
                if not self._in_reasoning:
                    self._remark("thinking: ", "2;3")
                    self._in_reasoning = True
                self._remark(d.text, "2")
                continue
            self._end_reasoning()
            if isinstance(d, ContentDelta):
                self._write(d.text)
            elif isinstance(d, ToolCallStart):
                self._write(f"[call {d.name} ", "36")
            elif isinstance(d, ToolCallArguments):
                self._write(d.text, "36")
            elif isinstance(d, ToolCallEnd):
                self._write("]\n", "36")
            elif isinstance(d, Diagnostic):
                self._remark(f"[{d.code}: {d.message}]\n", "33")

    def end(self, finish_reason: str | None, *, cut: bool) -> None:
        """cut: whether the budget ended the thinking."""
        if self._in_reasoning:
            self._end_reasoning()
        remarks = ["thinking was cut short"] * cut + [finish_reason] * (finish_reason not in ("stop", None))
        if remarks:
            self._remark(f" ({'; '.join(map(str, remarks))})")
            if self._chat.aside is not self._chat.out:
                self._remark("\n")
        self._write("\n")

    def _end_reasoning(self) -> None:
        if self._in_reasoning:
            self._remark(f"\n({time.perf_counter() - self._began:.1f} s)\n", "2;3")
            self._in_reasoning = False

    def _write(self, text: str, code: str | None = None) -> None:
        print(self._chat.style(text, code) if code else text, end="", file=self._chat.out, flush=True)

    def _remark(self, text: str, code: str = "2") -> None:
        print(self._chat.style(text, code), end="", file=self._chat.aside, flush=True)
