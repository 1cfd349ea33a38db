"""Decode time against context length: flat beyond ``index_topk``, but for the indexer's scan, shown apart.

    python -m bench.context MODEL [--format bf16] [--contexts 128,1024,4096,16384,65536] [--threads 2] [--plot FILE.png]

The scan's bound is the larger of key bytes over read bandwidth and FLOPs over the bf16 matmul peak of the same run. The
prompt is not computed: the cache holds random rows and keys, which cost the same.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

import torch

from bench.common import finish, matmul_peak, read_bandwidth
from glm52.cache import Spans
from glm52.load import load
from glm52.native import NativeCache, NativeGLM
from glm52.quant import WeightFormat


def fill(cache: NativeCache, model: NativeGLM) -> None:
    """Rows and keys of N(0, 1) in every layer."""
    config = model.config
    dtype = torch.float32 if model.format == "f32" else torch.bfloat16
    for layer in range(config.num_hidden_layers):
        views = [cache.handle.rows(layer)] + ([cache.handle.keys(layer)] if layer in config.index_layers else [])
        for view in views:
            values = view.view(dtype)
            block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(layer)).to(dtype)
            for begin in range(0, len(values), len(block)):
                part = values[begin : begin + len(block)]
                part.copy_(block[: len(part)])


@torch.inference_mode()
def measure(model: NativeGLM, contexts: list[int], steps: int) -> dict[int, tuple[float, float]]:
    """Median seconds of a step, and of the search in it, at each context, interleaved."""
    cache = model.new_cache(max(contexts) + 64)
    fill(cache, model)
    times: dict[int, list[tuple[float, float]]] = {c: [] for c in contexts}
    ids = torch.randint(2, model.config.vocab_size - 2, (steps,), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        for context in contexts:
            spans, before = Spans.of_sequence(context, context + 1), model.select_s
            began = time.perf_counter()
            model.logits(model(ids[step : step + 1], spans, cache)).argmax()
            times[context].append((time.perf_counter() - began, model.select_s - before))
    return {c: (statistics.median(a for a, _ in t), statistics.median(b for _, b in t)) for c, t in times.items()}


def plot(results: list[dict[str, float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    x = [r["context"] for r in results]
    axes.plot(x, [r["seconds"] * 1e3 for r in results], marker="o", label="a token")
    axes.plot(x, [(r["seconds"] - r["scan"]) * 1e3 for r in results], marker="o", label="without the indexer's scan")
    axes.set(xlabel="context (tokens)", ylabel="milliseconds", xscale="log", ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--contexts", default="128,1024,4096,16384,65536")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    fmt: WeightFormat = args.format
    torch.set_num_threads(args.threads)
    model = NativeGLM(load(args.model, dtype=torch.float32 if fmt == "f32" else torch.bfloat16), fmt, args.threads)
    gc.freeze()
    c = model.config
    bandwidth, peak = read_bandwidth(args.threads), matmul_peak(args.threads)
    full, value = c.indexer_types.count("full"), 4 if fmt == "f32" else 2
    results = []
    for context, (seconds, scan) in measure(model, [int(x) for x in args.contexts.split(",")], args.steps).items():
        scanned = full * context * (context > c.index_topk)
        bound = max(scanned * c.index_head_dim * value / bandwidth,
                    2 * scanned * c.index_head_dim * c.index_n_heads / peak)  # fmt: skip
        share = f"{bound / scan:.0%} of its bound" if scanned else "nothing to scan"
        print(f"context {context:>6}: {seconds * 1e3:7.2f} ms a token, {scan * 1e3:6.2f} ms of it the scan ({share}), "
              f"{(seconds - scan) * 1e3:6.2f} ms the rest", flush=True)  # fmt: skip
        results.append({"context": context, "seconds": seconds, "scan": scan, "scan_bound": bound})
    if args.plot:
        plot(results, args.plot)
    finish({"model": args.model.name, "format": fmt, "threads": args.threads, "bandwidth": bandwidth, "peak": peak,
            "results": results})  # fmt: skip


if __name__ == "__main__":
    main()
