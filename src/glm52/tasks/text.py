"""Working on text that stands in the prompt: copying, reversing, sorting, counting letters, extracting JSON, tables."""

import json
import random
from typing import Any

from glm52.chat import Reply, Thinking
from glm52.tasks.arithmetic import last_number
from glm52.tasks.base import Bucket, Example, Split, assistant, choose_phrasing, draw_thinking, user
from glm52.tasks.words import (
    CITIES,
    COLORS,
    JOBS,
    NAMES,
    NOUNS,
    SURNAMES,
    WORDS,
    coined,
    draw,
    draw_many,
    nonsense,
)

_OFF = Thinking(enabled=False)


class _Text:
    """Tasks whose answer is the whole content."""

    bucket: Bucket = "general"
    levels = 1

    def score(self, example: Example, reply: Reply) -> float:
        return float(reply.content.strip() == str(example.answer))


def _chunk(rng: random.Random, length: int, split: Split) -> str:
    """Something to copy: words, digits, letters, names or a mixture; never the same twice."""
    kind = rng.randrange(5)
    if kind == 0:
        return " ".join(draw(rng, WORDS, split) for _ in range(length))
    if kind == 1:
        return str(rng.randrange(10 ** (length - 1), 10**length))
    if kind == 2:
        return nonsense(rng, length)
    if kind == 3:
        return " ".join(nonsense(rng, rng.randint(2, 4)) for _ in range(max(1, length // 2)))
    return ", ".join(rng.choice((NAMES, CITIES, NOUNS))[rng.randrange(18)] for _ in range(max(1, length // 2)))


class Copy(_Text):
    """Repeat what is quoted; level sets the length."""

    name, levels = "copy", 4
    phrasings = (
        'Repeat: "{x}"', "Say this back: {x}", "Copy this exactly: {x}", "repeat after me: {x}", "Echo {x}",
        "Write {x}", 'Please repeat "{x}".', "Copy: {x}", "Print this text: {x}", "Type out: {x}",
        "Return exactly this: {x}", "重复：{x}", "Répète : {x}", "Wiederhole: {x}", "Say the following: {x}",
    )  # fmt: skip

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        level = rng.randrange(self.levels) if level is None else level
        thinking = thinking or (_OFF if rng.random() < 0.7 else draw_thinking(rng))
        x = _chunk(rng, rng.randint(2, 4) + 3 * level, split)
        question, answer = choose_phrasing(rng, self.phrasings, split).format(x=x), x
        if rng.random() < 0.25:
            times = rng.choice((2, 3))
            question = f"Say {x} {'twice' if times == 2 else 'three times'}."
            answer = " ".join([x] * times)
        reasoning = "Copy the text." if thinking.enabled else None
        return Example(
            task=self.name, messages=[user(question)], target=[assistant(answer, reasoning)], answer=answer,
            thinking=thinking, level=level,
        )  # fmt: skip


class Reverse(_Text):
    """Spell a word backwards, or reverse a list."""

    name, levels = "reverse", 3
    phrasings = (
        "Reverse the word {x}.", "Spell {x} backwards.", "What is {x} backwards?", "reverse {x}", "{x} in reverse?",
        "Write {x} from back to front.", "Turn {x} around.", "Please reverse: {x}", "把 {x} 倒过来写", "backwards: {x}",
        "Flip the letters of {x}.",
    )  # fmt: skip

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        level = rng.randrange(self.levels) if level is None else level
        word = nonsense(rng, rng.randint(3, 4) + 2 * level) if rng.random() < 0.6 else draw(rng, WORDS, split)
        trace = f"{' '.join(word)}\n{' '.join(word[::-1])}"
        return Example(
            task=self.name, messages=[user(choose_phrasing(rng, self.phrasings, split).format(x=word))],
            target=[assistant(word[::-1], trace if thinking.enabled else None)], answer=word[::-1], thinking=thinking,
            level=level,
        )  # fmt: skip


class Sort(_Text):
    """Sort numbers or words, by taking the least again and again."""

    name, levels = "sort", 3
    phrasings = (
        "Sort: {x}", "Sort these: {x}", "Put in order: {x}", "sort {x}", "Order these from smallest to largest: {x}",
        "Arrange in ascending order: {x}", "Please sort {x}.", "排序：{x}", "Sort the list {x}", "ascending: {x}",
        "Give me {x} sorted.",
    )  # fmt: skip

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        level = rng.randrange(self.levels) if level is None else level
        count = rng.randint(3, 4) + 2 * level
        values: list[Any] = (
            rng.sample(range(100), count) if rng.random() < 0.7 else draw_many(rng, WORDS, min(count, 6))
        )
        answer = ", ".join(map(str, sorted(values)))
        return Example(
            task=self.name, messages=[user(choose_phrasing(rng, self.phrasings, split).format(x=", ".join(map(str, values))))],
            target=[assistant(answer, f"The least first: {answer}" if thinking.enabled else None)], answer=answer,
            thinking=thinking, level=level,
        )  # fmt: skip


class CountLetters(_Text):
    """How often a letter stands in a word, by walking through it."""

    name, levels = "count_letters", 1
    phrasings = (
        "How many {c}'s are in {x}?", "Count the letter {c} in {x}.", "How often does {c} appear in {x}?",
        "how many times is {c} in {x}", "Number of {c} in {x}?", "In {x}, how many {c}'s?", "count {c} in {x}",
        "How many times does the letter {c} occur in the word {x}?", "{x} 里有几个 {c}？", "{x}: how many {c}?",
    )  # fmt: skip

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        word = draw(rng, WORDS, split) if rng.random() < 0.5 else nonsense(rng, rng.randint(4, 8), "abcders")
        letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("aeiourst")
        count, steps = 0, []
        for c in word:
            count += c == letter
            steps.append(f"{c} {count}" if c == letter else c)
        return Example(
            task=self.name, messages=[user(choose_phrasing(rng, self.phrasings, split).format(c=letter, x=word))],
            target=[assistant(str(count), ", ".join(steps) if thinking.enabled else None)], answer=count, thinking=thinking,
        )  # fmt: skip

    def score(self, example: Example, reply: Reply) -> float:
        return float(last_number(reply.content) == str(example.answer))


_FIELDS = ("name", "age", "city", "job", "email", "color", "price", "item", "quantity")


def _record(rng: random.Random, split: Split) -> dict[str, Any]:
    first = draw(rng, NAMES, split)
    return {
        "name": first if rng.random() < 0.5 else f"{first} {draw(rng, SURNAMES, split)}",
        "age": rng.randint(18, 90),
        "city": draw(rng, CITIES, split),
        "job": draw(rng, JOBS, split),
        "email": f"{first.lower()}{rng.randint(1, 99)}@{nonsense(rng, 4)}.com",
        "color": draw(rng, COLORS, split),
        "price": rng.choice((rng.randint(1, 500), round(rng.randint(100, 9999) / 100, 2))),
        "item": draw(rng, NOUNS, split),
        "quantity": rng.randint(1, 40),
    }


# The last two are kept for the test split.
_SENTENCES = (
    (("name", "item"), "Give the {item} to {name}."),
    (("name", "item", "quantity"), "Bring {name} {quantity} {item}s."),
    (("name", "item", "city"), "Ask {name} in {city} about the {item}."),
    (("name", "item", "city", "quantity"), "Please mail {quantity} {item}s to {name}, {city}."),
    (("name", "city"), "Write to {name} in {city}."),
    (("name", "city", "age"), "Meet {name} ({age}) in {city}."),
    (("name", "job"), "Tell the {job}, {name}."),
    (("name", "price"), "Refund {price} to {name}."),
    (("item", "color", "city"), "Ship the {color} {item} to {city}."),
    (("name", "item", "price", "quantity"), "For {price}, {name} bought {quantity} {item}s."),
    (("name", "item", "price", "quantity"), "{name} bought {quantity} {item}s and paid {price}."),
    (("name", "item", "price", "quantity"), "The {quantity} {item}s cost {name} {price}."),
    (("item", "price", "quantity"), "Price {price}, {quantity} {item}s."),
    (("name", "price", "quantity"), "{name} gave {price} to {quantity} people."),
    (("name", "price", "item"), "{name} got {price} for the {item}."),
    (("name", "age", "quantity"), "{name}, {age}, has {quantity} children."),
    (("age", "name"), "At {age}, {name} retired."),
    (("city", "name"), "In {city} lives {name}."),
    (("email", "name"), "Mail {email} if you look for {name}."),
    (("name", "item", "price"), "{name} sold the {item} for {price}."),
    (("name", "item"), "{name} lost a {item} yesterday."),
    (("name", "item"), "The {item} belongs to {name}."),
    (("name", "quantity", "item"), "{quantity} {item}s were delivered to {name}."),
    (("item", "quantity"), "We have {quantity} {item}s in stock."),
    (("item", "quantity", "city"), "{quantity} {item}s were shipped to {city}."),
    (("item", "quantity", "price"), "{quantity} {item}s for {price} in total."),
    (("item", "price"), "Each {item} is {price} dollars."),
    (("item", "color"), "I am looking for a {color} {item}."),
    (("item", "color", "quantity"), "Please pack {quantity} {color} {item}s."),
    (("name", "item", "color"), "{name} wants the {item} in {color}."),
    (("name", "city"), "{name} moved to {city} last year."),
    (("name", "city"), "Call {name} from {city}."),
    (("city", "job"), "In {city} they need a {job}."),
    (("name", "job", "age"), "The {job} {name} is {age}."),
    (("name", "job", "email"), "{name}, {job}, {email}"),
    (("name", "email", "age"), "User {name} <{email}>, age {age}"),
    (("name", "quantity"), "{name} won {quantity} times."),
    (("name", "price"), "{name} owes {price} euros."),
    (("name", "price", "city"), "{name} spent {price} in {city}."),
    (("name", "color", "item"), "A {color} {item} was found by {name}."),
    (("name", "city", "item"), "From {city}, {name} brought a {item}."),
    (("name", "city", "quantity", "item"), "{name} in {city} returned {quantity} {item}s."),
    (("name", "age", "job", "city", "email"), "name: {name}; age: {age}; job: {job}; city: {city}; email: {email}"),
    (("item", "color", "price", "quantity"), "item {item}, color {color}, price {price}, quantity {quantity}"),
    (("name", "item", "price"), "Invoice for {name}: one {item}, {price}."),
    (("name", "city", "price"), "The trip of {name} to {city} cost {price}."),
    (("name", "age", "city"), "{name}, {age}, lives in {city}."),
    (("name", "age", "city", "job"), "{name} is a {age} year old {job} from {city}."),
    (("name", "job", "city"), "My name is {name} and I work as a {job} in {city}."),
    (("name", "age"), "{name} is {age} years old."),
    (("name", "email"), "You can reach {name} at {email}."),
    (("item", "price", "quantity"), "Order: {quantity} x {item} at {price} each."),
    (("name", "item", "quantity"), "{name} ordered {quantity} {item}s."),
    (("item", "color", "price"), "The {color} {item} costs {price} dollars."),
    (("name", "city", "email"), "Contact {name} ({city}): {email}"),
    (("name", "job"), "{name} works as a {job}."),
    (("name", "age", "color"), "{name} turned {age} and likes {color}."),
    (("item", "price"), "A {item} for {price} euros, please."),
    (("name", "item", "city"), "Send the {item} to {name} in {city}."),
    (("name", "item", "price", "quantity"), "{name} paid {price} for {quantity} {item}s."),
)


_PEOPLE = ("{name}", "{name}", "{name} from {city}", "{name}, {age},", "the {job} {name}", "{name} ({email})")
_GOODS = ("{quantity} {item}s", "{quantity} {item}s", "{quantity} {color} {item}s", "the {item}", "a {color} {item}",
          "{quantity} x {item}")  # fmt: skip
_VERBS = ("bought", "sold", "took", "got", "ordered", "wants", "needs", "found", "lost", "brought", "returned", "chose", "saw",
          "received", "offered", "gave", "asked", "spent", "lent", "borrowed", "owes", "saved", "keeps", "swapped")  # fmt: skip
_AMOUNTS = ("{price}", "{price}", "{price} dollars", "{price} euros")
_JOINTS = ("for", "at", "with", "on", "against", "worth", "over", "of", "to", "and")
_ORDERS = ("Give", "Bring", "Mail", "Hand", "Show", "Sell", "Take", "Lend", "Return", "Carry", "Offer", "Post")


def _composed(rng: random.Random) -> tuple[tuple[str, ...], str]:
    """A form put together at random; some of its verbs are coined, so that what a number is shows in its place."""
    verb = coined(rng, is_name=False) + "ed" if rng.random() < 0.3 else rng.choice(_VERBS)
    who, what, amount, joint = (rng.choice(x) for x in (_PEOPLE, _GOODS, _AMOUNTS, _JOINTS))
    order = coined(rng, is_name=True) if rng.random() < 0.3 else rng.choice(_ORDERS)
    form = rng.choice((
        f"{who} {verb} {amount} {joint} {what}.", f"{who} {verb} {what} {joint} {amount}.",
        f"{who} {verb} {what}.", f"{amount} {joint} {what}, {verb} by {who}.", f"{what} {verb} {who}.",
        f"{order} {what} to {who}.", f"{order} {what} {rng.choice(_JOINTS)} {who} near {{city}}.",
        f"{order} {who} {what} {joint} {amount}.", f"{order} {what} to {who} {joint} {{city}}.",
    ))  # fmt: skip
    if form.count("{city}") > 1:
        form = form.replace("{name} from {city}", "{name}")
    return tuple(k for k in _FIELDS if f"{{{k}}}" in form), form[0].upper() + form[1:]


class ExtractJSON(_Text):
    """Fields of a sentence as compact JSON."""

    name, levels = "json", 1
    phrasings = (
        "Extract {k} as JSON: {x}", "{x}\nGive me {k} as JSON.", "Return JSON with {k} from this text: {x}",
        "Text: {x}\nJSON with keys {k}:", "{x} -> JSON ({k})", "extract {k} from: {x} as json",
        "Convert to JSON with the keys {k}: {x}", "Turn this into JSON: {x} Keys: {k}", "JSON please ({k}): {x}",
        "From the text below extract {k} and answer in JSON.\n{x}", "Parse: {x}\nFields: {k}\nOutput JSON.",
        "Read this: {x} Now write {k} as a JSON object.", "Which {k}? {x} Answer with JSON.", "JSON ({k}) of: {x}",
        "{k} as JSON, please. {x}", "Extrais {k} en JSON : {x}", "Gib {k} als JSON aus: {x}", "以 JSON 输出 {k}：{x}",
        "{x}\n用 JSON 写出 {k}。", "JSON con {k}: {x}", "Make a JSON object with {k} from {x}",
        "Here is a note: {x}\nList {k} in JSON.", "{x}\n\n{k}: as JSON", "parse {k} out of {x}", "提取 {k}，输出 JSON：{x}",
    )  # fmt: skip

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        keep = _SENTENCES[-2:] if split == "test" and rng.random() < 0.5 else _SENTENCES[:-2]
        keys, form = rng.choice(keep)
        if split == "train" and rng.random() < 0.6:
            keys, form = _composed(rng)
        record = _record(rng, split)
        text = form.format(**record)
        asked = list(keys)
        if rng.random() < 0.4:
            asked = rng.sample(asked, rng.randint(1, len(asked)))
        if rng.random() < 0.25:
            other = rng.choice([s for s in _SENTENCES[:-2] if not set(s[0]) & set(keys)] or [_SENTENCES[0]])
            if not set(other[0]) & set(keys):
                text = rng.choice((f"{text} {other[1].format(**record)}", f"{other[1].format(**record)} {text}"))
        answer = json.dumps({k: record[k] for k in asked})
        question = choose_phrasing(rng, self.phrasings, split).format(k=", ".join(asked), x=text)
        reasoning = "\n".join(f"{k}: {record[k]}" for k in asked) if thinking.enabled else None
        return Example(
            task=self.name, messages=[user(question)], target=[assistant(answer, reasoning)],
            answer={k: record[k] for k in asked}, thinking=thinking,
        )  # fmt: skip

    def score(self, example: Example, reply: Reply) -> float:
        try:
            return float(json.loads(reply.content) == example.answer)
        except ValueError:
            return 0.0


class Table(_Text):
    """One cell of a small table."""

    name, levels = "table", 2
    phrasings = (
        "{t}\nWhat is the {c} of {r}?", "Table:\n{t}\n{c} of {r}?", "{t}\nFind the {c} for {r}.", "{t}\n{r}: {c}?",
        "Look at this table.\n{t}\nWhich {c} does {r} have?", "{t}\nTell me {r}'s {c}.", "Given\n{t}\nwhat {c} has {r}",
        "What is the {c} of {r} in this table?\n{t}", "{t}\nPlease read off the {c} of {r}.", "{t}\n{r} {c}",
        "Using the table\n{t}\ngive the {c} of {r}.",
    )  # fmt: skip

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        level = rng.randrange(self.levels) if level is None else level
        names = draw_many(rng, NAMES, rng.randint(2, 3) + 3 * level, split)
        columns = rng.sample(("age", "city", "job", "color", "quantity"), rng.randint(2, 3))
        rows = {n: _record(rng, split) for n in names}
        lines = ["| name | " + " | ".join(columns) + " |"]
        lines += [f"| {n} | " + " | ".join(str(rows[n][c]) for c in columns) + " |" for n in names]
        who, column = rng.choice(names), rng.choice(columns)
        answer = str(rows[who][column])
        row = lines[1 + names.index(who)]
        return Example(
            task=self.name, messages=[user(choose_phrasing(rng, self.phrasings, split).format(t="\n".join(lines), c=column, r=who))],
            target=[assistant(answer, row if thinking.enabled else None)], answer=answer, thinking=thinking, level=level,
        )  # fmt: skip


class Constrain(_Text):
    """Obey a form: upper case, lower case, first or last word, joined by something."""

    name = "constrain"
    forms = (
        ("Write {x} in upper case.", str.upper), ("{x} in capital letters", str.upper),
        ("Write {x} in lower case.", str.lower), ("What is the first word of: {x}?", lambda s: s.split()[0]),
        ("What is the last word of: {x}?", lambda s: s.split()[-1]), ("Join with dashes: {x}", lambda s: s.replace(" ", "-")),
        ("How many words: {x}?", lambda s: str(len(s.split()))), ("Second word of {x}?", lambda s: s.split()[1]),
        ("Put commas between the words: {x}", lambda s: s.replace(" ", ", ")),
        ("Capitalize each word: {x}", str.title),
    )  # fmt: skip

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        form, change = rng.choice(self.forms)
        text = " ".join(draw(rng, WORDS, split) for _ in range(rng.randint(2, 5)))
        answer = change(text)
        return Example(
            task=self.name, messages=[user(form.format(x=text))],
            target=[assistant(answer, "Follow the form." if thinking.enabled else None)], answer=answer, thinking=thinking,
        )  # fmt: skip
