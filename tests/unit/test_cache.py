"""The FP8 cache's rows against torch's own E4M3, byte by byte, and their size against the arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm52.cache import LatentCache, Spans, as_cached_fp8
from glm52.config import CACHE_GROUP, GLMConfig
from tests.fixtures import random_model, tiny_config

FP8 = torch.float8_e4m3fn


def values(rows: int, width: int, seed: int) -> Tensor:
    """Normal values over many magnitudes, the first row zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.randn(rows, width, generator=generator).mul(4).exp()
    x[0] = 0
    return x


def power_of_two(x: Tensor) -> Tensor:
    """The smallest that brings every magnitude to 448 or below, at least 2^-126: [T, 1]."""
    return torch.exp2((x.abs().amax(1, keepdim=True).double() / 448).clamp(min=2**-126).log2().ceil()).float()


@settings(max_examples=40, deadline=None)
@given(C=st.integers(1, 300), R=st.integers(0, 4), seed=st.integers(0, 99))
def test_a_row_is_within_the_rounding_of_e4m3(C: int, R: int, seed: int) -> None:
    """|x - read| <= 2^-4 |x| + 2^-10 scale of its group of 128; the rotated key is bf16; writing it again changes nothing."""
    config = tiny_config(kv_lora_rank=C, qk_rope_head_dim=2 * R)
    pool, x, rows = LatentCache(config, 9, FP8).rows(1), values(5, C + 2 * R, seed), torch.tensor([7, 0, 3, 8, 1])
    pool[rows] = x
    read = pool[rows]
    assert torch.equal(read[:, C:], x[:, C:].bfloat16().float())
    for begin in range(0, C, CACHE_GROUP):
        group = slice(begin, min(begin + CACHE_GROUP, C))
        scale = power_of_two(x[:, group])
        assert ((x[:, group] - read[:, group]).abs() <= x[:, group].abs() / 16 + scale * 2**-10).all()
        assert torch.equal(read[:, group], (x[:, group] / scale).to(FP8).float() * scale)
    assert not pool[torch.tensor([2, 4, 5, 6])].any()


@settings(max_examples=40, deadline=None)
@given(I=st.integers(4, 200), seed=st.integers(0, 99))
def test_an_index_key_has_one_power_of_two(I: int, seed: int) -> None:
    """The smallest scale that holds it, so that read values are exact in bf16."""
    pool, x = LatentCache(tiny_config(index_head_dim=I), 5, FP8).keys(2), values(5, I, seed)
    pool[torch.arange(5)] = x
    read = pool[torch.arange(5)]
    scale = power_of_two(x)
    assert torch.equal(read, (x / scale).to(FP8).float() * scale)
    assert torch.equal(read, read.bfloat16().float())


def test_the_layout_is_that_of_glm_5_2() -> None:
    """656 bytes a row: 512 values, 4 scales, 64 bf16; 132 a key: what ``glm52 inspect`` counts is what is allocated."""
    config = GLMConfig.preset("glm-5.2")
    cache, x = LatentCache(config, 64, FP8), values(64, 576, 0)
    cache.rows(3)[torch.arange(64)] = x
    data = cache.rows(3).bytes_NB
    assert data.shape == (64, 656) and cache.keys(2).bytes_NB.shape == (64, 132)
    scale = data[:, 512:528].contiguous().view(torch.float32)
    assert torch.equal(scale, power_of_two(x[:, :512].reshape(256, 128)).view(64, 4))
    assert torch.equal(data[:, 528:].contiguous().view(torch.bfloat16), x[:, 512:].bfloat16())
    assert cache.num_bytes == 64 * (config.cache_bytes("fp8") + sum(config.row_bytes("fp8")))
    assert config.cache_bytes("fp8") == 53_940


@torch.inference_mode()
def test_the_reference_reads_what_it_wrote() -> None:
    """Logits over an FP8 cache do not depend on the chunk: a chunk reads its own rows rounded too. Dense, so that no choice
    flips: e4m3 rounds within 2^-4 of a value, 0.036 in the root mean square, over eight layers."""
    config, tokens = tiny_config(index_topk=60, num_experts_per_tok=4), torch.arange(60)
    model = random_model(config, dtype=torch.float64)

    def logits(chunk: int) -> Tensor:
        cache = model.new_cache(64)
        spans = [Spans.of_sequence(i, min(i + chunk, 60), 1) for i in range(0, 60, chunk)]
        return torch.cat([model.logits(model(tokens[s.positions_T], s, cache)) for s in spans])

    exact = logits(60)
    model.cache_format = "fp8"
    whole = logits(60)
    assert 0.01 < (whole - exact).square().mean().sqrt() / exact.std() < 0.2
    assert (logits(1) - whole).abs().max() < 1e-9 and (logits(7) - whole).abs().max() < 1e-9
    without_cache = model.logits(model(tokens, Spans.of_documents([60])))
    assert (without_cache - whole).abs().max() < 1e-9, "what a training stage with cache_format fp8 sees"


def test_a_gradient_passes_straight_through_the_rounding_of_rows() -> None:
    x = torch.randn(3, 48, requires_grad=True)
    rows = as_cached_fp8(x, 32)
    (rows * torch.arange(48.0)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.arange(48.0).expand(3, 48))
    assert torch.equal(rows[:, 32:], x[:, 32:].bfloat16().float()) and not torch.equal(rows, x)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e5m2])
def test_a_dtype_that_holds_no_rows_is_a_value_error(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="dtype"):
        LatentCache(tiny_config(), 16, dtype)
