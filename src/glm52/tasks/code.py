"""Small Python: write a one-line function, say what a snippet prints. Programs are run to know the answer."""

import ast
import random
from typing import Any

from glm52.chat import Reply, Thinking
from glm52.tasks.base import Bucket, Example, Split, assistant, choose_phrasing, draw_thinking, held_out, user
from glm52.tasks.words import WORDS, draw, draw_many

# What to return, as an English phrase and as an expression; {n} is a small constant, {c} a letter.
_NUMBER = (
    ("x plus {n}", "x + {n}"), ("x minus {n}", "x - {n}"), ("x times {n}", "x * {n}"), ("the square of x", "x ** 2"),
    ("x modulo {n}", "x % {n}"), ("x squared plus {n}", "x ** 2 + {n}"), ("whether x is even", "x % 2 == 0"),
    ("whether x is greater than {n}", "x > {n}"), ("the larger of x and {n}", "max(x, {n})"),
    ("the smaller of x and {n}", "min(x, {n})"), ("the absolute value of x", "abs(x)"), ("twice x minus {n}", "2 * x - {n}"),
)  # fmt: skip
_LIST = (
    ("the sum of x", "sum(x)"), ("the largest element of x", "max(x)"), ("the length of x", "len(x)"),
    ("x reversed", "x[::-1]"), ("x sorted", "sorted(x)"), ("the first element of x", "x[0]"),
    ("the last element of x", "x[-1]"), ("each element of x plus {n}", "[y + {n} for y in x]"),
    ("each element of x times {n}", "[y * {n} for y in x]"), ("the elements of x greater than {n}", "[y for y in x if y > {n}]"),
    ("the even elements of x", "[y for y in x if y % 2 == 0]"), ("the first {n} elements of x", "x[:{n}]"),
    ("the number of elements of x greater than {n}", "sum(y > {n} for y in x)"),
)  # fmt: skip
_STRING = (
    ("x in upper case", "x.upper()"), ("x reversed", "x[::-1]"), ("the length of x", "len(x)"),
    ("the first letter of x", "x[0]"), ("how often '{c}' is in x", "x.count('{c}')"), ("x repeated {n} times", "x * {n}"),
    ("the words of x", "x.split()"), ("whether x starts with '{c}'", "x.startswith('{c}')"),
    ("x without '{c}'", "x.replace('{c}', '')"), ("the first {n} letters of x", "x[:{n}]"),
)  # fmt: skip
_KINDS: tuple[tuple[tuple[tuple[str, str], ...], tuple[Any, ...]], ...] = (
    (_NUMBER, (0, 3, -4, 12)),
    (_LIST, ([3, 1, 2], [10, -5, 7, 7], [4])),
    (_STRING, ("banana", "a b c", "Xyz")),
)
_SAFE = {f.__name__: f for f in (sum, max, min, len, sorted, abs, list, str, int, range)}
_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Call, ast.Attribute, ast.Subscript, ast.Slice,
    ast.Name, ast.Constant, ast.List, ast.ListComp, ast.GeneratorExp, ast.comprehension, ast.operator, ast.unaryop,
    ast.cmpop, ast.boolop, ast.expr_context, ast.IfExp,
)  # fmt: skip
_METHODS = {"upper", "lower", "count", "split", "startswith", "replace", "title", "strip"}


def evaluate(expression: str, **names: Any) -> Any:
    """Value of a small expression; ValueError for anything beyond arithmetic, lists and a few methods."""
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(str(error)) from error
    for node in ast.walk(tree):
        if not isinstance(node, _NODES) or (isinstance(node, ast.Attribute) and node.attr not in _METHODS):
            raise ValueError(f"{type(node).__name__} is not allowed")
        if isinstance(node, ast.Constant) and isinstance(node.value, int) and abs(node.value) > 10**6:
            raise ValueError("number too large")
        if isinstance(node, ast.Pow | ast.Mult) and expression.count("**") > 1:
            raise ValueError("too many powers")
    try:
        return eval(compile(tree, "<task>", "eval"), {"__builtins__": {}}, {**_SAFE, **names})
    except Exception as error:
        raise ValueError(str(error)) from error


class WriteFunction:
    """A function of one expression, judged by running it."""

    name, levels = "function", 1
    bucket: Bucket = "code"
    phrasings = (
        "Write a Python function f(x) that returns {d}.", "Python function f that returns {d}", "def f(x): returns {d}?",
        "Write f(x) returning {d}.", "Give me Python code: f(x) returns {d}", "Implement f(x) to return {d}.",
        "Code a function f(x) giving {d}.", "I need f(x) in Python that gives {d}.", "python: f(x) = {d}",
        "用 Python 写函数 f(x)，返回 {d}", "Define f so that f(x) is {d}.",
    )  # fmt: skip

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        kind = rng.randrange(3)
        while True:
            words, expression = rng.choice(_KINDS[kind][0])
            n, c = rng.randint(1, 30), rng.choice("abcdeinorst")
            if "{" not in words or held_out("function", words, n, c) == (split == "test"):
                break
        words, expression = words.format(n=n, c=c), expression.format(n=n, c=c)
        code = f"def f(x):\n    return {expression}"
        return Example(
            task=self.name, messages=[user(choose_phrasing(rng, self.phrasings, split).format(d=words))],
            target=[assistant(code, expression if thinking.enabled else None)], answer=(kind, expression), thinking=thinking,
        )  # fmt: skip

    def score(self, example: Example, reply: Reply) -> float:
        kind, expression = example.answer
        head, _, body = reply.content.strip().removeprefix("```python\n").removesuffix("\n```").partition("return ")
        if head.strip() != "def f(x):":
            return 0.0
        try:
            return float(all(evaluate(body, x=x) == evaluate(expression, x=x) for x in _KINDS[kind][1]))
        except ValueError:
            return 0.0


class WhatPrints:
    """The output of one print."""

    name, levels = "prints", 1
    bucket: Bucket = "code"
    phrasings = (
        "What does this print?\n{p}", "{p}\nOutput?", "What is printed by\n{p}", "{p}\nprints what?", "Run in your head:\n{p}",
        "Predict the output.\n{p}", "output of\n{p}", "这段代码输出什么？\n{p}", "What will Python print?\n{p}",
        "Tell me the output:\n{p}", "Python:\n{p}\nResult?",
    )  # fmt: skip

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        kind = rng.randrange(3)
        _, expression = rng.choice(_KINDS[kind][0])
        expression = expression.format(n=rng.randint(1, 9), c=rng.choice("aeot"))
        x: Any = (
            rng.randint(0, 20), rng.sample(range(20), rng.randint(2, 4)), " ".join(draw_many(rng, WORDS, rng.randint(1, 2)))
        )[kind]  # fmt: skip
        if kind == 2 and rng.random() < 0.5:
            x = draw(rng, WORDS, split)
        result = str(evaluate(expression, x=x))
        return Example(
            task=self.name, messages=[user(choose_phrasing(rng, self.phrasings, split).format(p=f"x = {x!r}\nprint({expression})"))],
            target=[assistant(result, f"x = {x!r}, {expression}" if thinking.enabled else None)], answer=result,
            thinking=thinking,
        )  # fmt: skip

    def score(self, example: Example, reply: Reply) -> float:
        return float(reply.content.strip() == example.answer.strip())
