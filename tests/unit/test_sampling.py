"""Sampling as data: truncation, penalties, draws; stop strings and limits of a sequence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm52.engine.params import SamplingParams
from glm52.engine.sampling import distribution, draw, log_probabilities, processed
from glm52.engine.sequence import Sequence
from glm52.errors import RequestError
from glm52.hub import NANO
from glm52.tokenizer import Tokenizer

TOKENIZER = Tokenizer.read(NANO)


def logits(*p: float) -> np.ndarray:
    return np.log(np.array(p))


def test_truncations() -> None:
    p = logits(0.4, 0.3, 0.2, 0.1)
    assert np.allclose(distribution(p, SamplingParams(top_k=2)), [4 / 7, 3 / 7, 0, 0])
    assert np.allclose(distribution(p, SamplingParams(top_p=0.5)), [4 / 7, 3 / 7, 0, 0])
    assert np.allclose(distribution(p, SamplingParams(top_p=0.0)), [1, 0, 0, 0])
    assert np.allclose(distribution(p, SamplingParams(min_p=0.6)), [4 / 7, 3 / 7, 0, 0])
    assert np.allclose(distribution(logits(0.25, 0.25, 0.25, 0.25), SamplingParams(top_k=1)), [1, 0, 0, 0])
    hot = distribution(p, SamplingParams(temperature=2.0))
    assert hot[0] < 0.4 and hot[3] > 0.1


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-300])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    """They made infinities of logits, and a warning that ends the engine where warnings are errors."""
    p = distribution(np.array([20.0, 19.0, -np.inf], dtype=np.float32), SamplingParams(temperature=temperature))
    assert p.tolist() == [1.0, 0.0, 0.0]


def test_penalties_count_what_was_said() -> None:
    x = np.zeros(4)
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5)
    assert processed(x, params, [3, 1, 1, 2], 1).tolist() == [0.0, -2.0, -1.5, 0.0]
    repeated = processed(np.array([2.0, -2.0, 2.0]), SamplingParams(repetition_penalty=2.0), [0, 1], 1)
    assert repeated.tolist() == [1.0, -4.0, 2.0]
    assert processed(x, SamplingParams(logit_bias={2: 5.0}), [], 0).tolist() == [0, 0, 5, 0]


@given(
    said=st.lists(st.integers(0, 7), max_size=40),
    prompt_length=st.integers(0, 40),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties_are_those_of_each_token_by_itself(
    said: list[int], prompt_length: int, presence: float, frequency: float
) -> None:
    x = np.linspace(-9.7, 9.1, 8)
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    counts = [said[prompt_length:].count(token) for token in range(8)]
    expected = [v - (presence + frequency * n) if n else v for v, n in zip(x.tolist(), counts, strict=True)]
    assert processed(x, params, said, prompt_length).tolist() == expected


@given(seed=st.integers(-(2**63), 2**64 - 1), position=st.integers(0, 1 << 20))
def test_draws_are_a_function_of_seed_and_position_and_never_the_impossible(seed: int, position: int) -> None:
    p = np.array([0.0, 0.5, 0.0, 0.5, 0.0])
    assert draw(p, seed, position) == draw(p, seed, position) in (1, 3)
    assert draw(np.eye(5)[2], seed, position) == 2
    assert draw(np.array([5e-324, 1.0]), seed, position) == 1


@pytest.mark.parametrize("by", ["seed", "position"])
def test_draws_have_their_distribution(by: str) -> None:
    """Ten thousand of six tokens, chi-square; over neighbouring seeds and over positions."""
    p, count = np.array([0.4, 0.3, 0.0, 0.2, 0.09, 0.01]), 10_000
    drawn = [draw(p, i, 3) if by == "seed" else draw(p, 7, i) for i in range(count)]
    observed = np.bincount(drawn, minlength=6)[p > 0]
    chi2 = ((observed - count * p[p > 0]) ** 2 / (count * p[p > 0])).sum()
    assert chi2 < 4 + 4 * 8**0.5, (chi2, observed)


def test_draws_at_two_positions_know_nothing_of_each_other() -> None:
    p = np.full(4, 0.25)
    pairs = np.bincount([4 * draw(p, 1, i) + draw(p, 1, i + 1) for i in range(0, 16_000, 2)], minlength=16)
    assert ((pairs - 500) ** 2 / 500).sum() < 15 + 4 * 30**0.5


def test_alike_distributions_draw_alike() -> None:
    """As often as the coupling promises: (1 - d) / (1 + d) for a total variation of d."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.4])
    same = np.mean([draw(p, i, 0) == draw(q, i, 0) for i in range(4000)])
    assert 0.8 / 1.2 < same <= 0.8 + 0.03


@given(
    x=st.lists(st.integers(-3, 3), min_size=1, max_size=600).map(lambda v: np.array(v, dtype=np.float64)),
    top_k=st.sampled_from([0, 1, 3, 300, 1000]),
    top_p=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
)
def test_a_nucleus_is_that_of_the_whole_vocabulary_in_order(x: np.ndarray, top_k: int, top_p: float) -> None:
    order = np.argsort(-x, kind="stable")
    p = (np.exp(x) / np.exp(x).sum())[order][: top_k or None]
    kept = np.cumsum(p) - p < top_p * p.sum() * (1 - 1e-12)
    kept |= top_p == 1.0
    kept[0] = True
    given_ = distribution(x, SamplingParams(top_k=top_k, top_p=top_p))
    assert set(np.flatnonzero(given_)) == set(order[: len(p)][kept])


def test_log_probabilities() -> None:
    assert np.allclose(np.exp(log_probabilities(logits(0.2, 0.8) + 7)), [0.2, 0.8])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 3.0),
        ("top_p", -0.1),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("top_k", 2.5),
        ("seed", 1.5),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", "abc"),
        ("stop", ("x" * 1025,)),
        ("stop", ("x",) * 65),
    ],
)
def test_values_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def said(text: str, **params: object) -> tuple[str, Sequence]:
    """Feed the tokens of a text until the sequence ends -> the text that was shown."""
    seq = Sequence(id=0, prompt=[1], tokens=[1], seed=0, max_tokens=50, detokenizer=TOKENIZER.stream(),
                   params=SamplingParams(**params))  # fmt: skip
    shown = ""
    for token in TOKENIZER.encode(text):
        piece = seq.append(token, frozenset({4060}))
        assert piece is None or not any(s in shown + piece for s in seq.params.stop)
        shown += piece or ""
        if seq.finish_reason:
            break
    return shown + seq.close_text(), seq


@given(cut=st.integers(1, 30))
def test_stop_strings_across_tokens(cut: int) -> None:
    text = "The quick brown fox jumps over the lazy dog"
    stop = text[cut : cut + 5]
    shown, seq = said(text, stop=(stop,))
    assert shown == text[: text.find(stop)] and seq.finish_reason == "stop"


def test_the_end_of_a_reply() -> None:
    assert said("one two<|endoftext|>three")[0] == "one two"
    shown, seq = said("one two<|endoftext|>three", ignore_eos=True)
    assert shown.endswith("three") and seq.finish_reason is None
    shown, seq = said("almost the sto", stop=("stop",))
    assert shown == "almost the sto", "what was held back for a stop string is shown in the end"
    shown, seq = said("a b c", stop_token_ids=frozenset(TOKENIZER.encode(" b")))
    assert shown == "a" and seq.finish_reason == "stop"
