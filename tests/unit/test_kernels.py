"""The native kernels against the reference, on every instruction set of this CPU, each in a process of its own.

``GLM52_ISA`` is read once, when the extension is imported; so this file runs itself once per instruction set.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import glm52
from glm52 import ops
from glm52.ops import reference

kernels = pytest.importorskip("glm52._kernels", reason="built without native kernels")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def native(x: torch.Tensor, w: torch.Tensor, threads: int = 1) -> torch.Tensor:
    y = torch.empty(x.shape[0], w.shape[0])
    kernels.linear(x, w, y, threads)
    return y


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(0, 9), N=st.integers(1, 70), D=st.integers(1, 130), bf16=st.booleans(), threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_linear_is_within_the_rounding_of_its_sum(T: int, N: int, D: int, bf16: bool, threads: int, seed: int) -> None:
    """|y - exact| <= D * 2^-24 * sum |x w|: every order of adding D products in fp32 stays within it."""
    w = random(N, D, dtype=torch.bfloat16 if bf16 else torch.float32, seed=seed)
    x = random(T, D, seed=seed + 1)
    exact = x.double() @ w.double().t()
    bound = (D + 1) * 2**-24 * (x.double().abs() @ w.double().abs().t()) + 1e-30
    assert ((native(x, w, threads).double() - exact).abs() <= bound).all()


@settings(max_examples=30, deadline=None)
@given(T=st.integers(1, 11), N=st.integers(1, 70), D=st.integers(1, 130), bf16=st.booleans())
def test_linear_bits_do_not_depend_on_batch_or_threads(T: int, N: int, D: int, bf16: bool) -> None:
    x, w = random(T, D), random(N, D, dtype=torch.bfloat16 if bf16 else torch.float32)
    alone = torch.cat([native(x[t : t + 1].contiguous(), w) for t in range(T)])
    assert torch.equal(native(x, w, 1), alone)
    assert torch.equal(native(x, w, 2), alone)


@pytest.mark.parametrize(
    ("x", "w", "y", "named"),
    [
        (random(2, 3), random(4, 5), random(2, 4), "w, y"),
        (random(2, 3), random(4, 3), random(2, 5), "w, y"),
        (random(2, 3), random(4, 3), random(1, 4), "w, y"),
        (random(3), random(4, 3), random(2, 4), "x"),
        (random(2, 3, dtype=torch.float64), random(4, 3), random(2, 4), "x"),
        (random(2, 3), random(4, 3, dtype=torch.float16), random(2, 4), "w"),
        (random(2, 3), random(4, 3), random(2, 4, dtype=torch.bfloat16), "y"),
        (random(3, 2).t(), random(4, 3), random(2, 4), "x"),
        (random(2, 3), random(3, 4).t(), random(2, 4), "w"),
    ],
)
def test_wrong_arguments_are_value_errors(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kernels.linear(x, w, y, 1)


def test_dispatch() -> None:
    """Native where it can be, the reference for gradients and other dtypes; both say the same."""
    x, w = random(3, 40), random(20, 40)
    assert ops.backend() == f"native ({kernels.isa()})"
    assert torch.equal(ops.linear(x, w), native(x, w))
    w.requires_grad_()
    assert ops.linear(x, w).requires_grad
    doubles = ops.linear(x.double(), w.detach().double())
    assert torch.equal(doubles, reference.linear(x.double(), w.detach().double()))


@pytest.mark.skipif("GLM52_ISA" in os.environ, reason="this is the run of one instruction set")
@pytest.mark.parametrize("isa", kernels.isas())
def test_every_instruction_set(isa: str) -> None:
    environment = os.environ | {"GLM52_ISA": isa, "PYTHONPATH": str(Path(glm52.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", __file__],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_instruction_set_is_named() -> None:
    environment = os.environ | {"GLM52_ISA": "sse9", "PYTHONPATH": str(Path(glm52.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", "import glm52._kernels"], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0 and "base" in done.stderr and "sse9" in done.stderr
