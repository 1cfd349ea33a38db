"""Decode speed of one sequence, against the memory it must read: every format, one and two threads, several contexts.

    python -m bench.decode MODEL [--formats bf16,int8,int4] [--contexts 128,4096] [--threads 1,2] [--rounds 8]

The bound of a token: bytes of the weights it multiplies (its own experts only), of the rows it attends to and of the
index keys it scores, over the read bandwidth. That is measured anew around every few steps, for a virtual machine's
cores may be moved: what is printed are medians over these rounds, the share among them.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from bench.common import finish, read_bandwidth
from glm52.cache import Spans
from glm52.config import GLMConfig
from glm52.load import load
from glm52.native import NativeCache, NativeGLM

SCALED = {"int8": 1 + 4 / 128, "int4": 0.5 + 4 / 64, "fp8": 1 + 4 / 128}
STEPS = 8  # of each context between two measurements of bandwidth
BYTES = {"f32": 4.0, "bf16": 2.0} | SCALED


def bytes_per_token(config: GLMConfig, fmt: str, context: int) -> float:
    """Of one decoded token; the formats of the head and of kv_b_proj are those of ``NativeGLM``."""
    soft = BYTES[{"int4": "int8", "fp8": "bf16"}.get(fmt, fmt)]
    H, C, D = config.num_attention_heads, config.kv_lora_rank, config.hidden_size
    kv_b = config.num_hidden_layers * C * H * (config.qk_nope_head_dim + config.v_head_dim)
    sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    full = config.indexer_types.count("full")
    exact = sparse * config.n_routed_experts * D + full * config.index_n_heads * D
    head = config.vocab_size * D
    weights = BYTES[fmt] * (config.active_parameters() - kv_b - exact - head) + soft * (kv_b + head) + 4 * exact
    value = 4 if fmt == "f32" else 2
    rows = config.num_hidden_layers * min(context, config.index_topk) * config.row_width
    keys = full * context * config.index_head_dim if context > config.index_topk else 0
    return weights + value * (rows + keys)


@torch.inference_mode()
def prompt(model: NativeGLM, contexts: list[int], steps: int) -> tuple[Tensor, NativeCache]:
    """Random tokens and a cache that holds all but the last ``steps`` of them, really computed."""
    longest = max(contexts) + steps
    cache = model.new_cache(-(-longest // 64) * 64)
    ids = torch.randint(2, model.config.vocab_size - 2, (longest,), generator=torch.Generator().manual_seed(0))
    for begin in range(0, max(contexts), 512):
        end = min(begin + 512, max(contexts))
        model(ids[begin:end], Spans.of_sequence(begin, end), cache)
    return ids, cache


@torch.inference_mode()
def decode_seconds(
    model: NativeGLM, ids: Tensor, cache: NativeCache, contexts: list[int], steps: range
) -> dict[int, float]:
    """Median seconds of a step at each context, the contexts interleaved."""
    times: dict[int, list[float]] = {c: [] for c in contexts}
    for step in steps:
        for context in contexts:
            at = context + step
            spans = Spans.of_sequence(at, at + 1)
            began = time.perf_counter()
            model.logits(model(ids[at : at + 1], spans, cache)).argmax()
            times[context].append(time.perf_counter() - began)
    return {c: statistics.median(t) for c, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--contexts", default="128,4096")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=8, help=f"of {STEPS} steps at each context")
    args = parser.parse_args()
    contexts = [int(c) for c in args.contexts.split(",")]
    results = []
    for fmt in args.formats.split(","):
        source = load(args.model, dtype=torch.float32 if fmt == "f32" else torch.bfloat16)
        model = NativeGLM(source, fmt, threads=2)
        del source
        gc.freeze()
        ids, cache = prompt(model, contexts, args.rounds * STEPS)
        for threads in map(int, args.threads.split(",")):
            torch.set_num_threads(threads)
            model.threads = threads
            rounds, before = [], read_bandwidth(threads, repeats=1)
            for first in range(0, args.rounds * STEPS, STEPS):
                seconds = decode_seconds(model, ids, cache, contexts, range(first, first + STEPS))
                after = read_bandwidth(threads, repeats=1)
                rounds.append((seconds, (before + after) / 2))
                before = after
            for context in contexts:
                wanted = bytes_per_token(model.config, fmt, context)
                took = statistics.median(seconds[context] for seconds, _ in rounds)
                bandwidth = statistics.median(speed for _, speed in rounds)
                share = statistics.median(wanted / speed / seconds[context] for seconds, speed in rounds)
                print(f"{fmt:<5} {threads} threads, context {context:>6}: {took * 1e3:7.2f} ms  "
                      f"{1 / took:6.0f} tokens/s   bound {wanted / bandwidth * 1e3:6.2f} ms ({wanted / 1e6:.0f} MB at "
                      f"{bandwidth / 1e9:.1f} GB/s)   {share:.0%} of it", flush=True)  # fmt: skip
                results.append({"format": fmt, "threads": threads, "context": context, "seconds": took,
                                "bytes": wanted, "bandwidth": bandwidth, "share": share})  # fmt: skip
    finish({"model": args.model.name, "results": results})


if __name__ == "__main__":
    main()
