"""The experts of GLM-5.2 at their true widths: 8 of 16 experts of 6144 x 2048, in every format, at 1, 8 and 32 tokens.

    python -m bench.experts [--formats bf16,fp8,int8,int4] [--tokens 1,8,32] [--threads 1,2]

The bound is the larger of bytes over read bandwidth (experts that any token chose are read once) and FLOPs over the
bf16 matmul peak, both measured in the same run. torch's bf16 linear is timed on the same products.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.common import finish, matmul_peak, read_bandwidth
from glm52 import ops
from glm52.packing import hold, pack, pack_held

D, F, E, K = 6144, 2048, 16, 8


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def torch_bf16(x: Tensor, ids: Tensor, weights: Tensor, gate_up: list[Tensor], down: list[Tensor]) -> Tensor:
    """The same function with torch's bf16 linear, expert by expert."""
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        hidden = torch.nn.functional.linear(x[token].bfloat16(), gate_up[e]).float()
        gate, up = hidden.chunk(2, dim=-1)
        out = torch.nn.functional.linear((torch.nn.functional.silu(gate) * up).bfloat16(), down[e]).float()
        y.index_add_(0, token, out * weights[token, slot, None])
    return y


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", default="bf16,fp8,int8,int4")
    parser.add_argument("--tokens", default="1,8,32")
    parser.add_argument("--threads", default="1,2")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    kernels, results = ops.kernels(), []
    gate_up = [torch.randn(2 * F, D, generator=generator) * D**-0.5 for _ in range(E)]
    down = [torch.randn(D, F, generator=generator) * F**-0.5 for _ in range(E)]
    halves = [w.bfloat16() for w in gate_up], [w.bfloat16() for w in down]
    for fmt in args.formats.split(","):
        experts = [(pack_held(kernels, [hold(w, fmt) for w in g.chunk(2)], alternate=True), pack(kernels, [d], fmt))
                   for g, d in zip(gate_up, down, strict=True)]  # fmt: skip
        for tokens in map(int, args.tokens.split(",")):
            x = torch.randn(tokens, D, generator=generator)
            ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(tokens)]).int()
            weights = torch.rand(tokens, K, generator=generator)
            exact = torch_bf16(x.double().float(), ids, weights, *halves)
            y = torch.zeros_like(x)
            kernels.expert_ffn(x, ids, weights, experts, y, 2)
            error = ((y - exact).norm() / exact.norm()).item()
            used = len(ids.unique())
            read = sum(g.num_bytes + d.num_bytes for g, d in experts) / E * used
            flops = 2 * tokens * K * 3 * D * F
            for threads in map(int, args.threads.split(",")):
                bandwidth, peak = read_bandwidth(threads), matmul_peak(threads)
                ours = median_seconds(lambda: kernels.expert_ffn(x, ids, weights, experts, y, threads), 15)  # noqa: B023
                theirs = median_seconds(lambda: torch_bf16(x, ids, weights, *halves), 5)  # noqa: B023
                bound = max(read / bandwidth, flops / peak)
                print(f"{fmt:<5} {tokens:>3} tokens {threads} threads: {ours * 1e3:7.2f} ms  "
                      f"{read / ours / 1e9:6.1f} GB/s {flops / ours / 1e9:6.0f} GFLOP/s   "
                    f"bound {bound * 1e3:6.2f} ms, {bound / ours:.0%} of it   "
                      f"torch bf16 {theirs * 1e3:7.2f} ms   differs from bf16 by {error:.4f}", flush=True)  # fmt: skip
                results.append({"format": fmt, "tokens": tokens, "threads": threads, "seconds": ours, "bytes": read,
                                "flops": flops, "bandwidth": bandwidth, "peak": peak, "torch_bf16": theirs,
                                "error": error})  # fmt: skip
    finish({"results": results})


if __name__ == "__main__":
    main()
