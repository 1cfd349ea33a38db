"""Sums with column traces, products, multi-term expressions, comparisons, equations and word problems.

A trace works digit by digit from the right and carries the result written so far, so that every step needs only what
stands just before it: ``7+9=16 c1: 6``, ``4+8+1=13 c1: 36``, ``3+5+1=9: 936``.
"""

import random
import re

from glm52.chat import Reply, Thinking
from glm52.tasks.base import Bucket, Example, Split, assistant, choose_phrasing, draw_thinking, held_out, user
from glm52.tasks.words import CITIES, NAMES, NOUNS, draw, draw_many

SUM_PHRASINGS = (
    "What is {e}?", "{e}", "{e} = ?", "{e}=", "Compute {e}.", "Calculate {e}", "what's {e}", "How much is {e}?",
    "Please compute {e}.", "Can you work out {e}?", "Evaluate {e}.", "Find {e}.", "Solve {e}", "what is {e}", "{e}?",
    "Tell me {e}.", "I need {e}.", "Could you please calculate {e} for me?", "Work out {e} please",
    "What do you get for {e}?", "Give me the result of {e}.", "hey, {e}?", "Quick question: {e}", "compute: {e}",
    "计算 {e}", "{e} 等于多少？", "请算一下 {e}", "Wie viel ist {e}?", "Combien font {e} ?", "¿Cuánto es {e}?",
    "The result of {e} is?", "Do this sum: {e}", "Please tell me what {e} is",
)  # fmt: skip


def add_trace(a: int, b: int) -> str:
    """Column addition of two non-negative integers."""
    x, y = str(a)[::-1], str(b)[::-1]
    carry, done, lines = 0, "", []
    for i in range(max(len(x), len(y))):
        digits = [int(s[i]) for s in (x, y) if i < len(s)] + ([carry] if carry else [])
        total = sum(digits)
        last = i == max(len(x), len(y)) - 1
        done = (str(total) if last else str(total % 10)) + done
        carry = total // 10
        step = "+".join(map(str, digits)) + (f"={total}" if len(digits) > 1 else "")
        lines.append(f"{step}{' c1' if carry and not last else ''}: {done}")
    return "\n".join(lines)


def sub_trace(a: int, b: int) -> str:
    """Column subtraction; a smaller minuend is turned round first."""
    if a < b:
        return f"{a}<{b} so -({b}-{a})\n{sub_trace(b, a)}\n-{b - a}"
    x, y = str(a)[::-1], str(b)[::-1]
    borrow, done, lines = 0, "", []
    for i in range(len(x)):
        top, bottom = int(x[i]), int(y[i]) if i < len(y) else 0
        d = top - bottom - borrow
        step = f"{top}-{bottom}" + (f"-{borrow}" if borrow else "")
        borrow = int(d < 0)
        step += f"+10={d + 10} b1" if borrow else f"={d}"
        done = str(d % 10) + done
        lines.append(f"{step}: {done}")
    if done != str(a - b):
        lines.append(str(a - b))
    return "\n".join(lines)


def mul_trace(a: int, b: int) -> str:
    """Partial products of a with the digits of b, then their sum."""
    parts = [(int(d) * 10**i) for i, d in enumerate(str(b)[::-1]) if d != "0"]
    lines = [f"{a}*{p}={a * p}" for p in parts]
    total = a * parts[0] if parts else 0
    for p in parts[1:]:
        lines.append(f"{total}+{a * p}={total + a * p}")
        total += a * p
    return "\n".join(lines)


def short_trace(trace: str) -> str:
    """The High-effort form: only what each line arrives at."""
    return ", ".join(line.rpartition(": ")[2].rpartition("=")[2] for line in trace.splitlines())


def number(rng: random.Random, digits: int) -> int:
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def reasoned(thinking: Thinking, trace: str) -> str | None:
    if not thinking.enabled:
        return None
    return trace if thinking.effort == "max" else short_trace(trace)


def last_number(text: str) -> str | None:
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return found[-1] if found else None


class _Number:
    """Tasks whose answer is one number, scored by the last number of the content."""

    bucket: Bucket = "maths"

    def score(self, example: Example, reply: Reply) -> float:
        return float(last_number(reply.content) == str(example.answer))


class Sum(_Number):
    """a + b or a - b; level = digits of the longer operand - 1."""

    levels = 5

    def __init__(self, sign: str) -> None:
        self.sign, self.name = sign, {"+": "add", "-": "sub"}[sign]

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        level = rng.choice((0, 1, 1, 2, 2, 2, 3, 4)) if level is None else level
        while True:
            sizes = [level + 1, rng.randint(1, level + 1)]
            rng.shuffle(sizes)
            a, b = number(rng, sizes[0]), number(rng, sizes[1])
            if level == 0 or held_out(self.name, a, b) == (split == "test"):
                break
        form = rng.choice((f"{a}{self.sign}{b}", f"{a} {self.sign} {b}", f"{a} {self.sign} {b}"))
        if rng.random() < 0.08:
            word = {"+": "plus", "-": "minus"}[self.sign]
            form = f"{a} {word} {b}"
        trace = add_trace(a, b) if self.sign == "+" else sub_trace(a, b)
        answer = a + b if self.sign == "+" else a - b
        return Example(
            task=self.name, messages=[user(choose_phrasing(rng, SUM_PHRASINGS, split).format(e=form))],
            target=[assistant(str(answer), reasoned(thinking, trace))], answer=answer, thinking=thinking, level=level,
        )  # fmt: skip


class Product(_Number):
    """a * b; levels: 1x1, 1x2, 2x2 digits."""

    name, levels = "mul", 3

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        level = rng.randrange(self.levels) if level is None else level
        while True:
            a, b = (number(rng, d) for d in ((1, 1), (2, 1), (2, 2))[level])
            if level == 0 or held_out("mul", a, b) == (split == "test"):
                break
        form = rng.choice(("{a}*{b}", "{a} * {b}", "{a} x {b}", "{a} times {b}")).format(a=a, b=b)
        return Example(
            task="mul", messages=[user(choose_phrasing(rng, SUM_PHRASINGS, split).format(e=form))],
            target=[assistant(str(a * b), reasoned(thinking, mul_trace(a, b) or "0"))], answer=a * b,
            thinking=thinking, level=level,
        )  # fmt: skip


class MultiTerm(_Number):
    """Three or four terms, from left to right."""

    name, levels = "multi_term", 2

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        level = rng.randrange(self.levels) if level is None else level
        while True:
            terms = [number(rng, rng.randint(1, 2)) for _ in range(3 + level)]
            signs = [rng.choice("+-") for _ in terms[1:]]
            if held_out("multi", *terms) == (split == "test"):
                break
        form, total, lines = str(terms[0]), terms[0], []
        for sign, term in zip(signs, terms[1:], strict=True):
            form += f"{sign}{term}"
            after = total + term if sign == "+" else total - term
            lines.append(f"{total}{sign}{term}={after}")
            total = after
        return Example(
            task=self.name, messages=[user(choose_phrasing(rng, SUM_PHRASINGS, split).format(e=form))],
            target=[assistant(str(total), reasoned(thinking, "\n".join(lines)))], answer=total, thinking=thinking,
            level=level,
        )  # fmt: skip


class Compare(_Number):
    """The larger or smaller of two numbers."""

    name, levels = "compare", 1
    phrasings = (
        "Which is {w}: {a} or {b}?", "{w}: {a} or {b}?", "Which number is {w}, {a} or {b}?", "Is {a} or {b} {w}?",
        "pick the {w} one: {a}, {b}", "Of {a} and {b}, which is {w}?", "Tell me which is {w}: {a} or {b}",
        "{a} or {b}, which one is {w}?", "which is the {w} number, {a} or {b}",
    )  # fmt: skip

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        while True:
            a = number(rng, rng.randint(1, 4))
            b = rng.choice((number(rng, len(str(a))), number(rng, rng.randint(1, 4)), a + rng.randint(1, 9)))
            if a != b and held_out("compare", a, b) == (split == "test"):
                break
        word, answer = rng.choice((("larger", max(a, b)), ("smaller", min(a, b)), ("bigger", max(a, b))))
        trace = f"{a}{'>' if a > b else '<'}{b}"
        return Example(
            task=self.name, messages=[user(choose_phrasing(rng, self.phrasings, split).format(w=word, a=a, b=b))],
            target=[assistant(str(answer), trace if thinking.enabled else None)], answer=answer, thinking=thinking,
        )  # fmt: skip


class Equation(_Number):
    """a x + b = c for a whole x."""

    name, levels = "equation", 1
    phrasings = (
        "Solve {e} for x.", "{e}, x = ?", "What is x if {e}?", "Find x: {e}", "solve {e}", "If {e}, what is x?",
        "x=? {e}", "解方程 {e}", "Solve for x: {e}", "Determine x in {e}", "Which x makes {e} true?",
    )  # fmt: skip

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        while True:
            a, b, x = rng.randint(1, 9), rng.randint(1, 20), rng.randint(0, 12)
            if held_out("equation", a, b, x) == (split == "test"):
                break
        sign = rng.choice("+-")
        c = a * x + b if sign == "+" else a * x - b
        left = f"{'' if a == 1 else a}x"
        trace = f"{left}={c}{'-' if sign == '+' else '+'}{b}={a * x}\nx={a * x}/{a}={x}"
        return Example(
            task=self.name, messages=[user(choose_phrasing(rng, self.phrasings, split).format(e=f"{left}{sign}{b}={c}"))],
            target=[assistant(str(x), reasoned(thinking, trace))], answer=x, thinking=thinking,
        )  # fmt: skip


STORIES = (
    ("{n} has {a} {o}s and gets {b} more. How many {o}s does {n} have now?", "+"),
    ("{n} had {a} {o}s. {m} gave {n} {b} {o}s. How many {o}s does {n} have?", "+"),
    ("There are {a} {o}s in one box and {b} in another. How many {o}s are there in all?", "+"),
    ("{n} found {a} {o}s on Monday and {b} on Tuesday. How many {o}s is that together?", "+"),
    ("{n} has {a} {o}s and gives {b} to {m}. How many {o}s are left?", "-"),
    ("There were {a} {o}s. {n} took {b}. How many {o}s remain?", "-"),
    ("{n} bought {a} {o}s and lost {b} of them. How many {o}s does {n} still have?", "-"),
    ("A shop had {a} {o}s and sold {b}. How many {o}s does it have now?", "-"),
    ("{n} has {a} boxes with {b} {o}s each. How many {o}s are there?", "*"),
    ("Each of {a} children gets {b} {o}s. How many {o}s are needed?", "*"),
    ("{n}有{a}个苹果，又买了{b}个。{n}现在有多少个苹果？", "+"),
    ("{n}有{a}本书，送给{m}{b}本。还剩多少本？", "-"),
    ("A bus from {c} carries {a} people; {b} more get on. How many are on the bus?", "+"),
    ("{n} packs {a} {o}s, then {b} more. How many {o}s are packed?", "+"),
    ("{n} baked {a} {o}s and {m} ate {b}. How many {o}s are there now?", "-"),
)


class WordProblem(_Number):
    """One step of +, - or * inside a two-sentence story, in English or Chinese."""

    name, levels = "word_problem", 1

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        kept = STORIES[-2:] if split == "test" and rng.random() < 0.5 else STORIES[:-2]
        story, sign = rng.choice(kept)
        while True:
            a, b = rng.randint(2, 12) if sign == "*" else rng.randint(2, 99), rng.randint(2, 9 if sign == "*" else 60)
            if (sign != "-" or a > b) and held_out("story", sign, a, b) == (split == "test"):
                break
        n, m = draw_many(rng, NAMES, 2)
        text = story.format(n=n, m=m, a=a, b=b, o=draw(rng, NOUNS, split), c=draw(rng, CITIES, split))
        answer = {"+": a + b, "-": a - b, "*": a * b}[sign]
        trace = f"{a}{sign}{b}={answer}"
        return Example(
            task=self.name, messages=[user(text)], target=[assistant(str(answer), trace if thinking.enabled else None)],
            answer=answer, thinking=thinking,
        )  # fmt: skip
