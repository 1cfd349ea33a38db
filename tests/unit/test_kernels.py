"""The native products against exact arithmetic, on every instruction set of this CPU, each in a process of its own.

``GLM52_ISA`` is read once, when the extension is imported; so this file runs itself, and the parity tests of the whole
native stack, once per instruction set.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import glm52
from glm52 import ops
from glm52.native import pack
from glm52.quant import quantize

if ops.backend() == "reference":
    pytest.skip("built without native kernels", allow_module_level=True)
kernels = ops.kernels()
FORMATS = ("f32", "bf16", "int8", "int4", "fp8")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def native(x: Tensor, w: object, threads: int = 1) -> Tensor:
    y = torch.empty(x.shape[0], w.rows)
    kernels.linear(x, w, y, threads)
    return y


def rounded(x: Tensor, w: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """What the kernel multiplies: activations as it rounds them, weights as the format holds them."""
    if fmt == "f32":
        return x, w
    return x.bfloat16().float(), w.bfloat16().float() if fmt == "bf16" else quantize(w, fmt).dequantize()


@settings(max_examples=80, deadline=None)
@given(T=st.integers(0, 27), N=st.integers(1, 70), D=st.integers(1, 300), fmt=st.sampled_from(FORMATS),
       threads=st.integers(1, 3), seed=st.integers(0, 99))  # fmt: skip
def test_linear_is_within_the_rounding_of_its_sum(T: int, N: int, D: int, fmt: str, threads: int, seed: int) -> None:
    """|y - exact| <= (D + 2) * 2^-23 * sum |x w|: every order of adding D rounded products stays within it."""
    w, x = random(N, D, seed=seed), random(T, D, seed=seed + 1)
    a, b = rounded(x, w, fmt)
    bound = (D + 2) * 2**-23 * (a.double().abs() @ b.double().abs().t()) + 1e-30
    y = native(x, pack(kernels, [w], fmt), threads).double()
    assert ((y - a.double() @ b.double().t()).abs() <= bound).all()


@settings(max_examples=40, deadline=None)
@given(T=st.integers(1, 30), N=st.integers(1, 70), D=st.integers(1, 300), fmt=st.sampled_from(FORMATS))
def test_linear_bits_do_not_depend_on_batch_or_threads(T: int, N: int, D: int, fmt: str) -> None:
    x, w = random(T, D), pack(kernels, [random(N, D)], fmt)
    alone = torch.cat([native(x[t : t + 1].contiguous(), w) for t in range(T)])
    assert torch.equal(native(x, w, 1), alone)
    assert torch.equal(native(x, w, 2), alone)


def test_every_e4m3_value_is_decoded_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127]  # the two NaNs
    w = kernels.pack("fp8", codes[:, None].contiguous(), torch.ones(len(codes), 1), 4)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(native(torch.ones(1, 1), w)[0], expected)


@pytest.mark.parametrize(
    ("x", "y", "named"),
    [
        (random(2, 3), random(2, 5), "y"),
        (random(2, 3), random(1, 4), "y"),
        (random(2, 5), random(2, 4), "w"),
        (random(3), random(2, 4), "x"),
        (random(2, 3, dtype=torch.float64), random(2, 4), "x"),
        (random(2, 3), random(2, 4, dtype=torch.bfloat16), "y"),
        (random(3, 2).t(), random(2, 4), "x"),
    ],
)
def test_wrong_arguments_are_value_errors(x: Tensor, y: Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kernels.linear(x, kernels.pack("f32", random(4, 3)), y, 1)


@settings(max_examples=60, deadline=None)
@given(fmt=st.sampled_from((*FORMATS, "int3")), dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.int8, torch.uint8)),
       shape=st.lists(st.integers(0, 9), min_size=1, max_size=3), scales=st.lists(st.integers(0, 9), max_size=3),
       group=st.integers(0, 9), scale_rows=st.integers(0, 4))  # fmt: skip
def test_packing_takes_what_fits_and_names_what_does_not(fmt, dtype, shape, scales, group, scale_rows) -> None:
    data = torch.zeros(shape, dtype=dtype)
    try:
        w = kernels.pack(fmt, data, torch.ones(scales) if scales else None, group, scale_rows)
    except ValueError as error:
        assert str(error).split(":")[0] in ("format", "w", "scales", "group", "scale_rows")
    else:
        assert (w.rows, w.depth, w.format) == (*shape, fmt)


@pytest.mark.skipif("GLM52_ISA" in os.environ, reason="this is the run of one instruction set")
@pytest.mark.parametrize("isa", [i for i in kernels.isas() if i != kernels.isa()])
def test_every_other_instruction_set(isa: str) -> None:
    environment = os.environ | {"GLM52_ISA": isa, "PYTHONPATH": str(Path(glm52.__file__).parent.parent)}
    parity = Path(__file__).parent.parent / "parity" / "test_native.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", __file__, str(parity)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_instruction_set_is_named() -> None:
    environment = os.environ | {"GLM52_ISA": "sse9", "PYTHONPATH": str(Path(glm52.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", "import glm52._kernels"], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0 and "base" in done.stderr and "sse9" in done.stderr
