"""What a format of weights or of the cache costs: KL, top-1 agreement, rows selected, and scores of tasks.

    python -m bench.quality [MODEL] [--items 200] [--formats bf16,fp8,int8,int4,f32/fp8,bf16/fp8]

A format is one of weights, or WEIGHTS/CACHE.
The first three are taken with the reference operators in fp32 on held-out conversations of our generators, once
with the checkpoint's weights and once with weights (and cached rows) that were rounded to the format and back: what
differs is the rounding alone. The scores come from the engine with the native kernels, greedily.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import finish
from glm52 import ops
from glm52.cache import CacheFormat, Spans
from glm52.chat import Thinking
from glm52.evaluate import answer, held_out_examples
from glm52.hub import resolve
from glm52.load import load
from glm52.model import GLM
from glm52.packing import soft_format
from glm52.quant import WeightFormat, quantize
from glm52.session import Session
from glm52.tasks import TASKS, draw

KEPT = ("embed_tokens", "norm", "mlp.gate.", "weights_proj", "bias")


def parsed(name: str) -> tuple[WeightFormat, CacheFormat]:
    weights, _, cache = name.partition("/")
    return weights, cache or "auto"  # type: ignore[return-value]


def rounded(folder: Path, name: str) -> GLM:
    """The reference model in fp32 with every matrix rounded to what ``NativeGLM`` keeps of it."""
    model = load(folder, dtype=torch.float32)
    fmt, model.cache_format = parsed(name)
    for name, p in model.named_parameters():
        if any(part in name for part in KEPT):
            continue
        is_soft = name.startswith("lm_head") or "kv_b_proj" in name or "eh_proj" in name
        kept = soft_format(fmt) if is_soft else fmt
        for matrix in p.data if p.dim() == 3 else [p.data]:
            matrix.copy_(matrix.bfloat16() if kept in ("f32", "bf16") else quantize(matrix, kept).dequantize())
    return model


def conversations(session: Session, count: int) -> list[list[int]]:
    rng, out = random.Random(0), []
    for _ in range(count):
        example = draw(rng, "test")
        messages = [*example.messages, *example.target]
        out.append(session.template.render_training(session.tokenizer, messages, example.tools, example.thinking)[0])
    return out


@torch.inference_mode()
def observe(model: GLM, documents: list[list[int]], top_k: int) -> tuple[Tensor, list[Tensor]]:
    """Log probabilities at every position, and the masks of selected rows of every full layer."""
    model.index_topk = top_k
    selected: list[Tensor] = []
    plain = ops.select_rows

    def spy(*args: Any) -> Tensor:
        ids = plain(*args)
        selected.append(ids)
        return ids

    ops.select_rows, logits = spy, []
    try:
        for ids in documents:
            h = model(torch.tensor(ids), Spans.of_sequence(0, len(ids)), model.new_cache(-(-len(ids) // 64) * 64))
            logits.append(model.logits(h).log_softmax(-1))
    finally:
        ops.select_rows = plain
    return torch.cat(logits), selected


def overlap(a: list[Tensor], b: list[Tensor], top_k: int) -> float:
    """Share of selected rows that both chose, over the queries that had to choose."""
    same = total = 0
    for x, y in zip(a, b, strict=True):
        for mine, other in zip(x[top_k:].tolist(), y[top_k:].tolist(), strict=True):
            same += len(set(mine) & set(other))
            total += top_k
    return same / max(1, total)


def scores(folder: Path, name: str, tasks: list[str], items: int) -> dict[str, float]:
    fmt, cache = parsed(name)
    session = Session.open(folder, fmt=fmt, max_seqs=16, cache=cache)
    out = {}
    for name in tasks:
        task, _, level = name.partition(":")
        examples = held_out_examples(task, items, 0, int(level) if level else None, Thinking(effort="max"))
        replies = answer(session, examples)
        out[name] = sum(TASKS[task].score(e, r) for e, r in zip(examples, replies, strict=True)) / items
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--formats", default="bf16,fp8,int8,int4,f32/fp8,bf16/fp8")
    parser.add_argument("--tasks", default="add:2,sub:2,json,tool_call:0,needle:2")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=64, help="rows selected in the comparison of selections")
    args = parser.parse_args()
    folder = resolve(args.model)
    documents = conversations(Session.open(folder, fmt="f32"), args.conversations)
    exact, chosen = observe(load(folder, dtype=torch.float32), documents, args.top_k)
    results: dict[str, Any] = {"f32": {"scores": scores(folder, "f32", args.tasks.split(","), args.items)}}
    print("f32 ", results["f32"]["scores"], flush=True)
    for fmt in args.formats.split(","):
        other, others = observe(rounded(folder, fmt), documents, args.top_k)
        row = {
            "kl": float((exact.exp() * (exact - other)).sum(-1).mean()),
            "top1": float((exact.argmax(-1) == other.argmax(-1)).float().mean()),
            "overlap": overlap(chosen, others, args.top_k),
            "scores": scores(folder, fmt, args.tasks.split(","), args.items),
        }
        results[fmt] = row
        print(f"{fmt:<8} KL {row['kl']:.5f} nats   top-1 {row['top1']:.2%}   rows in common {row['overlap']:.2%}   "
              f"{row['scores']}", flush=True)  # fmt: skip
    finish({"model": folder.name, "tokens": len(exact), "results": results})


if __name__ == "__main__":
    main()
