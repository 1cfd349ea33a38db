"""A training step of the shipped model's configuration: this package against transformers, interleaved in one run.

Both see the recipe's step: 8,192 tokens in micro-batches of 4,096, bf16 autocast with fp32 weights, one thread,
forward, backward and optimizer. Ours does more work: Muon instead of AdamW, and in the second row the MTP layer
with its loss, which transformers lacks.

    python -m bench.training [--steps 5] [--batch 16] [--window 512]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from bench.common import finish, matmul_peak
from glm52.config import GLMConfig
from glm52.hub import NANO
from glm52.shards import Shards, write_bucket
from glm52.train.command import training_flops_per_token
from glm52.train.optim import product_dtype
from glm52.train.trainer import Recipe, Stage, Trainer


def random_shards(folder: Path, vocab_size: int) -> Shards:
    rng = np.random.default_rng(0)
    documents = [(rng.integers(0, vocab_size - 100, 600).tolist(), None) for _ in range(400)]
    manifest = {"buckets": {"text": write_bucket(folder, "text", documents)}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Shards(folder)


def our_step(config: GLMConfig, shards: Shards, folder: Path, batch: int, window: int, mtp: bool) -> Callable[[], None]:
    stage = Stage(name="bench", tokens=1 << 40, mixture={"text": 1.0}, window=window, batch_tokens=batch * window,
                  micro_tokens=batch * window // 2, mtp_weight=0.3 if mtp else 0.0)  # fmt: skip
    if not mtp:
        config = replace(config, num_nextn_predict_layers=0)
    trainer = Trainer(Recipe(name="bench", config=config, stages=(stage,), save_every_s=1e9), shards, folder)
    return lambda: void(trainer.step())


def their_step(config: GLMConfig, batch: int, window: int, attention: str) -> Callable[[], None]:
    data = {k: v for k, v in config.to_dict().items() if k not in ("architectures", "dtype", "head_dim")}
    hf = GlmMoeDsaConfig(**data)
    hf._attn_implementation = attention
    model = GlmMoeDsaForCausalLM(hf).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        for tokens in torch.randint(0, config.vocab_size - 100, (2, batch // 2, window)):
            with torch.autocast("cpu", torch.bfloat16, enabled=product_dtype() == torch.bfloat16):
                loss = model(tokens, labels=tokens).loss / 2
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def void(_: object) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = GLMConfig.read(NANO)
    with tempfile.TemporaryDirectory() as temporary:
        shards = random_shards(Path(temporary), config.vocab_size)
        bodies = {
            "ours": our_step(config, shards, Path(temporary), args.batch, args.window, mtp=False),
            "ours with MTP": our_step(config, shards, Path(temporary), args.batch, args.window, mtp=True),
            "transformers sdpa": their_step(config, args.batch, args.window, "sdpa"),
            "transformers eager": their_step(config, args.batch, args.window, "eager"),
        }
        times: dict[str, list[float]] = {name: [] for name in bodies}
        for body in bodies.values():
            body()  # compile and warm up
        for _ in range(args.steps):
            for name, body in bodies.items():
                began = time.perf_counter()
                body()
                times[name].append(time.perf_counter() - began)
    tokens, peak = args.batch * args.window, matmul_peak(1)
    flops = training_flops_per_token(Recipe(name="bench", config=config, stages=()), args.window)
    print(f"ceiling: {peak / 1e9:.0f} GFLOP/s of torch on one thread; {flops / 1e6:.1f} MFLOP a token with MTP")
    medians = {name: statistics.median(t) for name, t in times.items()}
    best = min(v for k, v in medians.items() if k.startswith("transformers"))
    for name, t in times.items():
        print(f"{name:<20} {tokens / medians[name]:7.0f} tokens/s   (spread {min(t):.2f} to {max(t):.2f} s)"
              f"   {best / medians[name]:.2f}x the faster transformers")  # fmt: skip
    finish({"batch": args.batch, "window": args.window, "tokens_per_s": {k: tokens / v for k, v in medians.items()},
            "transformers": transformers.__version__, "peak": peak})  # fmt: skip


if __name__ == "__main__":
    main()
