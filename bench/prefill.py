"""Prefill speed and its share of the matmul peak; and what a step of many sequences costs against a step of one.

    python -m bench.prefill MODEL [--format bf16] [--contexts 512,4096] [--chunk 512] [--threads 2] [--batch 8]

FLOPs of a token: two per active weight without the output head (prompts need no logits), the absorbed attention over
the rows it may select, and the index scores of every visible key once there are more than it selects. The peak is
torch's bf16 matrix product, taken just before and just after each prompt: a matrix unit may run fast for a moment and
slower for as long as a prompt takes. The bound of a batched step counts the experts its tokens choose on
average.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.common import finish, matmul_peak, read_bandwidth
from bench.decode import BYTES, bytes_per_token
from glm52.cache import Spans
from glm52.config import GLMConfig
from glm52.load import load
from glm52.native import NativeGLM


def prompt_flops(config: GLMConfig, length: int) -> float:
    """Of all tokens of a prompt together."""
    weights = 2.0 * length * (config.active_parameters() - config.vocab_size * config.hidden_size)
    selected = sum(min(t + 1, config.index_topk) for t in range(length))
    core = 2.0 * config.num_hidden_layers * selected * config.num_attention_heads
    scored = sum(t + 1 for t in range(config.index_topk, length))
    per_key = config.indexer_types.count("full") * config.index_n_heads * config.index_head_dim
    return weights + core * (config.row_width + config.kv_lora_rank) + 2.0 * scored * per_key


@torch.inference_mode()
def prefill_seconds(model: NativeGLM, length: int, chunk: int) -> float:
    cache = model.new_cache(-(-length // 64) * 64)
    ids = torch.randint(2, model.config.vocab_size - 2, (length,), generator=torch.Generator().manual_seed(length))
    began = time.perf_counter()
    for begin in range(0, length, chunk):
        end = min(begin + chunk, length)
        model(ids[begin:end], Spans.of_sequence(begin, end), cache)
    return time.perf_counter() - began


@torch.inference_mode()
def step_seconds(model: NativeGLM, batch: int, context: int = 128, steps: int = 24) -> float:
    """Median seconds of a decode step of so many sequences with random tokens."""
    cache, rng = model.new_cache(batch * 256), torch.Generator().manual_seed(0)
    for s in range(batch):
        ids = torch.randint(2, model.config.vocab_size - 2, (context,), generator=rng)
        model(ids, _spans(batch, s, 0, context), cache)
    times = []
    for step in range(steps):
        ids = torch.randint(2, model.config.vocab_size - 2, (batch,), generator=rng)
        positions = torch.full((batch,), context + step)
        spans = Spans(
            where_3T=torch.stack((positions, torch.arange(batch) * 256 + positions, torch.arange(batch))),
            tables_SP=_tables(batch), page_size=64,
        )  # fmt: skip
        began = time.perf_counter()
        model.logits(model(ids, spans, cache)).argmax(-1)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _tables(batch: int) -> torch.Tensor:
    return (torch.arange(batch)[:, None] * 4 + torch.arange(4)).int()


def _spans(batch: int, seq: int, begin: int, end: int) -> Spans:
    positions = torch.arange(begin, end)
    return Spans(
        where_3T=torch.stack((positions, positions + seq * 256, torch.zeros_like(positions))),
        tables_SP=_tables(batch)[seq : seq + 1], page_size=64,
    )  # fmt: skip


def batched_bytes(config: GLMConfig, fmt: str, batch: int, context: int) -> float:
    """What a step must read if each token draws its experts evenly: E (1 - (1 - K / E)^batch) of them a layer."""
    one = bytes_per_token(config, fmt, context)
    E, K = config.n_routed_experts, config.num_experts_per_tok
    sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    expert = 3 * config.hidden_size * config.moe_intermediate_size * BYTES[fmt]
    return one + sparse * expert * (E * (1 - (1 - K / E) ** batch) - K)


def measured_prompt(model: NativeGLM, length: int, chunk: int, threads: int) -> dict[str, Any]:
    """The fastest of three, with the peaks around it."""
    runs = []
    for _ in range(3):
        before = matmul_peak(threads)
        runs.append((prefill_seconds(model, length, chunk), before, matmul_peak(threads)))
    flops, (seconds, *peaks) = prompt_flops(model.config, length), min(runs)
    shares = " and ".join(f"{flops / seconds / peak:.0%}" for peak in peaks)
    print(f"prefill {length:>6} tokens: {length / seconds:7.0f} tokens/s   {flops / seconds / 1e9:6.0f} GFLOP/s, "
          f"{shares} of the matmul peak before and after ({peaks[0] / 1e9:.0f} and {peaks[1] / 1e9:.0f})",
          flush=True)  # fmt: skip
    return {"length": length, "flops": flops, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--contexts", default="512,4096")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = NativeGLM(load(args.model, dtype=torch.bfloat16), args.format, args.threads)
    gc.freeze()
    results = [
        measured_prompt(model, length, args.chunk, args.threads) for length in map(int, args.contexts.split(","))
    ]
    bandwidth = read_bandwidth(args.threads)
    steps = {batch: step_seconds(model, batch) for batch in (1, args.batch)}
    bounds = {batch: batched_bytes(model.config, args.format, batch, 128) / bandwidth for batch in steps}
    for batch, seconds in steps.items():
        most = batch * bounds[1] / bounds[batch]
        print(f"a step of {batch:>2} sequences: {seconds * 1e3:7.2f} ms, {batch / seconds:6.0f} tokens/s "
              f"({batch / seconds * steps[1]:.2f}x one; {most:.2f}x at most by bandwidth), "
              f"bound {bounds[batch] * 1e3:6.2f} ms, {bounds[batch] / seconds:.0%} of it", flush=True)  # fmt: skip
    finish({"model": args.model.name, "format": args.format, "threads": args.threads, "bandwidth": bandwidth,
            "prefill": results, "step_seconds": steps})  # fmt: skip


if __name__ == "__main__":
    main()
