"""What drafts bring on the shipped model's own tasks: decoding with 0 to 3 of them, prompt by prompt in turn.

python -m bench.drafts [MODEL] [--format bf16] [--items 12]
"""

import argparse
import time

import torch

from bench.common import finish
from glm52.chat import Thinking
from glm52.engine import SamplingParams
from glm52.evaluate import held_out_examples
from glm52.hub import resolve
from glm52.session import Session

DEPTHS = (0, 1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--items", type=int, default=12, help="examples of each task")
    args = parser.parse_args()
    torch.set_num_threads(2)
    sessions = {d: Session.open(resolve(args.model), fmt=args.format, max_seqs=1, num_drafts=d) for d in DEPTHS}
    seconds, tokens = dict.fromkeys(DEPTHS, 0.0), dict.fromkeys(DEPTHS, 0)
    outputs: dict[int, list[list[int]]] = {d: [] for d in DEPTHS}
    tasks = ("json", "tool_call", "add")
    for example in (e for t in tasks for e in held_out_examples(t, args.items, 0, 0, Thinking(effort="max"))):
        for depth, s in sessions.items():
            ids = s.template.render_ids(s.tokenizer, example.messages, example.tools, example.thinking)
            seq = s.engine.submit(ids, SamplingParams(temperature=0.0, max_tokens=200))
            s.engine.step()
            began, before = time.perf_counter(), len(seq.output)
            while seq.finish_reason is None:
                s.engine.step()
            seconds[depth] += time.perf_counter() - began
            tokens[depth] += len(seq.output) - before
            outputs[depth].append(seq.output)
    rates = {d: tokens[d] / seconds[d] for d in DEPTHS}
    for depth in DEPTHS:
        stats = sessions[depth].engine.stats
        accepted = [f"{a / n:.0%}" for a, n in zip(stats.accepted, stats.drafted, strict=True) if n]
        same = outputs[depth] == outputs[0]
        print(f"{depth} drafts: {rates[depth]:6.0f} tokens/s   {rates[depth] / rates[0]:.2f}x none   "
              f"same output: {same}   accepted by depth: {', '.join(accepted) or '-'}")  # fmt: skip
    finish({"format": args.format, "tokens_per_s": rates})


if __name__ == "__main__":
    main()
