"""Finding something that was said: pairs in a list, and a needle sentence in filler of a given length."""

import random
from collections.abc import Callable

from glm52.chat import Reply, Thinking
from glm52.tasks.base import Bucket, Example, Message, Split, assistant, choose_phrasing, draw_thinking, user
from glm52.tasks.words import CITIES, COLORS, JOBS, NAMES, NOUNS, WORDS, draw, draw_many, nonsense

_OFF = Thinking(enabled=False)


class _Recall:
    bucket: Bucket = "general"

    def score(self, example: Example, reply: Reply) -> float:
        return float(str(example.answer) in reply.content.replace(",", " ").replace(".", " ").split())


class KeyValue(_Recall):
    """The value of one key among 2 to 32; level doubles the number."""

    name, levels = "key_value", 5
    phrasings = (
        "{p}\nWhat is {k}?", "{p}\n{k}?", "{p}\nWhich value has {k}?", "Given {p}\nwhat is {k}?", "{p}\nGive me {k}.",
        "Remember:\n{p}\nNow: {k}?", "{p}\nvalue of {k}", "Look up {k}:\n{p}", "{p}\nRecall {k}.", "{p}\n{k} =",
        "What is {k} here?\n{p}",
    )  # fmt: skip

    def generate(
        self,
        rng: random.Random,
        *,
        split: Split,
        level: int | None = None,
        thinking: Thinking | None = None,
        asks: int = 1,
    ) -> Example:
        """``asks``: how many questions about the same list, one after the other; the last one is scored."""
        level = rng.randrange(self.levels) if level is None else level
        thinking = thinking or (_OFF if rng.random() < 0.6 else draw_thinking(rng))
        count = 2 << level
        keys = draw_many(rng, rng.choice((NAMES, CITIES, WORDS, NOUNS)), min(count, 32), split)
        if rng.random() < 0.3:
            keys = list(dict.fromkeys(nonsense(rng, rng.randint(2, 4)) for _ in range(count)))
        makers: tuple[Callable[[], str], ...] = (
            lambda: str(rng.randint(10, 99999)),
            lambda: nonsense(rng, 4),
            lambda: draw(rng, WORDS, split),
        )
        make = rng.choice(makers)
        values = [make() for _ in keys]
        joint = rng.choice((": ", " = ", " is ", " -> "))
        pairs = rng.choice(("\n", ", ", "; ")).join(f"{k}{joint}{v}" for k, v in zip(keys, values, strict=True))
        turns = []
        for n in range(asks):
            at = rng.randrange(len(keys))
            phrasing = choose_phrasing(rng, self.phrasings, split)
            question = phrasing.format(p=pairs, k=keys[at]) if n == 0 else f"{keys[at]}?"
            turns.append((question, f"{keys[at]}{joint}{values[at]}", values[at]))
        return _asked(self.name, turns, thinking, level)


def _asked(task: str, turns: list[tuple[str, str, str]], thinking: Thinking, level: int) -> Example:
    """Turns of (question, reasoning, answer): all but the last question are part of the target."""
    target: list[Message] = []
    for n, (question, reasoning, answer) in enumerate(turns):
        if n:
            target.append(user(question))
        target.append(assistant(answer, reasoning if thinking.enabled else None))
    if len(turns) > 1:  # every turn's reasoning stays in the prompt
        thinking = Thinking(enabled=thinking.enabled, effort=thinking.effort, clear=False)
    return Example(
        task=task, messages=[user(turns[0][0])], target=target, answer=turns[-1][2], thinking=thinking, level=level
    )


_FILLER = (
    "{n} walked to the {w} and bought a {c} {o}.", "The {w} near {t} was closed in the {v}.", "{n} is a {j} from {t}.",
    "Every {v} the {j} looks at the {w}.", "A {c} {o} lay on the {w}.", "{n} and {m} talked about the {w}.",
    "Nobody in {t} had seen such a {o} before.", "It rained and the {w} turned {c}.", "{n} wrote a letter to a {j}.",
    "The {j} gave {n} a {o}.", "They say the {w} of {t} is old.", "{m} lost a {o} near the {w}.",
    "There were {d} {o}s on the table.", "{n} counted {d} steps to the {w}.", "The train to {t} leaves in the {v}.",
)  # fmt: skip


def filler_sentence(rng: random.Random, split: Split) -> str:
    n, m = draw_many(rng, NAMES, 2)
    return rng.choice(_FILLER).format(
        n=n, m=m, w=draw(rng, WORDS, split), c=rng.choice(COLORS), o=draw(rng, NOUNS, split), t=draw(rng, CITIES, split),
        v=rng.choice(("morning", "evening", "summer", "winter")), j=draw(rng, JOBS, split), d=rng.randint(2, 99),
    )  # fmt: skip


class Needle(_Recall):
    """A secret code in filler; the length in characters doubles with the level, from about 120 to about 4,000 tokens."""

    name, levels = "needle", 6
    needles = (
        "The secret code of {k} is {v}.", "Remember that the code for {k} is {v}.", "{k}'s code is {v}.",
        "The password of {k} is {v}.", "Note: the number of {k} is {v}.", "The key for {k} is {v}.",
    )  # fmt: skip
    phrasings = (
        "{t}\n\nWhat is the {w} of {k}?", "{t}\n\nTell me the {w} of {k}.", "{t}\n\nWhich {w} was given for {k}?",
        "Read this text.\n{t}\n\nWhat is the {w} of {k}?", "{t}\n\n{w} of {k}?", "{t}\n\nfind the {w} for {k}",
        "I will ask about {k}.\n{t}\n\nSo what is the {w} of {k}?", "{t}\n\nPlease recall the {w} of {k}.",
        "{t}\n\nDo you remember the {w} of {k}?", "{t}\n\nGive the {w} of {k} only.", "{t}\n\nWhat {w} does {k} have?",
    )  # fmt: skip
    sizes = (360, 720, 1500, 3200, 6500, 14100)

    def generate(
        self,
        rng: random.Random,
        *,
        split: Split,
        level: int | None = None,
        thinking: Thinking | None = None,
        asks: int = 1,
    ) -> Example:
        """``asks``: how many of the needles are asked for, one after the other; the last one is scored."""
        level = rng.randrange(3) if level is None else level
        thinking = thinking or (_OFF if rng.random() < 0.6 else draw_thinking(rng))
        keys = draw_many(rng, CITIES + NAMES, max(asks, rng.randint(1, 2 + level)), split)
        needle = rng.choice(self.needles)
        word = next(w for w in ("code", "password", "number", "key") if w in needle)
        values = [str(rng.randint(1000, 99999)) for _ in keys]
        wanted = self.sizes[level] * (rng.uniform(0.4, 0.9) if split == "train" else 1.0)
        sentences, length = [], 0
        while length < wanted:
            sentences.append(filler_sentence(rng, split))
            length += len(sentences[-1]) + 1
        for k, v in zip(keys, values, strict=True):
            sentences.insert(rng.randrange(len(sentences) + 1), needle.format(k=k, v=v))
        turns = []
        for n, (k, v) in enumerate(list(zip(keys, values, strict=True))[:asks]):
            phrasing = choose_phrasing(rng, self.phrasings, split)
            question = phrasing.format(t=" ".join(sentences), w=word, k=k) if n == 0 else f"{word} of {k}?"
            turns.append((question, needle.format(k=k, v=v), v))
        return _asked(self.name, turns, thinking, level)


class Passage(_Recall):
    """A question about one of a few facts."""

    name, levels = "passage", 1
    facts = (
        ("{n} lives in {v}.", "Where does {n} live?", CITIES), ("{n} works as a {v}.", "What is {n}'s job?", JOBS),
        ("{n} likes {v}.", "Which color does {n} like?", COLORS), ("{n} carries a {v}.", "What does {n} carry?", NOUNS),
        ("{n} was born in {v}.", "Where was {n} born?", CITIES), ("{n} owns a {v}.", "What does {n} own?", NOUNS),
    )  # fmt: skip

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        names = draw_many(rng, NAMES, rng.randint(2, 4), split)
        told = [(n, *rng.choice(self.facts)) for n in names]
        values = [draw(rng, f[3], split) for f in told]
        sentences = [f[1].format(n=f[0], v=v) for f, v in zip(told, values, strict=True)]
        at = rng.randrange(len(names))
        return Example(
            task=self.name, messages=[user(" ".join(sentences) + "\n" + told[at][2].format(n=names[at]))],
            target=[assistant(values[at], sentences[at] if thinking.enabled else None)], answer=values[at],
            thinking=thinking,
        )  # fmt: skip
