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
from glm52.packing import pack, pack_held
from glm52.quant import QTensor, quantize

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


def rounded(x: Tensor, fmt: str) -> Tensor:
    """Activations as products with weights of a format take them."""
    if fmt == "f32":
        return x
    return fixed(x) if fmt in ("int8", "int4", "int4z") else x.bfloat16().float()


def fixed(x: Tensor) -> Tensor:
    """The 16-bit integers of each 128 values, times the smallest power of two that keeps them within 127 * 256 + 127."""
    padded = torch.nn.functional.pad(x.double(), (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    largest = padded.abs().amax(-1, keepdim=True).clamp_min(2.0**-60)
    power = torch.exp2(14 - largest.log2().floor())
    power = torch.where(largest * power > 32639, power / 2, power)
    return ((padded * power).round() / power).flatten(-2)[..., : x.shape[-1]].float()


def held(w: Tensor, fmt: str) -> Tensor:
    """Weights as a format holds them."""
    return w if fmt == "f32" else w.bfloat16().float() if fmt == "bf16" else quantize(w, fmt).dequantize()


@settings(max_examples=80, deadline=None)
@given(T=st.integers(0, 27), N=st.integers(1, 70), D=st.integers(1, 300), fmt=st.sampled_from(FORMATS),
       threads=st.integers(1, 3), seed=st.integers(0, 99))  # fmt: skip
def test_linear_is_within_the_rounding_of_its_sum(T: int, N: int, D: int, fmt: str, threads: int, seed: int) -> None:
    """|y - exact| <= (D + 2) * 2^-23 * sum |x w|: every order of adding D rounded products stays within it."""
    w, x = random(N, D, seed=seed), random(T, D, seed=seed + 1)
    a, b = rounded(x, fmt), held(w, fmt)
    bound = (D + 2) * 2**-23 * (a.double().abs() @ b.double().abs().t()) + 1e-30
    y = native(x, pack(kernels, [w], fmt), threads).double()
    assert ((y - a.double() @ b.double().t()).abs() <= bound).all()


@settings(max_examples=40, deadline=None)
@given(T=st.integers(1, 70), N=st.integers(1, 70), D=st.integers(1, 300), fmt=st.sampled_from(FORMATS))
def test_linear_bits_do_not_depend_on_batch_or_threads(T: int, N: int, D: int, fmt: str) -> None:
    x, w = random(T, D), pack(kernels, [random(N, D)], fmt)
    alone = torch.cat([native(x[t : t + 1].contiguous(), w) for t in range(T)])
    assert torch.equal(native(x, w, 1), alone)
    assert torch.equal(native(x, w, 2), alone)


@pytest.mark.parametrize("fmt", FORMATS)
def test_bits_hold_where_numbers_are_subnormal(fmt: str) -> None:
    """Matrix units take subnormal numbers for zero; then so does one token alone."""
    x = random(9, 133) * torch.logspace(-40, -36, 133)
    w = pack(kernels, [random(20, 133, seed=1)], fmt)
    assert torch.equal(native(x, w), torch.cat([native(x[t : t + 1].contiguous(), w) for t in range(9)]))


def stored(fmt: str, N: int, D: int, group: int, seed: int) -> QTensor:
    """Any values a checkpoint may hold in a format: scales of their own for each group, and for int4z zeros."""
    generator = torch.Generator().manual_seed(seed)
    group = group if fmt == "fp8" else max(group, 32)
    groups = -(-D // group)
    scale = torch.rand(N, groups, generator=generator) + 0.1
    if fmt == "fp8":
        codes = torch.randint(0, 256, (N, D), dtype=torch.uint8, generator=generator)
        return QTensor(torch.where(codes & 127 == 127, 0, codes).view(torch.float8_e4m3fn), scale, "fp8", group)
    most = 128 if fmt == "int8" else 8
    data = torch.randint(-most, most, (N, D), dtype=torch.int8, generator=generator)
    zero = torch.randint(-8, 9, (N, groups), dtype=torch.int8, generator=generator) if fmt == "int4z" else None
    return QTensor(data, scale, "int8" if fmt == "int8" else "int4", group, zero)


def exact(w: QTensor) -> Tensor:
    """scale * (data - zero) in fp64, group by group."""
    zero = torch.zeros_like(w.scale) if w.zero is None else w.zero
    return torch.cat(
        [(part - zero[:, i : i + 1].double()) * w.scale[:, i : i + 1].double()
         for i, part in enumerate(w.data.double().split(w.group, 1))], 1,
    )  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(T=st.integers(1, 30), N=st.integers(1, 70), D=st.integers(1, 300), group=st.sampled_from((4, 32, 64, 128, 300)),
       fmt=st.sampled_from(("int8", "int4", "int4z", "fp8")), seed=st.integers(0, 99))  # fmt: skip
def test_stored_values_scales_and_zeros_are_what_is_multiplied(T, N, D, group, fmt, seed) -> None:
    """The bound of ``test_linear``: scale and sums are rounded, the values themselves are exact. Rows do not depend on the batch."""
    w, x = stored(fmt, N, D, group, seed), rounded(random(T, D, seed=seed), fmt)
    values = exact(w)
    packed = pack(kernels, [w], None)
    y = native(x, packed, 2)
    bound = (D + 2) * 2**-23 * (x.double().abs() @ values.abs().t()) + 1e-30
    assert ((y.double() - x.double() @ values.t()).abs() <= bound).all()
    assert torch.equal(y, torch.cat([native(x[t : t + 1].contiguous(), packed) for t in range(T)]))


@pytest.mark.parametrize("fmt", ["int8", "int4", "int4z", "fp8"])
def test_packed_values_decode_to_exactly_what_is_stored(fmt: str) -> None:
    """A product with each unit vector gives the column back, to the bit; scales are powers of two."""
    w = stored(fmt, 70, 133, 64, 0)
    w = QTensor(w.data, torch.exp2((w.scale * 9).round()), w.format, w.group, w.zero)
    assert torch.equal(native(torch.eye(133), pack(kernels, [w], w.format)).t(), w.dequantize())


@settings(max_examples=40, deadline=None)
@given(T=st.integers(1, 40), D=st.integers(1, 40), F=st.integers(1, 40), fmt=st.sampled_from(("int8", "int4", "int4z", "fp8")),
       group=st.sampled_from((4, 32, 128)), seed=st.integers(0, 99))  # fmt: skip
def test_experts_of_stored_values(T: int, D: int, F: int, fmt: str, group: int, seed: int) -> None:
    """Against fp64. h leaves the first product with its sums' rounding, then is rounded for the second: to bf16, 2^-9 of
    each value, or to 16-bit integers, 2^-15 of the largest; taken twice. Bits are those of one token alone."""
    E, K = 4, 2
    parts = [stored(fmt, *shape, group, seed + i) for i in range(E) for shape in ((F, D), (F, D), (D, F))]
    experts = [
        (pack_held(kernels, parts[i : i + 2], alternate=True), pack(kernels, [parts[i + 2]], None))
        for i in range(0, 3 * E, 3)
    ]
    x = rounded(random(T, D, seed=seed) / 16 / D, fmt)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int()
    weights, expected, bound = torch.rand(T, K), torch.zeros(T, D).double(), torch.zeros(T, D).double()
    for t in range(T):
        for e, weight in zip(ids[t].tolist(), weights[t].double(), strict=True):
            gate, up, down = map(exact, parts[3 * e : 3 * e + 3])
            h = torch.nn.functional.silu(gate @ x[t].double()) * (up @ x[t].double())
            sums = (up.abs() @ x[t].abs().double()) * (1 + gate.abs() @ x[t].abs().double())
            expected[t] += weight * (down @ h)
            rounding = 2**-8 * h.abs() if fmt == "fp8" else 2**-14 * h.abs().amax().expand_as(h)
            bound[t] += weight * (down.abs() @ (rounding + (D + 4) * 2**-23 * sums))
    y = torch.zeros(T, D)
    kernels.expert_ffn(x, ids, weights, experts, y, 2)
    assert ((y - expected).abs() <= bound + 1e-30).all()
    for t in range(T):
        alone = torch.zeros(1, D)
        kernels.expert_ffn(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], experts, alone, 1)
        assert torch.equal(alone[0], y[t])


def test_all_values_less_all_zeros() -> None:
    """int4: 16 values less 17 zeros, in rows and groups of their own."""
    value, zero = (t.to(torch.int8) for t in torch.meshgrid(torch.arange(-8, 8), torch.arange(-8, 9), indexing="ij"))
    data = value.repeat_interleave(32, 1)
    w = kernels.pack("int4", data, torch.ones(16, 17), 32, zeros=zero)
    x = torch.zeros(17, 17 * 32)
    x[torch.arange(17), torch.arange(17) * 32 + torch.arange(17)] = 1.0
    assert torch.equal(native(x, w).t(), (value - zero).float())
    for wrong in (zero * 2, zero[:1].contiguous(), zero.float()):
        with pytest.raises(ValueError, match="zeros"):
            kernels.pack("int4", data, torch.ones(16, 17), 32, zeros=wrong)
    with pytest.raises(ValueError, match="zeros"):
        kernels.pack("int8", data, torch.ones(16, 17), 32, zeros=zero)
    for wrong in (-9, 8):
        data[3, 5] = wrong
        with pytest.raises(ValueError, match="-8 to 7"):
            kernels.pack("int4", data, torch.ones(16, 17), 32)


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
    done = subprocess.run([sys.executable, "-c", "import glm52.ops"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "ConfigError" in done.stderr and "base" in done.stderr and "sse9" in done.stderr
