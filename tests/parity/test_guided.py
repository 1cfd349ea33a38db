"""The great invariant where a guide stands between logits and choice: with budgets and grammars, too, greedy output is
what a guide makes of the whole reply computed afresh for every token, whatever the batch, preemption and drafts."""

import json
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from glm52.chat import parse_reply
from glm52.engine import Engine, SamplingParams, Sequence, generate
from glm52.engine.guide import Guide
from glm52.engine.sampling import processed
from glm52.grammar import Grammar
from glm52.hub import NANO
from glm52.session import Session
from tests.scripted import TOKENIZER, ScriptedModel, random_logits

TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "required": ["city"], "additionalProperties": False, "properties": {
            "city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 10},
            "units": {"enum": ["c", "f"]}}}}},
    {"type": "function", "function": {"name": "stop_all"}},
]  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "boolean"}}},
          "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
GRAMMARS = [
    None, Grammar.tool_calls(TOOLS), Grammar.tool_calls(TOOLS, "required", parallel=False), Grammar.tool_calls(TOOLS, "named", name="stop_all"),
    Grammar.tool_calls(TOOLS, "none"), Grammar.json_schema(SCHEMA), Grammar.regex("[A-Z][a-z]{2,20}"), Grammar.choice(["yes", "no"]),
]  # fmt: skip
FAVOUR = {
    "</tool_call>": 6.0,
    "</arg_value>": 6.0,
    "</arg_key>": 3.0,
    "]": 4.0,
    "<|user|>": 6.0,
    "<tool_call>": 4.0,
    ".": 3.0,
}
SAY = random_logits(7, FAVOUR)


def cases() -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(0)
    out = []
    for i in range(24):
        text = " ".join(rng.choice(("one", "two", "three", "four")) for _ in range(rng.randint(10, 35)))
        end = rng.choice(("<think>", "<think>", "<think></think>"))
        params = SamplingParams(temperature=0.0, max_tokens=rng.randint(24, 56), grammar=GRAMMARS[i % len(GRAMMARS)],
                                thinking_budget=rng.choice((None, 0, 3, 12)), presence_penalty=rng.choice((0.0, 0.5)))  # fmt: skip
        out.append((TOKENIZER.encode(f"<|user|>{text}<|assistant|>{end}"), params))
    return out


def afresh(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    """Greedy tokens, each from a guide that has just read all that was said before it."""
    output: list[int] = []
    while len(output) < params.max_tokens:
        matcher = engine.matchers.new(params.grammar) if params.grammar else None
        guide = Guide(params, prompt, params.max_tokens, engine._eos, engine._marks, matcher)
        for token in output:
            guide.follow(token)
        if guide.is_complete:
            break
        tokens = prompt + output
        logits = processed(SAY(tokens[-1], len(tokens) - 1), params, tokens, len(prompt))
        token = int(np.argmax(guide.shape(logits)))
        if token in engine._eos:
            break
        output.append(token)
    return output


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[int], SamplingParams, list[int]]]:
    engine = ScriptedModel(SAY).engine()
    return [(prompt, params, afresh(engine, prompt, params)) for prompt, params in cases()]


def test_greedy_output_is_identical_over_random_schedules(expected: Any) -> None:
    total: Counter[str] = Counter()
    for seed in range(60):
        rng = random.Random(seed)
        max_seqs = rng.randint(1, 6)
        engine = ScriptedModel(SAY, accuracy=rng.choice((0.3, 0.9, 1.0))).engine(
            rng.choice((0, 1, 3, 5)), num_rows=rng.choice((100, 100, 512)), page_size=rng.choice((1, 4)),
            max_seqs=max_seqs, max_batch_tokens=max_seqs + rng.choice((0, 5, 64)),
        )  # fmt: skip
        todo = rng.sample(expected, 8)
        living: list[tuple[Sequence, list[int]]] = []
        while todo or engine.has_work:
            if todo and rng.random() < 0.5:
                prompt, params, output = todo.pop()
                living.append((engine.submit(prompt, params), output))
            engine.step()
            engine.check()
        for seq, output in living:
            assert (seq.output, seq.finish_reason in ("stop", "length")) == (output, True)
        total.update(
            preemptions=engine.scheduler.num_preemptions,
            drafted=sum(engine.stats.drafted),
            accepted=sum(engine.stats.accepted),
        )
    assert total["preemptions"] > 10 and 0.4 < total["accepted"] / total["drafted"] < 1


@pytest.mark.parametrize(
    "grammar",
    [Grammar.regex("[abc]{2}(xy|[de])"), Grammar.tool_calls(TOOLS, "required", parallel=False)],
    ids=["regex", "calls"],
)
def test_samples_of_what_is_allowed_do_not_depend_on_drafts(grammar: Grammar) -> None:
    say = random_logits(5, dict.fromkeys(("Rome", "a", "b", "</arg_value>", "</tool_call>"), 3.0))
    prompt, outputs = TOKENIZER.encode("<|user|>x<|assistant|><think>"), {}
    for num_drafts in (0, 3):
        engine = ScriptedModel(say, accuracy=0.6).engine(num_drafts, max_seqs=64)
        seqs = [
            engine.submit(
                prompt, SamplingParams(temperature=1.5, seed=i, max_tokens=30, grammar=grammar, thinking_budget=1)
            )
            for i in range(200)
        ]
        while engine.has_work:
            engine.step()
        outputs[num_drafts] = [s.output for s in seqs]
        assert 0 < sum(engine.stats.accepted) < sum(engine.stats.drafted) or not num_drafts
    assert outputs[0] == outputs[3] and len({tuple(o) for o in outputs[0]}) > 10


@pytest.fixture(scope="module")
def sessions() -> list[Session]:
    return [Session.open(NANO, context=2048, num_drafts=n) for n in (0, 3)]


@pytest.mark.parametrize("choice", ["auto", "required", "schema", "budget"])
def test_the_shipped_model_is_held_the_same_with_and_without_drafts(sessions: list[Session], choice: str) -> None:
    tools = None if choice == "schema" else TOOLS
    grammar = {"budget": None, "schema": Grammar.json_schema(SCHEMA)}.get(choice, Grammar.tool_calls(TOOLS, choice))
    params = SamplingParams(temperature=0.0, max_tokens=200, thinking_budget=6, grammar=grammar)
    for question in ("What is the weather in Rome for 3 days?", "What is 347+589?", "Stop everything."):
        prompt = sessions[0].template.render_ids(TOKENIZER, [{"role": "user", "content": question}], tools)
        plain, drafted = (generate(s.engine, [prompt], params)[0] for s in sessions)
        assert plain.output == drafted.output and plain.thinking_closed == drafted.thinking_closed
        text = TOKENIZER.decode(plain.output)
        assert plain.num_reasoning <= 12 and "</think>" in text
        reply = parse_reply(text, TOOLS, thinking=True)
        if choice == "schema" and plain.finish_reason == "stop":
            assert set(json.loads(reply.content)) == {"a", "b"}
        elif choice == "required" and plain.finish_reason == "stop":
            assert reply.tool_calls and not reply.diagnostics and not reply.content
