"""The great invariant: greedy output is the same for the naive forward and for the engine, whatever the batch mix, the
chunk size, prefix hits, preemption, aborts of others, and speculation.

The model is float64: torch's matrix products round differently for different batch shapes, and in float64 that is far
too little to flip a near tie, so any difference is a bug of bookkeeping.
"""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from glm52 import ops
from glm52.cache import Spans
from glm52.engine import Engine, SamplingParams, Sequence, generate
from glm52.engine.sampling import distribution, log_probabilities
from glm52.model import GLM
from glm52.native import NativeGLM
from tests.fixtures import random_model, tiny_config

VOCAB = 61


@dataclass(frozen=True)
class Body:
    """A model under test. unit: the rows its pages come in."""

    model: Any
    unit: int

    def last_logits(self, tokens: list[int]) -> np.ndarray:
        """Of the whole forward of a sequence, computed at once."""
        if isinstance(self.model, GLM):
            h = self.model(torch.tensor(tokens), Spans.of_documents([len(tokens)]))
        else:
            spans = Spans.of_sequence(0, len(tokens), 16)
            h = self.model(torch.tensor(tokens), spans, self.model.new_cache(64))
        return self.model.logits(h[-1:])[0].numpy()


@pytest.fixture(
    scope="module", params=["reference", *(("f32", "bf16", "int4") if ops.backend() != "reference" else ())]
)
def body(request: pytest.FixtureRequest) -> Body:
    if request.param == "reference":
        return Body(random_model(tiny_config(), dtype=torch.float64), 1)
    return Body(NativeGLM(random_model(tiny_config()), request.param, threads=2), 16)


@pytest.fixture(scope="module")
def model() -> GLM:
    return random_model(tiny_config(), dtype=torch.float64)


@torch.inference_mode()
def naive(body: Body, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log probabilities, by running the whole forward for every one of them."""
    tokens, logprobs = list(prompt), []
    for _ in range(count):
        logits = body.last_logits(tokens)
        tokens.append(int(np.argmax(logits)))
        logprobs.append(float(log_probabilities(logits)[tokens[-1]]))
    return tokens[len(prompt) :], logprobs


@pytest.fixture(scope="module")
def corpus(model: GLM) -> list[tuple[list[int], list[int]]]:
    return [(prompt, tokens) for prompt, tokens, _ in cases_of(Body(model, 1))]


@pytest.fixture(scope="module")
def cases(body: Body) -> list[tuple[list[int], list[int], list[float]]]:
    return cases_of(body)


def cases_of(body: Body) -> list[tuple[list[int], list[int], list[float]]]:
    """Prompts with their continuations; several begin alike."""
    rng = random.Random(0)
    stems = [[rng.randrange(1, VOCAB) for _ in range(24)] for _ in range(3)]
    prompts = [rng.choice(stems)[: rng.randint(0, 24)] + [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 12))]
               for _ in range(14)]  # fmt: skip
    return [(p, *naive(body, p, 16)) for p in prompts]


def run_schedule(body: Body, cases: list[tuple[list[int], list[int], list[float]]], rng: random.Random) -> Counter[str]:
    """One random engine, random arrivals, lengths and aborts; every reply must be a prefix of the naive one."""
    max_seqs = rng.randint(1, 5)
    page_size = rng.choice((1, 2, 4, 8)) if body.unit == 1 else body.unit
    engine = Engine(
        body.model, num_rows=rng.choice((56, 56, 72, 256) if body.unit == 1 else (64, 64, 80, 256)),
        page_size=page_size, max_seqs=max_seqs,
        max_batch_tokens=rng.choice((max_seqs, max_seqs + 3, 16, 64)) + max_seqs, num_drafts=rng.choice((0, 0, 1, 2, 5)),
    )  # fmt: skip
    todo = [rng.choice(cases) for _ in range(rng.randint(1, 6))]
    living: list[tuple[Sequence, list[int], list[float]]] = []
    said: dict[Sequence, list[float]] = {}
    done = 0
    while todo or living:
        if todo and rng.random() < 0.6:
            prompt, expected, logprobs = todo.pop()
            count = rng.randint(1, len(expected))
            params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count, logprobs=0)
            living.append((engine.submit(prompt, params), expected[:count], logprobs[:count]))
        for event in engine.step():
            said.setdefault(event.seq, []).extend(p.logprob for p in event.logprobs)
        engine.check()
        if living and rng.random() < 0.03:
            engine.abort(living.pop(rng.randrange(len(living)))[0])
        for item in list(living):
            seq, expected, logprobs = item
            if seq.finish_reason is not None:
                assert (seq.output, seq.finish_reason) == (expected, "length")
                # The native body promises bits; the reference's matrix products round by the shape of the batch.
                assert said[seq] == (logprobs if body.unit > 1 else pytest.approx(logprobs, abs=1e-9))
                living.remove(item)
                done += 1
    assert not engine.has_work
    engine.check()
    return Counter(
        done=done, hits=engine.stats.cached_tokens, preemptions=engine.scheduler.num_preemptions,
        drafted=sum(engine.stats.drafted), accepted=sum(engine.stats.accepted),
    )  # fmt: skip


@pytest.mark.parametrize("block", range(8))
def test_greedy_output_is_identical_over_random_schedules(body: Body, cases, block: int) -> None:
    """26 random schedules each; together they must have met prefix hits, preemptions and drafts."""
    total: Counter[str] = Counter()
    for i in range(26):
        total += run_schedule(body, cases, random.Random(100 * block + i))
    assert total["done"] > 50 and total["hits"] > 0 and total["preemptions"] > 0 and total["drafted"] > 0


class Oracle(GLM):
    """A model whose drafts are right with a given probability: exercises every number of accepted drafts."""

    answers: list[int]
    rng: random.Random
    accuracy: float

    def extend(self, h_TD, tokens_T, spans, cache, last_S):  # type: ignore[no-untyped-def]
        """Write the rows like the real one, but let z point at the token that will be right."""
        z, ids = super().extend(h_TD, tokens_T, spans, cache, last_S)
        self._aim(z, spans.positions_T[last_S])
        return z, ids

    def draft(self, z_SD, tokens_S, positions_S, cache, selection):  # type: ignore[no-untyped-def]
        z = super().draft(z_SD, tokens_S, positions_S, cache, selection)
        self._aim(z, positions_S)
        return z

    def _aim(self, z, positions):  # type: ignore[no-untyped-def]
        self.targets = [
            self.answers[p + 2] if p + 2 < len(self.answers) and self.rng.random() < self.accuracy else 1
            for p in positions.tolist()
        ]
        self.marks = z

    def logits(self, h_TD):  # type: ignore[no-untyped-def]
        out = super().logits(h_TD)
        if getattr(self, "marks", None) is not None and h_TD.shape[0] == 1:
            for row, target in zip(self.marks, self.targets, strict=True):
                if torch.equal(row, h_TD[0]):
                    return torch.nn.functional.one_hot(torch.tensor([target]), out.shape[1]).double() * 100
        return out


@pytest.mark.parametrize("accuracy", [1.0, 0.6])
@pytest.mark.parametrize("num_drafts", [1, 3, 5])
def test_accepted_drafts_change_nothing_but_the_number_of_steps(
    model: GLM, corpus, num_drafts: int, accuracy: float
) -> None:
    oracle = Oracle(model.config).double().eval().requires_grad_(False)
    oracle.load_state_dict(model.state_dict())
    oracle.rng, oracle.accuracy = random.Random(1), accuracy
    accepted = drafted = 0
    for prompt, expected in corpus[:6]:
        oracle.answers, oracle.marks = prompt + expected, None
        engine = Engine(oracle, num_rows=128, page_size=4, num_drafts=num_drafts)
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=len(expected))
        assert generate(engine, [prompt], params)[0].output == expected
        engine.check()
        if accuracy == 1.0:
            assert engine.stats.steps <= -(-len(expected) // (num_drafts + 1)) + num_drafts + 1
        accepted, drafted = accepted + sum(engine.stats.accepted), drafted + sum(engine.stats.drafted)
    assert 0 < accepted == drafted if accuracy == 1.0 else 0 < accepted < drafted


def test_samples_depend_on_their_seed_alone(model: GLM, corpus) -> None:
    """Not on the batch, and not on drafts, whether they are right or wrong."""
    prompts = [p for p, _ in corpus[:5]]
    params = [SamplingParams(temperature=t, top_p=0.9, seed=s, max_tokens=12, ignore_eos=True)
              for t, s in ((0.6, 7), (1.0, 7), (1.5, 8))]  # fmt: skip
    for given in params:
        alone = [generate(Engine(model, num_rows=128), [p], given)[0].output for p in prompts]
        for num_drafts in (0, 1, 3, 5):
            engine = Engine(model, num_rows=512, max_batch_tokens=33, num_drafts=num_drafts, adaptive=num_drafts == 5)
            assert [s.output for s in generate(engine, prompts, given)] == alone
            assert num_drafts == 0 or 0 < sum(engine.stats.accepted) < sum(engine.stats.drafted)


def test_top_p_keeps_the_smallest_set() -> None:
    p = distribution(np.log(np.array([0.5, 0.3, 0.2])), SamplingParams(top_p=0.6))
    assert np.allclose(p, [0.625, 0.375, 0.0])
