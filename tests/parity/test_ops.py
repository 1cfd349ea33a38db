"""Operators against something simpler: brute force, autograd, another form of the same function."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm52 import ops
from glm52.cache import Spans


def rand(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_(grad)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), G=st.integers(1, 14), seed=st.integers(0, 99))
def test_select_rows_is_a_stable_sort(lengths: list[int], G: int, seed: int) -> None:
    """Integers make ties common; each must go to the lowest position."""
    spans, T = Spans.of_documents(lengths), sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randint(-1, 2, shape, generator=generator).double() for shape in ((T, 2, 4), (T, 4)))
    w = torch.randint(-1, 2, (T, 2), generator=generator).double()
    ids = ops.select_rows(q, w, k, spans, G)
    scores = ops.index_scores(q, w, k)
    assert ids.shape == (T, min(G, max(lengths)))
    for t in range(T):
        first = t - int(spans.positions_T[t])
        visible = list(range(first, t + 1))
        expected = sorted(sorted(visible, key=lambda u: -float(scores[t, u]))[:G])
        assert [i for i in ids[t].tolist() if i >= 0] == expected
    in_window = ops.select_rows(q, w, k, Spans.of_documents(lengths, window=T), G)
    assert torch.equal(in_window[:, : ids.shape[1]], ids)
    assert (in_window[:, ids.shape[1] :] == -1).all()


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), G=st.integers(1, 14))
def test_absorbed_equals_expanded(lengths: list[int], G: int) -> None:
    spans, T = Spans.of_documents(lengths), sum(lengths)
    q_nope, q_rope, rows, kv_b = rand(T, 3, 6), rand(T, 3, 2, seed=1), rand(T, 7, seed=2), rand(3, 10, 5, seed=3)
    ids = ops.select_rows(rand(T, 2, 4, seed=4), rand(T, 2, seed=5), rand(T, 4, seed=6), spans, G)
    absorbed = ops.mla_absorbed(q_nope, q_rope, rows, kv_b, ids, 0.3)
    expanded = ops.mla_expanded(q_nope, q_rope, rows, kv_b, ids, spans, 0.3)
    assert torch.allclose(absorbed, expanded, atol=1e-12)
    if max(lengths) <= G:
        dense = ops.mla_expanded(q_nope, q_rope, rows, kv_b, None, spans, 0.3)
        assert torch.allclose(absorbed, dense, atol=1e-12)


def experts_by_loops(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for k in range(ids.shape[1]):
            gate, up = (gate_up[ids[t, k]] @ x[t]).chunk(2)
            y = y + w[t, k] * (down[ids[t, k]] @ (gate * gate.sigmoid() * up))
        out.append(y)
    return torch.stack(out)


def test_experts_and_their_gradients() -> None:
    """One expert gets no token, one gets most of them."""
    x, gate_up, down = rand(9, 6, grad=True), rand(4, 10, 6, seed=1, grad=True), rand(4, 6, 5, seed=2, grad=True)
    ids = torch.tensor([[0, 1], [0, 1], [0, 3], [1, 0], [0, 3], [3, 0], [0, 1], [0, 1], [1, 3]])
    w = rand(9, 2, seed=3, grad=True)
    upstream = rand(9, 6, seed=4)
    results = []
    for body in (ops.expert_ffn, experts_by_loops):
        y = body(x, ids, w, gate_up, down)
        results.append((y, *torch.autograd.grad((y * upstream).sum(), (x, w, gate_up, down))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_token_loss_and_its_gradients() -> None:
    h, w = rand(13, 6, grad=True), rand(11, 6, seed=1, grad=True)
    targets = torch.arange(13) % 11
    weight = rand(13, seed=2).abs()
    total, each = ops.token_loss(h, w, targets, weight, chunk=5)
    expected = torch.nn.functional.cross_entropy(h @ w.t(), targets, reduction="none")
    assert torch.allclose(each, expected.detach())
    ours = torch.autograd.grad(3.0 * total, (h, w))
    theirs = torch.autograd.grad(3.0 * (expected * weight).sum(), (h, w))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("G", [3, 64])
def test_distillation_is_zero_when_the_indexer_agrees(G: int) -> None:
    """KL >= 0, and 0 if the scores are the log of the mean attention; its gradient reaches the scores alone."""
    spans, T = Spans.of_documents([7, 5]), 12
    q_nope, q_rope, rows, kv_b = rand(T, 1, 6), rand(T, 1, 2, seed=1), rand(T, 7, seed=2), rand(1, 10, 5, seed=3)
    ids = None
    if G < 7:
        ids = ops.select_rows(rand(T, 2, 4, seed=4), rand(T, 2, seed=5), rand(T, 4, seed=6), spans, G)
    k = torch.cat((rows[:, :5] @ kv_b[0, :6].t(), rows[:, 5:]), dim=-1)
    agreeing = (torch.cat((q_nope, q_rope), dim=-1)[:, 0] @ k.t() * 0.3)[None]
    arguments = (q_nope, q_rope, rows, kv_b, ids, spans, 0.3)
    assert abs(float(ops.index_distillation(agreeing, *arguments))) < 1e-12
    other = rand(1, T, T, seed=9, grad=True)
    loss = ops.index_distillation(other, *arguments)
    assert loss.item() > 0.01
    (gradient,) = torch.autograd.grad(loss, other)
    outside = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert gradient[0].abs().sum() > 0 and not gradient[0][outside].any()


def test_rope_is_exact_at_a_million() -> None:
    """Angles are formed in fp64: a rotation by p and one by -p cancel, also at position 1,048,575."""
    position = torch.tensor([1_048_575])
    table = ops.rope_table(position, 64, 8e6)
    back = torch.stack((table[:, 0], -table[:, 1]), dim=1)
    x = rand(1, 64)
    assert torch.allclose(ops.rope(ops.rope(x, table), back), x, atol=1e-12)
    assert table[0, :, 0].tolist() == pytest.approx([math.cos(1_048_575.0), math.sin(1_048_575.0)], abs=1e-12)


def test_route_prefers_the_lowest_of_equals() -> None:
    ids, w = ops.route(torch.zeros(1, 5), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]), 3, 2.5, True)
    assert ids.tolist() == [[1, 3, 0]]
    assert torch.allclose(w, torch.full((1, 3), 2.5 / 3))
