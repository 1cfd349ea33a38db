"""Who computes when: newcomers beside a long prompt, drafts that need pages, prompts that are put back."""

import pytest

from glm52.engine import Engine, SamplingParams, generate
from glm52.engine.sequence import Sequence
from glm52.errors import ContextOverflow, RequestError
from tests.scripted import ScriptedModel, always, random_logits


def engine(num_rows: int, **kwargs: int) -> Engine:
    return ScriptedModel(random_logits(1), accuracy=0.0).engine(num_rows=num_rows, page_size=16, **kwargs)


def reply(max_tokens: int, **params: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **params)


def run(made: Engine) -> int:
    """To the end -> tokens computed."""
    rows, spans = 0, made._spans

    def counted(work):  # type: ignore[no-untyped-def]
        nonlocal rows
        rows += sum(w.count for w in work)
        return spans(work)

    made._spans = counted  # type: ignore[method-assign]
    while made.has_work:
        made.step()
        made.check()
    return rows


def test_a_newcomer_begins_beside_a_long_prompt() -> None:
    made = engine(4096, max_seqs=8, max_batch_tokens=64)
    long = made.submit(range(3500), reply(4))
    made.step()
    short = made.submit([7, 8, 9], reply(4))
    for _ in range(2):
        made.step()
    assert short.output and 100 < long.num_cached < 200


@pytest.mark.parametrize("num_drafts", [0, 5])
def test_a_reply_does_not_wait_for_large_chunks(num_drafts: int) -> None:
    """Prompts have a step of 2,048 tokens to themselves, but 512 of one that a reply waits for."""
    made = engine(20_000, max_seqs=2, max_batch_tokens=2048, num_drafts=num_drafts)
    short = made.submit([7, 8, 9], reply(4))
    made.step()
    long = made.submit(range(4050), reply(1))
    while short.finish_reason is None:
        before = long.num_cached
        made.step()
        assert 512 <= long.num_cached - before <= 512 + 1
    before = long.num_cached
    made.step()
    assert long.num_cached == before + 2048


def test_who_cannot_begin_yet_is_kept_no_tokens() -> None:
    made = engine(256, max_seqs=2, max_batch_tokens=64)
    long = made.submit(range(200), reply(4))
    made.submit(range(100), reply(4))
    made.step()
    made.step()
    assert len(made.scheduler.running) == 1 and long.num_cached == 128


def test_pages_that_a_running_prompt_will_need_are_not_given_away() -> None:
    made = engine(256, max_seqs=2, max_batch_tokens=64)
    made.submit(range(150), reply(4))
    made.step()
    made.submit(range(150, 300), reply(4))
    run(made)
    assert made.scheduler.num_preemptions == 0


def test_guesses_put_nobody_back() -> None:
    rows = []
    for num_drafts in (0, 5):
        made = engine(128, max_seqs=2, num_drafts=num_drafts)
        made.submit(range(10, 44), reply(14))
        made.submit(range(100, 166), reply(40, prompt_logprobs=0))
        rows.append(run(made))
        assert made.scheduler.num_preemptions == 0
    assert rows[1] < 5 * rows[0]


def put_back(prompt: range, **params: object) -> Sequence:
    """The reply to a prompt that was put back in its middle."""
    made = engine(128, max_seqs=2, max_batch_tokens=12)
    seq = made.submit(prompt, reply(6, **params))
    for _ in range(3):
        made.step()
    made.scheduler.preempt(seq)
    run(made)
    return seq


def test_pages_of_its_own_are_no_cached_prefix() -> None:
    assert put_back(range(100, 146)).num_cached_tokens == 0


def test_a_prompt_that_is_put_back_is_scored_once() -> None:
    alone = generate(engine(128), [list(range(100, 146))], reply(6, prompt_logprobs=2))[0]
    again = put_back(range(100, 146), prompt_logprobs=2)
    assert again.prompt_logprobs == alone.prompt_logprobs and again.output == alone.output


def test_a_long_prompt_is_scored_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a whole step were made at once: with a large vocabulary most of the memory that it took."""
    made = engine(1024, max_batch_tokens=1000)
    right, seen = made.model.logits, []
    monkeypatch.setattr(made.model, "logits", lambda h: seen.append(len(h)) or right(h))
    scored = generate(made, [list(range(900))], reply(1, prompt_logprobs=1))[0]
    assert len(scored.prompt_logprobs) == 900 and max(seen) < 300
    again = generate(engine(1024, max_batch_tokens=32), [list(range(900))], reply(1, prompt_logprobs=1))[0]
    assert again.prompt_logprobs == scored.prompt_logprobs


def test_a_prompt_of_one_token_has_one_entry() -> None:
    assert generate(engine(128), [[5]], reply(2, prompt_logprobs=0))[0].prompt_logprobs == [None]


def test_pages_of_a_reply_that_failed_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ScriptedModel(always("x")).engine(num_rows=128, page_size=16)
    right = made.model.logits
    with monkeypatch.context() as patched:
        patched.setattr(made.model, "logits", lambda h: right(h) * float("nan"))
        assert generate(made, [list(range(10, 60))], reply(3))[0].finish_reason == "error"
    assert generate(made, [list(range(10, 60))], reply(3))[0].num_cached_tokens == 0


def test_what_can_never_be_served_is_refused_by_its_name() -> None:
    """In the words that the server has for it: the engine had its own, which named messages, or nothing."""
    made = engine(128)
    with pytest.raises(ContextOverflow, match="your prompt resulted in 200 tokens"):
        made.submit([5] * 200, reply(1))
    for prompt, bias, expected in (
        ([], {}, "prompt: expected at least one token"),
        ([5, -1], {}, "prompt: token -1 is outside the vocabulary of 4096"),
        ([5], {4096: 1.0}, "logit_bias: token 4096 is outside the vocabulary of 4096"),
    ):
        with pytest.raises(RequestError, match=f"^{expected}") as caught:
            made.submit(prompt, reply(1, logit_bias=bias))
        assert caught.value.param == expected.split(":")[0]
    assert not made.has_work
