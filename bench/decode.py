"""Decode speed of one sequence, against the memory it must read: every format, one and two threads, several contexts.

    python -m bench.decode MODEL [--formats bf16,int8,int4] [--contexts 128,4096] [--threads 1,2] [--steps 32]

The bound of a token: bytes of the weights it multiplies (its own experts only), of the rows it attends to and of the
index keys it scores, over the read bandwidth measured in the same run, before and after the timed steps.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

import torch

from bench.common import finish, read_bandwidth
from glm52.cache import Spans
from glm52.config import GLMConfig
from glm52.load import load
from glm52.native import NativeGLM

SCALED = {"int8": 1 + 4 / 128, "int4": 0.5 + 4 / 64, "fp8": 1 + 4 / 128}
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
def decode_seconds(model: NativeGLM, contexts: list[int], steps: int) -> dict[int, float]:
    """Median seconds of a step at each context, the contexts interleaved; the prompt is really computed."""
    longest = max(contexts) + steps + 8
    cache = model.new_cache(-(-longest // 64) * 64)
    ids = torch.randint(2, model.config.vocab_size - 2, (longest,), generator=torch.Generator().manual_seed(0))
    for begin in range(0, max(contexts), 512):
        end = min(begin + 512, max(contexts))
        model(ids[begin:end], Spans.of_sequence(begin, end), cache)
    times: dict[int, list[float]] = {c: [] for c in contexts}
    for step in range(steps):
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
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args()
    contexts = [int(c) for c in args.contexts.split(",")]
    results = []
    for fmt in args.formats.split(","):
        source = load(args.model, dtype=torch.float32 if fmt == "f32" else torch.bfloat16)
        model = NativeGLM(source, fmt, threads=2)
        del source
        gc.freeze()
        for threads in map(int, args.threads.split(",")):
            torch.set_num_threads(threads)
            model.threads = threads
            before = read_bandwidth(threads)
            seconds = decode_seconds(model, contexts, args.steps)
            bandwidth = (before + read_bandwidth(threads)) / 2
            for context in contexts:
                wanted = bytes_per_token(model.config, fmt, context)
                bound = wanted / bandwidth
                print(f"{fmt:<5} {threads} threads, context {context:>6}: {seconds[context] * 1e3:7.2f} ms  "
                      f"{1 / seconds[context]:6.0f} tokens/s   bound {bound * 1e3:6.2f} ms ({wanted / 1e6:.0f} MB at "
                      f"{bandwidth / 1e9:.1f} GB/s)   {bound / seconds[context]:.0%} of it", flush=True)  # fmt: skip
                results.append({"format": fmt, "threads": threads, "context": context, "seconds": seconds[context],
                                "bytes": wanted, "bandwidth": bandwidth})  # fmt: skip
    finish({"model": args.model.name, "results": results})


if __name__ == "__main__":
    main()
