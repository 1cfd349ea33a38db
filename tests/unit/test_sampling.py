"""Sampling as data: truncation, penalties, draws; stop strings and limits of a sequence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm52.engine.params import SamplingParams
from glm52.engine.sampling import distribution, log_probabilities, pick, processed, residual, uniform
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


@given(u=st.floats(0, 1, exclude_max=True))
def test_pick_never_draws_the_impossible(u: float) -> None:
    assert pick(np.array([0.0, 0.5, 0.0, 0.5, 0.0]), u) == (1 if u < 0.5 else 3)


def test_draws_are_a_function_of_seed_position_and_purpose() -> None:
    assert uniform(1, 2, "token") == uniform(1, 2, "token")
    others = {uniform(1, 2, "token"), uniform(2, 2, "token"), uniform(1, 3, "token"), uniform(1, 2, "draft")}
    assert len(others) == 4 and all(0 <= u < 1 for u in others)
    mean = np.mean([uniform(0, i, "token") for i in range(2000)])
    assert abs(mean - 0.5) < 4 / np.sqrt(12 * 2000)


def test_residual_and_log_probabilities() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.9, 0.1, 0.0])
    assert residual(p, q).tolist() == [0.0, 1.0, 0.0]
    assert np.allclose(np.exp(log_probabilities(logits(0.2, 0.8) + 7)), [0.2, 0.8])


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 3.0), ("top_p", -0.1), ("max_tokens", 0), ("logprobs", 21), ("stop", ("",))]
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
