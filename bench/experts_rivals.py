"""8 of 16 experts of GLM-5.2's width as ours, kt-kernel and torch compute them; ``bench.rivals`` serves them.

Every engine makes the same bf16 weights from a seed and brings them into its own format; errors are against fp32 on
those bf16 weights, so they hold what the format loses. Requests: open (fmt, threads), run, output.
"""

import base64
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

D, F, E, K = 6144, 2048, 16, 8
Linear = Callable[[Tensor], Tensor]


def bf16_weights() -> tuple[list[Tensor], list[Tensor]]:
    """gate above up [2F, D], and down [D, F], of every expert."""
    rng = torch.Generator().manual_seed(0)
    gate_up = [(torch.randn(2 * F, D, generator=rng) * D**-0.5).bfloat16() for _ in range(E)]
    return gate_up, [(torch.randn(D, F, generator=rng) * F**-0.5).bfloat16() for _ in range(E)]


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D] fp32 that bf16 holds exactly, expert ids [T, K] int32, weights [T, K] fp32."""
    rng = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, D, generator=rng).bfloat16().float()
    ids = torch.stack([torch.randperm(E, generator=rng)[:K] for _ in range(tokens)]).int()
    return x, ids, torch.rand(tokens, K, generator=rng)


def mixture(
    x: Tensor, ids: Tensor, weights: Tensor, experts: list[tuple[Linear, Linear]], dtype: torch.dtype
) -> Tensor:
    """The function itself, expert by expert, with whatever multiplies."""
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = experts[e][0](x[token].to(dtype)).float().chunk(2, dim=-1)
        out = experts[e][1]((torch.nn.functional.silu(gate) * up).to(dtype)).float()
        y.index_add_(0, token, out * weights[token, slot, None])
    return y


def oracle(token_counts: list[int]) -> dict[int, Tensor]:
    """fp32 on the bf16 weights."""
    experts = [(_linear(g), _linear(d)) for g, d in zip(*bf16_weights(), strict=True)]
    return {tokens: mixture(*inputs(tokens), experts, torch.float32) for tokens in token_counts}


def _linear(weight: Tensor) -> Linear:
    return lambda x: torch.nn.functional.linear(x, weight.to(x.dtype))


def error(answer: str, exact: Tensor) -> float:
    """|y - exact| / |exact| of an encoded output."""
    y = torch.frombuffer(bytearray(base64.b64decode(answer)), dtype=torch.float32).view_as(exact)
    return float((y - exact).norm() / exact.norm())


class Experts:
    """What the three have in common: the weights, and the requests."""

    def __init__(self) -> None:
        self.gate_up, self.down = bf16_weights()

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def run(self, tokens: int, repeats: int) -> dict[str, Any]:
        """Seconds of each repeat after one that is not counted."""
        given, seconds = inputs(tokens), []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            self.forward(*given)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds[1:]}

    def output(self, tokens: int) -> dict[str, Any]:
        return {"y": base64.b64encode(self.forward(*inputs(tokens)).float().numpy().tobytes()).decode()}


class Ours(Experts):
    """``expert_ffn``; fmt bf16, fp8, int8 or int4."""

    fmt = ""

    def open(self, fmt: str, threads: int) -> dict[str, Any]:
        from glm52 import ops
        from glm52.native import pack

        self.kernels, self.threads = ops.kernels(), threads
        if fmt != self.fmt:
            self.experts: Any = None
            self.experts = [(pack(self.kernels, g.chunk(2), fmt, alternate=True), pack(self.kernels, [d], fmt))  # type: ignore[arg-type]
                            for g, d in zip(self.gate_up, self.down, strict=True)]  # fmt: skip
            self.fmt = fmt
        return {"bytes": sum(g.num_bytes + d.num_bytes for g, d in self.experts)}

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        self.kernels.expert_ffn(x, ids, weights, self.experts, y, self.threads)
        return y


class KTKernel(Experts):
    """kt-kernel's mixtures of experts; fmt bf16, fp8 (blocks of 128), fp8_channel, int8 or int4 (a scale a row), or
    int4_32 (a scale for 32 values)."""

    fmt = ""
    kept: Any = None  # the weights in this format

    def open(self, fmt: str, threads: int) -> dict[str, Any]:
        import kt_kernel

        kernels = kt_kernel.kt_kernel_ext
        pool = kernels.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        self.moe: Any = None
        self.engine = kernels.CPUInfer(pool)
        self.mask = torch.zeros(E, dtype=torch.bool)
        config = kernels.moe.MOEConfig(E, K, D, F, self.mask.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, self.engine.backend_, 512
        name = self._give(config, fmt)
        self.moe = getattr(kernels.moe, name)(config)
        order = torch.arange(E, dtype=torch.int64)
        self.engine.submit(self.moe.load_weights_task(order.data_ptr()))
        self.engine.sync()
        return {"kernel": name, "variant": kt_kernel.__cpu_variant__}

    def _give(self, config: Any, fmt: str) -> str:
        """Point the configuration at weights in this format; the name of the class that takes them."""
        gate, up = zip(*(w.chunk(2) for w in self.gate_up), strict=True)
        parts = {"gate": list(gate), "up": list(up), "down": self.down}
        if fmt in ("int8", "int4"):
            self.fmt, self.kept = fmt, {name: torch.stack(matrices) for name, matrices in parts.items()}
            for name, matrix in self.kept.items():
                setattr(config, f"{name}_proj", matrix.data_ptr())
            return {"int8": "AMXInt8_MOE", "int4": "AMXInt4_MOE"}[fmt]
        if fmt != self.fmt:
            self.kept = None
            self.kept = {name: [_kt_format(w, fmt) for w in matrices] for name, matrices in parts.items()}
            self.fmt = fmt
        for name, pairs in self.kept.items():
            setattr(config, f"{name}_projs", [[data.data_ptr() for data, _ in pairs]])
            setattr(config, f"{name}_scales", [[0 if scale is None else scale.data_ptr() for _, scale in pairs]])
        quant = config.quant_config
        quant.bits, quant.group_size, quant.zero_point = {
            "bf16": (16, 0, False), "fp8": (8, 128, False), "fp8_channel": (8, 0, False), "int4_32": (4, 32, False)
        }[fmt]  # fmt: skip
        quant.per_channel = fmt == "fp8_channel"
        return {"bf16": "AMXBF16_MOE", "fp8": "AMXFP8_MOE", "fp8_channel": "AMXFP8PerChannel_MOE",
                "int4_32": "AMXInt4_KGroup_MOE"}[fmt]  # fmt: skip

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x, ids, y = x.bfloat16(), ids.long().contiguous(), torch.empty(x.shape, dtype=torch.bfloat16)
        count = torch.tensor([len(x)], dtype=torch.int32)
        task = self.moe.forward_task(
            count.data_ptr(), K, ids.data_ptr(), weights.data_ptr(), x.data_ptr(), y.data_ptr(), False
        )
        self.engine.submit(task)
        self.engine.sync()
        return y


def _kt_format(w: Tensor, fmt: str) -> tuple[Tensor, Tensor | None]:
    from glm52.quant import quantize_fp8

    if fmt == "bf16":
        return w.contiguous(), None
    if fmt == "fp8":
        data, scale = quantize_fp8(w.float())
        return data.contiguous(), scale.contiguous()
    if fmt == "fp8_channel":
        scale = w.float().abs().amax(1, keepdim=True) / 448
        return (w.float() / scale).to(torch.float8_e4m3fn).contiguous(), scale.contiguous()
    groups = w.float().view(len(w), -1, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16()
    nibbles = ((groups / scale.float()).round().clamp(-8, 7) + 8).to(torch.int32).view(len(w), -1, 8)
    packed = (nibbles << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1).to(torch.int32)  # the low nibble first
    return packed.contiguous(), scale.squeeze(-1).contiguous()


class Torch(Experts):
    """torch's own operators; fmt bf16, int8 and int4 (weights only), or int8_dynamic (activations too)."""

    fmt = ""

    def open(self, fmt: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        if fmt != self.fmt:
            self.experts: Any = None
            self.experts = [tuple(_torch_linear(w, fmt) for w in pair)
                            for pair in zip(self.gate_up, self.down, strict=True)]  # fmt: skip
            self.fmt = fmt
        return {}

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        dtype = torch.float32 if self.fmt == "int8_dynamic" else torch.bfloat16
        return mixture(x, ids, weights, self.experts, dtype)


def _torch_linear(w: Tensor, fmt: str) -> Linear:
    from glm52.quant import quantize

    if fmt == "bf16":
        return _linear(w)
    if fmt == "int4":
        q = quantize(w, "int4")
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((q.data.int() + 8), 2)
        scales = torch.stack((q.scale, torch.zeros_like(q.scale)), -1).transpose(0, 1).bfloat16().contiguous()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, q.group, scales)
    scale = w.float().abs().amax(1) / 127
    data = (w.float() / scale[:, None]).round().to(torch.int8)
    if fmt == "int8":
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, data, scale.bfloat16())
    rows = torch._make_per_channel_quantized_tensor(data, scale.double(), torch.zeros(len(w), dtype=torch.int64), 0)
    handle = torch.ops.quantized.linear_prepack(rows, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, handle, reduce_range=False)
