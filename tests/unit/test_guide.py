"""Thinking budgets, loops and armed grammars, without an engine and with one that a script speaks through."""

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm52.engine import AsyncEngine, Engine, Repetition, SamplingParams, generate
from glm52.engine.guide import LOOK_EVERY, MARGIN, Guide, Limits, Marks, is_loop
from glm52.errors import RequestError
from glm52.grammar import Grammar
from tests.fixtures import random_model, tiny_config
from tests.scripted import END_THINK, EOS, THINK, TOKENIZER, ScriptedModel, always, random_logits

PROMPT = TOKENIZER.encode("<|user|>x<|assistant|><think>")
SENTENCES = random_logits(1, dict.fromkeys((".", ".\n", "\n"), 4.0))


@given(budget=st.integers(0, 10**6), max_tokens=st.integers(1, 10**6))
def test_limits_leave_room_for_an_answer(budget: int, max_tokens: int) -> None:
    limits = Limits.of(budget, max_tokens)
    assert 0 <= limits.soft <= budget and limits.soft <= limits.hard <= budget + MARGIN
    if max_tokens >= 2:
        assert limits.hard + 1 + min(1024, max(1, max_tokens // 4)) <= max_tokens
    assert limits.closes(limits.hard, at_end=False) == "hard"
    assert budget == 0 or max_tokens < 2000 + budget or limits == Limits(budget, budget + min(MARGIN, budget))


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ("<think>", True),
        ("<think></think>", False),
        ("x", False),
        ("<think>a</think>b<think>half", True),
        ("</think>", False),
    ],
)
def test_the_prompt_says_whether_the_reply_begins_inside_its_thinking(text: str, is_open: bool) -> None:
    marks = Marks.of(TOKENIZER)
    assert marks is not None and marks.is_open(TOKENIZER.encode(text)) is is_open


def think(say, budget=None, *, num_drafts=0, prompt=PROMPT, **params):  # type: ignore[no-untyped-def]
    """A greedy reply -> its sequence, and the tokens before and after </think>."""
    engine = ScriptedModel(say).engine(num_drafts)
    given_ = {"temperature": 0.0, "max_tokens": 300} | params
    seq = generate(engine, [prompt], SamplingParams(thinking_budget=budget, **given_))[0]
    at = seq.output.index(END_THINK) if END_THINK in seq.output else len(seq.output)
    return seq, seq.output[:at], seq.output[at + 1 :]


@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize("budget", [0, 1, 10, 64])
def test_thinking_that_never_ends_is_closed_and_an_answer_follows(budget: int, num_drafts: int) -> None:
    seq, reasoning, answer = think(always(" and so on"), budget, num_drafts=num_drafts, max_tokens=budget + 32)
    assert seq.thinking_closed == "hard" and len(reasoning) == seq.num_reasoning <= budget + MARGIN
    assert TOKENIZER.decode(answer).strip()


def test_a_sentence_may_end_first() -> None:
    seq, reasoning, answer = think(SENTENCES, 40)
    assert seq.thinking_closed == "soft" and 40 <= len(reasoning) < 40 + MARGIN and answer
    assert TOKENIZER.decode(reasoning).rstrip(" ")[-1] in ".\n!?"


def test_the_budget_gives_way_to_the_answers_reserve() -> None:
    seq, reasoning, answer = think(always(" and so on"), 4096, max_tokens=200)
    assert seq.thinking_closed == "hard" and len(reasoning) == 149 and len(answer) == 50


def test_without_budget_or_grammar_thinking_is_left_alone() -> None:
    seq, reasoning, answer = think(always(" and so on"), None)
    assert seq.thinking_closed is None and len(reasoning) == seq.num_reasoning == 300 and not answer
    off, reasoning, _ = think(always(" and so on"), 5, prompt=[*PROMPT, END_THINK])
    assert off.num_reasoning == 0 and off.thinking_closed is None and END_THINK not in off.output


def test_the_end_of_a_reply_inside_its_thinking_ends_the_thinking_alone() -> None:
    wants_out = random_logits(3, {"<|user|>": 30.0})
    seq, reasoning, answer = think(wants_out, 50)
    assert (reasoning, answer, seq.finish_reason) == ([], [], "stop"), "the model ended its thought; it may say nothing"
    seq, _, answer = think(wants_out, 50, grammar=Grammar.choice(["yes", "no"]))
    assert TOKENIZER.decode(answer) in ("yes", "no")
    seq, _, answer = think(wants_out, 0)
    assert len(answer) == 1 and seq.finish_reason == "stop", "after a forced end something is said"


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**16), budget=st.integers(0, 80), max_tokens=st.integers(2, 200), temperature=st.sampled_from((0.0, 1.0)),
    eager=st.sampled_from((-20.0, 0.0, 5.0)), quiet=st.sampled_from((-20.0, 0.0, 5.0)), constrained=st.booleans(),
)  # fmt: skip
def test_budgets_hold_for_any_model(seed, budget, max_tokens, temperature, eager, quiet, constrained) -> None:  # type: ignore[no-untyped-def]
    say = random_logits(seed, {"</think>": eager, "<|user|>": quiet, ".": 3.0})
    grammar = Grammar.regex("[a-z]+") if constrained else None
    outputs = []
    for num_drafts in (0, 4):
        seq, reasoning, answer = think(say, budget, num_drafts=num_drafts, max_tokens=max_tokens, temperature=temperature,
                                       grammar=grammar, seed=seed)  # fmt: skip
        assert len(reasoning) == seq.num_reasoning <= Limits.of(budget, max_tokens).hard
        assert END_THINK in seq.output and not set(seq.output) & set(EOS)
        if constrained:
            assert TOKENIZER.decode(answer).islower()
        assert answer or (seq.finish_reason == "stop" and seq.thinking_closed is None)
        assert seq.thinking_closed != "hard" or len(reasoning) == Limits.of(budget, max_tokens).hard
        outputs.append(seq.output)
    assert temperature or outputs[0] == outputs[1], "drafts change nothing"


def test_a_finished_grammar_ends_the_reply() -> None:
    engine = ScriptedModel(random_logits(0)).engine()
    prompt = TOKENIZER.encode("<|user|>x<|assistant|><think></think>")
    seq = generate(engine, [prompt], SamplingParams(grammar=Grammar.choice(["a rather long text"])))[0]
    assert (TOKENIZER.decode(seq.output), seq.finish_reason) == ("a rather long text", "stop")
    assert engine.stats.steps == len(seq.output), "no step is spent on an end that is certain"


def test_what_cannot_be_done_is_refused() -> None:
    engine = ScriptedModel(random_logits(0)).engine()
    with pytest.raises(RequestError, match="guided_regex") as caught:
        engine.submit(PROMPT, SamplingParams(grammar=Grammar.regex("a(?=b)", param="guided_regex")))
    assert caught.value.param == "guided_regex"
    with pytest.raises(RequestError, match="thinking_budget"):
        SamplingParams(thinking_budget=-1)
    bare = Engine(random_model(tiny_config()), num_rows=64)
    for params in (SamplingParams(thinking_budget=1), SamplingParams(grammar=Grammar.json_object())):
        with pytest.raises(RequestError, match=r"no <think>|no tokenizer"):
            bare.submit([1], params)


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_a_grammar_that_leads_nowhere_ends_its_reply_alone_and_where_it_does(num_drafts: int) -> None:
    """It was an error of the server. Drafts get there first, and come back; the free choice there is no part of it."""
    engine = ScriptedModel(random_logits(0)).engine(num_drafts)
    prompt = TOKENIZER.encode("<|user|>x<|assistant|><think>so</think>")
    grammar = Grammar.lark("start: /[a-z]{9}/ NOTHING\nNOTHING: /x/ & /y/")
    stuck = engine.submit(prompt, SamplingParams(grammar=grammar, max_tokens=20, temperature=0.0))
    other = engine.submit(prompt, SamplingParams(max_tokens=9, ignore_eos=True))
    events = []
    while engine.has_work:
        events += engine.step()
    text = "".join(e.text for e in events if e.seq is stuck)
    assert (stuck.finish_reason, other.finish_reason) == ("grammar", "length")
    assert len(text) == 9 and text == TOKENIZER.decode(stuck.output) and not any(e.error for e in events)


def test_text_that_spells_a_special_token_is_text() -> None:
    """llguidance's forced tokens were the special ones, which then did not fit: an error of the engine."""
    engine = ScriptedModel(random_logits(0)).engine()
    prompt = TOKENIZER.encode("<|user|>x<|assistant|><think></think>")
    for text in ("</think>", "<|user|>", "a<tool_call>"):
        seq = generate(engine, [prompt], SamplingParams(grammar=Grammar.choice([text])))[0]
        assert (TOKENIZER.decode(seq.output), seq.finish_reason) == (text, "stop")
        assert not {END_THINK, *EOS} & set(seq.output)


# ── Loops ────────────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = Repetition(min_tokens=64, min_repeats=4, max_period=32)


@given(
    period=st.lists(st.integers(0, 9), min_size=1, max_size=32),
    before=st.lists(st.integers(0, 9), max_size=50),
    broken=st.booleans(),
)
def test_a_loop_is_what_repeats_long_enough(period: list[int], before: list[int], broken: bool) -> None:
    length = max(64, 4 * len(period))
    tail = (period * length)[:length]
    if broken:
        tail[length // 2] = 77
    assert is_loop([*before, *tail], SMALL) is not broken
    assert not is_loop((period * length)[: min(64, 4 * len(period)) - 1], SMALL)


CELL = st.one_of(
    st.integers(0, 9999).map(str),
    st.floats(0, 99, allow_nan=False).map(lambda v: f"{v:.2f}"),
    st.just("0"),
    st.just("n/a"),
)
ROWS = st.lists(st.lists(CELL, min_size=3, max_size=3, unique=True), min_size=30, max_size=150, unique_by=tuple)
STRUCTURED = st.one_of(
    ROWS.map(lambda rows: "| a | b | c |\n|---|---|---|\n" + "\n".join("| " + " | ".join(r) + " |" for r in rows)),
    ROWS.map(lambda rows: json.dumps(rows, indent=1)),
    st.integers(100, 600).map(lambda n: json.dumps(list(range(n)))),
    st.integers(50, 200).map(lambda n: json.dumps([[0.0] * 4] * (n // 4))),
    ROWS.map(lambda rows: "\n".join(f"    if x == {a!r}:\n        return {b!r}" for a, b, _ in rows)),
    st.integers(10, 120).map(lambda n: "=" * n + "\n" + "-" * n + "\n" + "    }\n" * 8),
    st.integers(10, 30).map(lambda n: json.dumps([[0] * n] * n)),
    st.integers(100, 500).map(lambda n: "{" + "0x00, " * n + "}"),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(text=STRUCTURED)
def test_structured_text_is_no_loop(text: str) -> None:
    tokens, limits = TOKENIZER.encode(text), Repetition().in_answers
    assert not any(is_loop(tokens[:n], limits) for n in range(LOOK_EVERY, len(tokens), LOOK_EVERY))


def stopped_after(text: str, period: str, limits: Repetition, grammar: Grammar | None = None) -> int | None:
    """Tokens of the period, repeated 3,000 times, until an answer that began with a text is stopped."""
    prompt, begin = TOKENIZER.encode("<|user|>x<|assistant|><think></think>"), TOKENIZER.encode(text)
    params = SamplingParams(repetition=limits, grammar=grammar)
    guide = Guide(params, prompt, 1 << 20, frozenset(EOS), Marks.of(TOKENIZER))
    loop = TOKENIZER.encode(period) * 3000
    tokens = [*prompt, *begin]
    for n, token in enumerate(loop):
        tokens.append(token)
        if guide.is_stuck(tokens):
            return n + 1
    return None


CALL = "<tool_call>write<arg_key>text</arg_key><arg_value>a,b\n"
TOOLS = Grammar.tool_calls([{"name": "write", "parameters": None}])


@pytest.mark.parametrize(
    ("text", "period", "grammar", "least"),
    [
        ("", "0,0,0\n", None, 256),
        ("", "0,0,0\n", TOOLS, 256),
        (CALL, "0,0,0\n", TOOLS, 1024),
        ("[", "0, ", Grammar.json_object(), 1024),
        (f"{CALL}</arg_value></tool_call>Done.", " Done.", TOOLS, 256),
        ("", f"{CALL}</arg_value></tool_call>", TOOLS, 256),  # the same call again and again
    ],
)
def test_data_may_repeat_itself_for_longer(text: str, period: str, grammar: Grammar | None, least: int) -> None:
    """A file of two thousand equal rows was cut off like babble; a loop that does not end is stopped there, too."""
    count = stopped_after(text, period, SMALL, grammar)
    longest = max(least, least // 16 * len(TOKENIZER.encode(period)))
    assert count is not None and least <= count + len(TOKENIZER.encode(text)) and count <= longest + 2 * LOOK_EVERY


@pytest.mark.parametrize(("begin", "text", "grammar"), [
    (CALL, "0,0,0\n" * 2000, TOOLS), (CALL, "id,name,1\n" * 2000, TOOLS), ("", "[" + "0, " * 5000, Grammar.json_object()),
])  # fmt: skip
def test_data_that_was_asked_for_is_no_loop(begin: str, text: str, grammar: Grammar) -> None:
    prompt, tokens = TOKENIZER.encode("<|user|>x<|assistant|><think></think>"), TOKENIZER.encode(text)
    assert 4096 < len(tokens) < 16_384
    params = SamplingParams(repetition=Repetition(), grammar=grammar)
    guide = Guide(params, prompt, 1 << 20, frozenset(EOS), Marks.of(TOKENIZER))
    said = [*prompt, *TOKENIZER.encode(begin), *tokens]
    assert not any(guide.is_stuck(said[:n]) for n in range(len(prompt) + LOOK_EVERY, len(said), LOOK_EVERY))


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_a_reply_that_goes_round_is_stopped(num_drafts: int) -> None:
    prompt = TOKENIZER.encode("<|user|>x<|assistant|>")
    engine = ScriptedModel(always("again and again, ")).engine(num_drafts)
    params = SamplingParams(temperature=0.0, max_tokens=6000, repetition=Repetition())
    seq = generate(engine, [prompt], params)[0]
    assert seq.finish_reason == "repetition" and 4096 <= len(seq.output) < 4096 + LOOK_EVERY
    free = generate(engine, [prompt], SamplingParams(temperature=0.0, max_tokens=1500))[0]
    assert free.finish_reason == "length"


def test_thinking_that_goes_round_is_closed_before_its_budget() -> None:
    seq, reasoning, answer = think(always("again and again, "), 4000, max_tokens=7000, repetition=SMALL)
    assert seq.thinking_closed == "hard" and len(reasoning) == LOOK_EVERY and len(answer) > 60
    assert seq.finish_reason == "repetition"
    seq, reasoning, _ = think(always("again and again, "), None, max_tokens=7000, repetition=SMALL)
    assert seq.finish_reason == "repetition" and len(reasoning) == LOOK_EVERY


def test_the_logits_given_are_left_as_they_are() -> None:
    guide = Guide(SamplingParams(thinking_budget=0), PROMPT, 100, frozenset(EOS), Marks.of(TOKENIZER))
    x = np.zeros(4096, dtype=np.float32)
    shaped = guide.shape(x)
    assert not x.any() and shaped.dtype == x.dtype and np.flatnonzero(np.isfinite(shaped)).tolist() == [END_THINK]
    guide.follow(END_THINK)
    mark = guide.mark()
    assert not np.isfinite(guide.shape(x)[[*EOS, THINK, END_THINK]]).any()
    guide.follow(5)
    assert guide.shape(x) is x
    guide.reset(mark)
    assert guide.shape(x) is not x and guide.thinking_closed == "hard"


# ── Streams ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_streams_are_guided_like_anything_else(num_drafts: int) -> None:
    """The engine's thread follows grammars that other threads compiled; a wrong one fails its own request alone."""
    say = random_logits(2, {" ": 2.0})
    kinds = [Grammar.choice(["yes", "no"]), Grammar.json_object(), Grammar.regex("[a-z ]{4,30}[.]"), None]
    params = [
        SamplingParams(temperature=0.0, max_tokens=120, thinking_budget=i, grammar=g) for i in (0, 9) for g in kinds
    ]
    expected = [generate(ScriptedModel(say).engine(), [PROMPT], p)[0] for p in params]

    async def reply(engine: AsyncEngine, params: SamplingParams) -> tuple[str, object]:
        events = [event async for event in engine.generate(PROMPT, params)]
        return "".join(e.text for e in events), events[-1].seq.thinking_closed

    async def all_replies() -> list[object]:
        engine = AsyncEngine(ScriptedModel(say).engine(num_drafts))
        wrong = SamplingParams(grammar=Grammar.regex("a(?=b)"))
        try:
            return list(await asyncio.gather(*(reply(engine, p) for p in (*params, wrong)), return_exceptions=True))
        finally:
            await asyncio.to_thread(engine.close)

    *replies, refused = asyncio.run(all_replies())
    assert isinstance(refused, RequestError)
    assert replies == [(TOKENIZER.decode(s.output), s.thinking_closed) for s in expected]
