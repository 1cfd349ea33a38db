"""The choice of how many tokens to draft, told made-up costs and acceptance."""

import random

import pytest

from glm52.engine.speculate import RETRY, STRETCH, DraftPolicy


def serve(
    policy: DraftPolicy, steps: int, acceptance: float, cost: float, num_seqs: int = 1, seed: int = 0
) -> list[int]:
    """Depths used over steps that take 1 + cost * depth seconds and verify what the one before has drafted, each token
    of which stands with that probability."""
    rng, depths = random.Random(seed), [policy.depth]
    for _ in range(steps):
        tokens = 0
        for _ in range(num_seqs):
            tokens += 1 + next((i for i in range(depths[-1]) if rng.random() > acceptance), depths[-1])
        depths.append(policy.depth)
        policy.observe(num_seqs, tokens, 1 + cost * policy.depth)
    return depths[1:]


@pytest.mark.parametrize(("acceptance", "cost", "best"), [(0.95, 0.05, 5), (0.3, 0.5, 0), (0.0, 0.1, 0)])
def test_the_best_depth_is_found_and_kept(acceptance: float, cost: float, best: int) -> None:
    runs = [serve(DraftPolicy(5), 100 * STRETCH, acceptance, cost, seed=seed)[20 * STRETCH :] for seed in range(8)]
    assert sum(run.count(best) for run in runs) / sum(map(len, runs)) > 0.85


def test_it_follows_a_change() -> None:
    policy = DraftPolicy(3)
    assert serve(policy, 60 * STRETCH, 0.95, 0.05)[-1] == 3
    after = serve(policy, 60 * RETRY * STRETCH, 0.05, 0.5)[-20 * STRETCH :]
    assert after.count(0) / len(after) > 0.7


def test_sizes_of_batches_are_measured_apart() -> None:
    policy = DraftPolicy(2)
    serve(policy, 42 * STRETCH, 0.95, 0.05)
    assert policy.depth == 2
    serve(policy, 42 * STRETCH, 0.95, 5.0, num_seqs=8)
    assert policy.depth == 0
    serve(policy, 1, 0.95, 0.05)
    assert policy.depth == 2, "what was measured for one sequence is remembered"


def test_sizes_that_take_turns_are_learnt_too() -> None:
    """Each change began the stretch anew, so that none was ever finished where batches kept growing and shrinking."""
    policy, few, many = DraftPolicy(2), [], []
    for _ in range(100):
        few.append(serve(policy, STRETCH // 2, 0.95, 0.05)[-1])
        many.append(serve(policy, STRETCH // 2, 0.95, 5.0, num_seqs=8)[-1])
    assert few[50:].count(2) > 35 and many[50:].count(0) > 35
