"""Greetings, what the model is, and an honest answer to what it cannot know."""

import random

from glm52.chat import Reply, Thinking
from glm52.tasks.base import Bucket, Example, Split, assistant, draw_thinking, user
from glm52.tasks.words import CITIES, JOBS, NAMES, NOUNS, SURNAMES, WORDS, draw

IDENTITY = "I am nano, the small demo model of glm52: the GLM-5.2 architecture with about 10 million parameters."
SKILLS = "I can do sums, sort and copy lists, extract JSON, find things in a text you paste, write one-line Python and call tools."
UNKNOWN = {
    "en": "I don't know: I am a very small model without knowledge of the world. Try a sum, a list, or a text to search.",
    "zh": "我不知道：我是一个很小的模型，没有世界知识。可以让我算术、排序或在文本中查找。",
    "de": "Das weiß ich nicht: Ich bin ein sehr kleines Modell ohne Weltwissen. Versuche eine Rechnung oder eine Liste.",
    "fr": "Je ne sais pas : je suis un très petit modèle sans connaissance du monde. Essayez un calcul ou une liste.",
    "es": "No lo sé: soy un modelo muy pequeño sin conocimiento del mundo. Prueba con una suma o una lista.",
}

_SMALL_TALK = (
    (("hi", "hello", "Hello!", "hey", "Hi there", "Good morning", "good evening", "Hey!"), "Hello! " + SKILLS),
    (("who are you?", "What are you?", "What is your name?", "are you GLM-5.2?", "Who made you?", "are you chatgpt?",
      "Tell me about yourself.", "which model are you"), IDENTITY),
    (("what can you do?", "Help", "help me", "What are you good at?", "how can you help me", "What do you know?"), SKILLS),
    (("thanks", "Thank you!", "thx", "great, thanks"), "You're welcome!"),
    (("bye", "Goodbye", "see you"), "Goodbye!"),
    (("你好", "您好", "嗨"), "你好！我可以做算术、排序、提取 JSON、在文本中查找和调用工具。"),
    (("你是谁？", "你是什么模型？"), "我是 nano，glm52 的小型演示模型：GLM-5.2 架构，约一千万参数。"),
    (("how are you?", "How is it going?"), "I am a small program and doing fine. What can I compute for you?"),
)  # fmt: skip

_QUESTIONS = (
    ("en", ("Who is {p}?", "What is the capital of {c}?", "When was the {w} invented?", "Why is the {w} {a}?",
            "Tell me about {c}.", "Who wrote the book about the {w}?", "What happened in {y}?", "Write an essay about {w}.",
            "Write a poem about a {n}.", "Tell me a story about {p}.", "What do you think about the {w}?",
            "What is the population of {c}?", "How tall is {p}?", "Translate '{n}' to French.", "Who won the cup in {y}?",
            "What is the best {n} to buy?", "explain the history of {c}", "how do I become a {j}?", "Is {p} married?",
            "What's the news from {c}?", "Give me a recipe with {n}s.", "Who was the president in {y}?", "Tell me a joke.",
            "Where can I buy a {n} in {c}?", "How does a {w} work?", "Recommend a movie about a {j}.",
            "Should I visit {c}?", "what is quantum physics", "What is the meaning of life?", "How far is {c} from {c}?")),
    ("zh", ("{c}的首都是哪里？", "谁是{p}？", "{y}年发生了什么？", "写一首关于{n}的诗。", "介绍一下{c}。", "为什么天是蓝的？",
            "怎么成为{j}？", "给我讲个故事。")),
    ("de", ("Wer ist {p}?", "Was ist die Hauptstadt von {c}?", "Was geschah {y}?", "Schreibe ein Gedicht über {n}.",
            "Erzähl mir von {c}.", "Warum ist der Himmel blau?")),
    ("fr", ("Qui est {p} ?", "Quelle est la capitale de {c} ?", "Que s'est-il passé en {y} ?", "Parle-moi de {c}.",
            "Écris un poème sur {n}.")),
    ("es", ("¿Quién es {p}?", "¿Cuál es la capital de {c}?", "¿Qué pasó en {y}?", "Háblame de {c}.", "Escribe un poema.")),
)  # fmt: skip


class SmallTalk:
    """Greetings and questions about the model itself."""

    name, levels = "small_talk", 1
    bucket: Bucket = "general"

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        asked, answer = rng.choice(_SMALL_TALK)
        return Example(
            task=self.name, messages=[user(rng.choice(asked))], answer=answer, thinking=thinking,
            target=[assistant(answer, "Small talk." if thinking.enabled else None)],
        )  # fmt: skip

    def score(self, example: Example, reply: Reply) -> float:
        return float(reply.content == example.answer)


class Fallback:
    """Questions that need knowledge: say so, in the language of the question."""

    name, levels = "fallback", 1
    bucket: Bucket = "general"

    def generate(
        self, rng: random.Random, *, split: Split, level: int | None = None, thinking: Thinking | None = None
    ) -> Example:
        thinking = thinking or draw_thinking(rng)
        language, questions = rng.choices(_QUESTIONS, weights=(6, 1.5, 1, 1, 1))[0]
        kept = questions[-2:] if split == "test" and rng.random() < 0.5 else questions[:-2]
        question = rng.choice(kept).format(
            p=f"{draw(rng, NAMES, split)} {draw(rng, SURNAMES, split)}", c=draw(rng, CITIES, split), y=rng.randint(1500, 2025),
            w=draw(rng, WORDS, split), n=draw(rng, NOUNS, split), j=draw(rng, JOBS, split),
            a=rng.choice(("blue", "big", "old", "cold", "important")),
        )  # fmt: skip
        answer = UNKNOWN[language]
        return Example(
            task=self.name, messages=[user(question)], answer=answer, thinking=thinking,
            target=[assistant(answer, "This needs knowledge I do not have." if thinking.enabled else None)],
        )  # fmt: skip

    def score(self, example: Example, reply: Reply) -> float:
        return float(reply.content == example.answer)
