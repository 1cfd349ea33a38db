"""The choice of how many tokens to draft, told made-up costs and acceptance."""

import random

import pytest

from glm52.engine.speculate import RETRY, STRETCH, DraftPolicy


def serve(policy: DraftPolicy, steps: int, acceptance: float, cost: float, num_seqs: int = 1) -> list[int]:
    """Depths used over steps that take 1 + cost * depth seconds and accept each draft with that probability."""
    rng, depths = random.Random(0), []
    for _ in range(steps):
        tokens = 0
        for _ in range(num_seqs):
            tokens += 1 + next((i for i in range(policy.depth) if rng.random() > acceptance), policy.depth)
        depths.append(policy.depth)
        policy.observe(num_seqs, tokens, 1 + cost * policy.depth)
    return depths


@pytest.mark.parametrize(("acceptance", "cost", "best"), [(0.95, 0.05, 5), (0.3, 0.5, 0), (0.0, 0.1, 0)])
def test_the_best_depth_is_found_and_kept(acceptance: float, cost: float, best: int) -> None:
    depths = serve(DraftPolicy(5), 100 * STRETCH, acceptance, cost)[20 * STRETCH :]
    assert depths.count(best) / len(depths) > 0.7


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
