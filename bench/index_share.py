"""One IndexShare group of GLM-5.2 at true width over a million tokens: a full layer and three that share with it.

    python -m bench.index_share [--context 1048576] [--threads 2] [--steps 8]

The same four layers are then given an indexer each. Weights and the cache's content are random and there are 8 experts
a layer, all of them active, so that a token costs what it costs in the model. The memory computed is weights and cache.
"""

import argparse
import gc
import math
import resource
import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.common import finish, matmul_peak, read_bandwidth
from bench.context import fill
from glm52.cache import Spans
from glm52.config import GLMConfig
from glm52.contents import expected_tensors
from glm52.native import NativeGLM


@dataclass
class RandomWeights:
    """The same numbers over and over: what a product costs does not depend on them."""

    config: GLMConfig

    def __post_init__(self) -> None:
        self.shapes = expected_tensors(self.config)
        self.values = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()

    def weight(self, name: str) -> Tensor:
        shape = self.shapes[name]
        size, scale = math.prod(shape), shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        return (self.values.repeat(-(-size // len(self.values)))[:size] * scale).view(shape)


def random_group(indexer_types: tuple[str, ...], threads: int) -> NativeGLM:
    config = replace(
        GLMConfig.preset("glm-5.2"), num_hidden_layers=4, indexer_types=indexer_types, mlp_layer_types=("sparse",) * 4,
        n_routed_experts=8, vocab_size=64, num_nextn_predict_layers=0,
    )  # fmt: skip
    return NativeGLM(RandomWeights(config), "bf16", threads)


@torch.inference_mode()
def step_seconds(model: NativeGLM, context: int, steps: int) -> tuple[float, float, int]:
    """Median seconds of a step and of its searches, and the bytes of the cache."""
    cache = model.new_cache(context + 64)
    fill(cache, model)
    spans, times = Spans.of_sequence(context - 1, context), []
    for step in range(steps):
        before, began = model.select_s, time.perf_counter()
        model(torch.tensor([step]), spans, cache)
        times.append((time.perf_counter() - began, model.select_s - before))
    return statistics.median(a for a, _ in times[1:]), statistics.median(b for _, b in times[1:]), cache.num_bytes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--context", type=int, default=1 << 20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, tuple[float, float]] = {}
    at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for name, kinds in (("shared", ("full", *["shared"] * 3)), ("own", ("full",) * 4)) * 2:  # in turn
        model = random_group(kinds, args.threads)
        gc.collect()
        seconds, scan, cache_bytes = step_seconds(model, args.context, args.steps)
        results[name] = min(results.get(name, (seconds, scan)), (seconds, scan))
        print(f"{name:<7} {seconds * 1e3:8.1f} ms a token, {scan * 1e3:8.1f} ms of it searching; cache "
              f"{cache_bytes / 1e9:.2f} GB", flush=True)  # fmt: skip
        config = model.config
        weights = 2 * config.num_parameters()
        del model
    bandwidth, peak = read_bandwidth(args.threads), matmul_peak(args.threads)
    key = args.context * config.index_head_dim
    bound = max(2 * key / bandwidth, 2 * key * config.index_n_heads / peak)
    print(f"a search's bound: {bound * 1e3:.1f} ms, {bound / results['shared'][1]:.0%} of it reached")
    rest = results["shared"][0] - results["shared"][1]
    computed = (rest + 4 * results["shared"][1]) / (rest + results["shared"][1])
    print(f"sharing makes a token {results['own'][0] / results['shared'][0]:.2f}x faster; computed from the shared run "
          f"{computed:.2f}x")  # fmt: skip
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - at_start
    print(f"peak memory beyond Python's and torch's {at_start / 1e9:.2f} GB: {used / 1e9:.2f} GB; weights and cache "
          f"{(weights + cache_bytes) / 1e9:.2f} GB")  # fmt: skip
    finish({"context": args.context, "threads": args.threads, "seconds": results, "peak_bytes": used,
            "weights": weights, "cache": cache_bytes, "bound": bound})  # fmt: skip


if __name__ == "__main__":
    main()
