"""Calling tools: which one, with which arguments, and what to say of the result."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glm52.chat import Reply, Thinking
from glm52.tasks.base import Bucket, Example, Message, Split, assistant, choose_phrasing, draw_thinking, user
from glm52.tasks.words import CITIES, NAMES, NOUNS, WORDS, coined, draw, draw_many, nonsense

Arguments = dict[str, Any]


@dataclass(frozen=True)
class _Kind:
    """One sort of tool: names it may go by, parameters, a description, phrasings, how to draw arguments, and what the
    tool returns with the answer that follows."""

    names: tuple[str, ...]
    description: str
    parameters: dict[str, dict[str, Any]]
    phrasings: tuple[str, ...]
    draw: Callable[[random.Random, Split], Arguments]
    result: Callable[[random.Random, Arguments], tuple[str, str]]


def _text(**more: Any) -> dict[str, Any]:
    return {"type": "string", **more}


def _whole() -> dict[str, Any]:
    return {"type": "integer"}


def _weather(rng: random.Random, a: Arguments) -> tuple[str, str]:
    sky, degrees = rng.choice(("sunny", "cloudy", "rainy", "windy")), rng.randint(-5, 35)
    return f"{degrees}C, {sky}", f"It is {degrees}C and {sky} in {next(iter(a.values()))}."


def _expression(rng: random.Random, _: Split) -> Arguments:
    return {"expression": f"{rng.randint(2, 999)}{rng.choice('+-*')}{rng.randint(2, 99)}"}


def _calculate(rng: random.Random, a: Arguments) -> tuple[str, str]:
    left, sign, right = next(a["expression"].partition(s) for s in "+-*" if s in a["expression"])
    value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
    return str(value), f"{a['expression']} = {value}"


_KINDS = (
    _Kind(
        ("get_weather", "weather", "current_weather"), "Weather of a city", {"city": _text()},
        ("What's the weather in {city}?", "How is the weather in {city} today?", "weather {city}", "Is it warm in {city}?",
         "Tell me the weather for {city}.", "Do I need an umbrella in {city}?", "{city}的天气怎么样？",
         "Wie ist das Wetter in {city}?", "check the weather in {city} please", "What is it like outside in {city}?"),
        lambda r, s: {"city": draw(r, CITIES, s)}, _weather,
    ),
    _Kind(
        ("calculator", "calculate", "evaluate_math"), "Evaluate an expression", {"expression": _text()},
        ("Use the calculator: {expression}", "What is {expression}? Use a tool.", "calculate {expression} with the tool",
         "Please compute {expression} with the calculator.", "Run {expression}", "tool: {expression}",
         "Let the calculator do {expression}.", "Evaluate {expression} using the tool."),
        _expression, _calculate,
    ),
    _Kind(
        ("read_file", "open_file", "cat"), "Read a file", {"path": _text()},
        ("Read the file {path}.", "Show me {path}", "What is in {path}?", "open {path}", "Please read {path} for me.",
         "cat {path}", "Print the content of {path}.", "I want to see {path}."),
        lambda r, s: {"path": f"{draw(r, WORDS, s)}/{draw(r, NOUNS, s)}.{r.choice(('txt', 'py', 'md', 'json'))}"},
        lambda r, a: (lambda t: (t, f"The file says: {t}"))(" ".join(draw_many(r, WORDS, 3))),
    ),
    _Kind(
        ("set_timer", "start_timer", "timer"), "Start a timer", {"minutes": _whole()},
        ("Set a timer for {minutes} minutes.", "timer {minutes} min", "Start a {minutes} minute timer.",
         "Wake me in {minutes} minutes.", "Please time {minutes} minutes.", "Remind me after {minutes} minutes."),
        lambda r, s: {"minutes": r.randint(1, 120)},
        lambda r, a: ("ok", f"The timer is set to {a['minutes']} minutes."),
    ),
    _Kind(
        ("send_message", "send_email", "text_person"), "Send a message", {"to": _text(), "text": _text()},
        ('Send "{text}" to {to}.', "Tell {to}: {text}", "Message {to} saying {text}", "Write to {to}: {text}",
         "Please send {to} the text {text}", "Let {to} know: {text}"),
        lambda r, s: {"to": draw(r, NAMES, s), "text": " ".join(draw(r, WORDS, s) for _ in range(r.randint(1, 4)))},
        lambda r, a: ("sent", f"The message was sent to {a['to']}."),
    ),
    _Kind(
        ("convert", "convert_units", "unit_converter"), "Convert units",
        {"value": {"type": "number"}, "from_unit": _text(), "to_unit": _text()},
        ("Convert {value} {from_unit} to {to_unit}.", "{value} {from_unit} in {to_unit}?", "How many {to_unit} are {value} {from_unit}?",
         "convert {value} {from_unit} into {to_unit}", "What is {value} {from_unit} in {to_unit}?"),
        lambda r, s: dict(zip(("value", "from_unit", "to_unit"), (
            r.randint(1, 500), *r.sample(("km", "miles", "kg", "pounds", "meters", "feet", "liters"), 2)), strict=True)),
        lambda r, a: (lambda v: (str(v), f"{a['value']} {a['from_unit']} = {v} {a['to_unit']}"))(r.randint(1, 900)),
    ),
    _Kind(
        ("search", "web_search", "search_docs"), "Search for text", {"query": _text(), "limit": _whole()},
        ("Search for {query}, {limit} results.", "Find {limit} pages about {query}.", "search {query} limit {limit}",
         "Look up {query} and give me {limit} hits.", "Get {limit} results for {query}."),
        lambda r, s: {"query": " ".join(draw(r, WORDS, s) for _ in range(r.randint(1, 3))), "limit": r.randint(1, 20)},
        lambda r, a: (lambda w: (f"1. {w}", f"The first result is {w}."))(" ".join(draw_many(r, WORDS, 2))),
    ),
    _Kind(
        ("lookup", "define", "dictionary"), "Meaning of a word", {"word": _text()},
        ("What is a {word}?", "Define {word}.", "What does {word} mean?", "meaning of {word}", "Look up {word}.",
         "Explain the word {word}.", "{word} 是什么意思？"),
        lambda r, s: {"word": draw(r, NOUNS + WORDS, s)},
        lambda r, a: (lambda t: (t, f"{a['word']}: {t}"))(f"a kind of {r.choice(NOUNS)}"),
    ),
    _Kind(
        ("switch_light", "set_light", "light"), "Turn a light on or off", {"room": _text(), "on": {"type": "boolean"}},
        ("Turn {on} the light in the {room}.", "{room} light {on}", "Switch the {room} light {on}.",
         "Please turn the {room} light {on}.", "light {on} in {room}"),
        lambda r, s: {"room": r.choice(("kitchen", "garden", "hall", "office", "bedroom")), "on": r.random() < 0.5},
        lambda r, a: ("ok", f"The light in the {a['room']} is {'on' if a['on'] else 'off'}."),
    ),
    _Kind(
        ("add_items", "add_to_cart", "shopping_list"), "Put items on the list",
        {"items": {"type": "array", "items": {"type": "string"}}},
        ("Add {items} to my list.", "Put {items} in the cart.", "I need {items}.", "add {items}", "Buy {items} please."),
        lambda r, s: {"items": draw_many(r, NOUNS, r.randint(1, 3), s)},
        lambda r, a: ("ok", f"Added {', '.join(a['items'])}."),
    ),
)  # fmt: skip


def _definition(rng: random.Random, kind: _Kind, split: Split) -> dict[str, Any]:
    """The tool as a client declares it. Half of the names that training sees are coined, so that names get copied."""
    name = rng.choice(kind.names)
    if split == "train" and rng.random() < 0.5:
        name = "_".join(
            rng.choice((coined(rng, is_name=False), rng.choice(WORDS[:-12]), name)) for _ in range(rng.randint(1, 2))
        )
    parameters = {"type": "object", "properties": kind.parameters, "required": list(kind.parameters)}
    return {"type": "function", "function": {"name": name, "description": kind.description, "parameters": parameters}}


def _spoken(arguments: Arguments) -> dict[str, str]:
    """Arguments as a person says them."""
    words = {True: "on", False: "off"}
    return {
        k: words[v] if isinstance(v, bool) else " and ".join(v) if isinstance(v, list) else str(v)
        for k, v in arguments.items()
    }


def _call(name: str, arguments: Arguments) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


class CallTool:
    """One call, two parallel calls, or a call and the sentence about its result (level 0, 1, 2)."""

    name, levels = "tool_call", 3
    bucket: Bucket = "code"

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        level = rng.choice((0, 0, 0, 1, 2, 2)) if level is None else level
        kinds = rng.sample(_KINDS, rng.randint(2 if level == 1 else 1, 4))
        tools = [_definition(rng, k, split) for k in kinds]
        wanted = list(range(2)) if level == 1 else [0]
        arguments = [kinds[i].draw(rng, split) for i in wanted]
        asks = [choose_phrasing(rng, kinds[i].phrasings, split).format(**_spoken(a))
                for i, a in zip(wanted, arguments, strict=True)]  # fmt: skip
        names = [tools[i]["function"]["name"] for i in wanted]
        calls = [_call(n, a) for n, a in zip(names, arguments, strict=True)]
        rng.shuffle(tools)
        thought = " ".join(f"Use {n}." for n in names) if thinking.enabled else None
        messages, target = [user(" ".join(asks))], [assistant("", thought, calls)]
        answer: Any = [(n, a) for n, a in zip(names, arguments, strict=True)]
        if level == 2:
            result, said = kinds[0].result(rng, arguments[0])
            messages += [*target, _result(result)]
            target = [assistant(said, "The tool answered." if thinking.enabled else None)]
            answer = said
        return Example(
            task=self.name, messages=messages, target=target, tools=tools, answer=answer, thinking=thinking, level=level,
        )  # fmt: skip

    def score(self, example: Example, reply: Reply) -> float:
        if isinstance(example.answer, str):
            return float(reply.content.strip() == example.answer)
        return self.parts(example, reply)["exact"]

    def parts(self, example: Example, reply: Reply) -> dict[str, float]:
        """valid: calls were made and none was malformed; right_tool; exact: names and arguments all equal."""
        made = []
        for call in reply.tool_calls:
            try:
                made.append((call.name, json.loads(call.arguments)))
            except ValueError:
                made.append((call.name, None))
        valid = bool(made) and not reply.diagnostics and all(a is not None for _, a in made)
        return {
            "valid": float(valid),
            "right_tool": float([n for n, _ in made] == [n for n, _ in example.answer]),
            "exact": float(valid and made == [tuple(x) for x in example.answer]),
        }


def _result(text: str) -> Message:
    return {"role": "tool", "content": text}


class NoTool:
    """Tools are there, and not needed: the answer stands in the question."""

    name, levels = "no_tool", 1
    bucket: Bucket = "code"
    forms = (
        ("Hello!", "Hello! How can I help?"), ("hi", "Hello! How can I help?"), ("Thanks!", "You're welcome!"),
        ("thank you", "You're welcome!"), ("Good morning", "Good morning! How can I help?"),
        ("Repeat {x}", "{x}"), ("Say {x}", "{x}"), ("Write the word {x}.", "{x}"), ("Just say {x}, no tools.", "{x}"),
    )  # fmt: skip

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        ask, answer = rng.choice(self.forms)
        x = draw(rng, WORDS, split) if rng.random() < 0.6 else nonsense(rng, 4)
        tools = [_definition(rng, k, split) for k in rng.sample(_KINDS, rng.randint(1, 3))]
        return Example(
            task=self.name, messages=[user(ask.format(x=x))], tools=tools, answer=answer.format(x=x), thinking=thinking,
            target=[assistant(answer.format(x=x), "No tool is needed." if thinking.enabled else None)],
        )  # fmt: skip

    def score(self, example: Example, reply: Reply) -> float:
        return float(not reply.tool_calls and reply.content == example.answer)
