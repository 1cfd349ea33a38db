"""Greedy tokens of the native kernels in fp32 against the reference operators, far beyond ``index_topk``.

    python -m bench.greedy MODEL [--contexts 100,512,1500,8192] [--tokens 200]

The engine generates; then the reference reads prompt and reply in one go. Where its argmax is the next token at every
position of the reply, generating with the reference would have given the same reply. Also printed is the narrowest gap
between the last row selected and the first one left out: below about 1e-7 fp32 cannot tell which it is.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import finish
from glm52 import ops
from glm52.cache import Spans
from glm52.engine import Engine, SamplingParams, generate
from glm52.load import load
from glm52.model import GLM
from glm52.native import NativeGLM

CHUNK = 512


@torch.inference_mode()
def reference_logits(model: GLM, ids: list[int], count: int) -> torch.Tensor:
    """Logits that predict the last ``count`` tokens."""
    cache, hidden = model.new_cache(-(-len(ids) // 64) * 64), []
    for begin in range(0, len(ids) - 1, CHUNK):
        end = min(begin + CHUNK, len(ids) - 1)
        hidden.append(model(torch.tensor(ids[begin:end]), Spans.of_sequence(begin, end), cache))
    return model.logits(torch.cat(hidden)[-count:])


class NarrowestGap:
    """In the place of ``ops.select_rows``: how close a query at or beyond ``begin`` came to choosing otherwise."""

    def __init__(self, begin: int) -> None:
        self.begin, self.gap, self.plain = begin, float("inf"), ops.select_rows

    def __call__(self, q: Tensor, w: Tensor, keys: Tensor, spans: Spans, G: int) -> Tensor:
        rows = spans.context_rows(0)
        late = spans.positions_T >= max(self.begin, G)
        if late.any():
            visible = torch.arange(len(rows)) <= spans.positions_T[late, None]
            best = ops.index_scores(q[late], w[late], keys[rows]).masked_fill(~visible, -torch.inf).topk(G + 1).values
            self.gap = min(self.gap, float((best[:, G - 1] - best[:, G]).min()))
        return self.plain(q, w, keys, spans, G)

    def __enter__(self) -> "NarrowestGap":
        ops.select_rows = self
        return self

    def __exit__(self, *_: Any) -> None:
        ops.select_rows = self.plain


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--contexts", default="100,512,1500,8192")
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    reference = load(args.model, dtype=torch.float32)
    native = NativeGLM(reference, "f32")
    results = []
    for context in map(int, args.contexts.split(",")):
        generator = torch.Generator().manual_seed(context)
        prompt = torch.randint(2, native.config.vocab_size - 2, (context,), generator=generator).tolist()
        rows = -(-(context + args.tokens + 64) // 64) * 64
        params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
        (seq,) = generate(Engine(native, num_rows=rows, max_seqs=1), [prompt], params)
        with NarrowestGap(context) as narrowest:
            logits = reference_logits(reference, seq.tokens, args.tokens)
        equal = logits.argmax(-1) == torch.tensor(seq.output)
        line = {"context": context, "equal": int(equal.sum()), "of": args.tokens, "gap": narrowest.gap}
        print(f"context {context:>6}: {line['equal']} of {args.tokens} tokens equal   narrowest gap of a selection "
              f"{narrowest.gap:.1e}", flush=True)  # fmt: skip
        results.append(line)
    finish({"model": args.model.name, "results": results})


if __name__ == "__main__":
    main()
