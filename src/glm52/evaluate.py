"""What a model can do, measured: task scores through the engine, greedily, and bits per byte of held-out text.

Every score comes with its Wilson 95 % interval. Nothing is teacher-forced: replies are generated, parsed and scored the
way a user would get them.
"""

import argparse
import json
import lzma
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from glm52.cache import Spans
from glm52.chat import Reply, Thinking, parse_reply
from glm52.engine import Model, SamplingParams
from glm52.errors import ConfigError, GLMError
from glm52.hub import resolve
from glm52.options import integer, some_path
from glm52.session import Session, add_format_argument
from glm52.shards import Shards
from glm52.tasks import TASKS
from glm52.tasks.base import Example
from glm52.tasks.tools import CallTool
from glm52.tokenizer import Tokenizer

THINKING = {"max": Thinking(effort="max"), "high": Thinking(effort="high"), "off": Thinking(enabled=False)}


@dataclass(frozen=True)
class Score:
    """A mean of scores in [0, 1] over ``count`` items."""

    name: str
    mean: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval. Source: Wilson (1927)."""
        z, n, p = 1.96, self.count, self.mean
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.name:<28} {100 * self.mean:5.1f} %   [{100 * low:.1f}, {100 * high:.1f}]   n = {self.count}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="folder or hub name (default: the small model that is shipped)")
    parser.add_argument(
        "--tasks", type=_levels, default=",".join(TASKS), help="comma-separated, NAME or NAME:LEVEL (default: all)"
    )
    parser.add_argument("--thinking", choices=tuple(THINKING), default="max")
    parser.add_argument("--items", type=integer(1), default=100, help="examples of each task (default: 100)")
    parser.add_argument("--dense", action="store_true", help="attend to every token instead of the indexer's selection")
    parser.add_argument(
        "--text", type=some_path, help="folder of token shards: also measure bits per byte of its .test buckets"
    )
    parser.add_argument("--samples", type=integer(0), default=0, help="print this many replies of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context", type=integer(64), default=65_536,
                        help="cache rows, shared by what runs together (default: 65,536)")  # fmt: skip
    add_format_argument(parser)
    parser.add_argument("--json", type=some_path, help="write the results here too")


def _levels(text: str) -> dict[str, tuple[str, int | None]]:
    """What --tasks names: tasks, each with a level or None, by what they were called."""
    out: dict[str, tuple[str, int | None]] = {}
    for item in filter(None, text.split(",")):
        name, _, level = item.partition(":")
        if name not in TASKS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(TASKS)}, found {name}")
        if level and level not in map(str, range(TASKS[name].levels)):
            raise argparse.ArgumentTypeError(
                f"{name}: expected a level from 0 to {TASKS[name].levels - 1}, found {level}"
            )
        out[item] = name, int(level) if level else None
    if not out:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(TASKS)}, found none")
    return out


def run(args: argparse.Namespace) -> int:
    shards = Shards(args.text, "--text") if args.text else None
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ConfigError(f"--json: expected a file in a folder that is there, found {args.json}")
    session = Session.open(resolve(args.model), fmt=args.format, max_seqs=16, context=args.context,
                           cache=args.kv_cache_dtype)  # fmt: skip
    if args.dense:
        session.engine.model.index_topk = session.engine.context_length
    results: list[Score] = []
    for item, (name, level) in args.tasks.items():
        examples = held_out_examples(name, args.items, args.seed, level, THINKING[args.thinking])
        replies = answer(session, examples)
        for sample in range(min(args.samples, len(examples))):
            print(f"  {examples[sample].messages[-1]['content'][-300:]!r} -> {replies[sample]}")
        for score in score_all(item, examples, replies):
            print(score, flush=True)
            results.append(score)
    stats = session.engine.stats
    rates = [a / d for a, d in zip(stats.accepted, stats.drafted, strict=True) if d]
    print(f"drafts accepted by depth: {', '.join(f'{r:.3f}' for r in rates) or 'none drafted'}; {session.chunks}")
    text = bits_per_byte_of_shards(session, shards) if shards else {}
    if args.json:
        payload: dict[str, Any] = {
            "scores": {s.name: {"mean": s.mean, "count": s.count, "interval": s.interval} for s in results},
            "acceptance": rates, "bits_per_byte": text, "thinking": args.thinking, "dense": args.dense,
            "seed": args.seed,
        }  # fmt: skip
        args.json.write_text(json.dumps(payload, indent=1) + "\n")
    return 0


def held_out_examples(name: str, count: int, seed: int, level: int | None, thinking: Thinking) -> list[Example]:
    """Examples of the test split, a function of the seed."""
    rng = random.Random(f"{seed}:{name}")
    return [TASKS[name].generate(rng, split="test", level=level, thinking=thinking) for _ in range(count)]


def answer(session: Session, examples: list[Example], max_tokens: int = 256) -> list[Reply]:
    """Greedy replies through the engine, batched."""
    engine, params = session.engine, SamplingParams(temperature=0.0, max_tokens=max_tokens)
    seqs = [
        engine.submit(session.template.render_ids(session.tokenizer, e.messages, e.tools, e.thinking), params)
        for e in examples
    ]
    texts = dict.fromkeys(seqs, "")
    with tqdm(total=len(seqs), leave=False, unit="reply") as bar:
        while engine.has_work:
            for event in engine.step():
                if event.error is not None:
                    raise GLMError(event.error)
                texts[event.seq] += event.text
                bar.update(event.finish_reason is not None)
    return [parse_reply(texts[s], e.tools, thinking=e.thinking.enabled) for s, e in zip(seqs, examples, strict=True)]


def score_all(name: str, examples: list[Example], replies: list[Reply]) -> Iterable[Score]:
    """The task's score; for tool calls also whether they were valid and the right tool."""
    task = TASKS[examples[0].task]
    pairs = list(zip(examples, replies, strict=True))
    yield Score(name, sum(task.score(e, r) for e, r in pairs) / len(pairs), len(pairs))
    if isinstance(task, CallTool):
        parts = [task.parts(e, r) for e, r in pairs if not isinstance(e.answer, str)]
        for part in parts[0] if parts else ():
            yield Score(f"{name} {part}", sum(p[part] for p in parts) / len(parts), len(parts))


def bits_per_byte_of_shards(session: Session, shards: Shards) -> dict[str, dict[str, float]]:
    """Bits per byte of every held-out bucket, beside xz on the same text."""
    out = {}
    for name in (b for b in shards.buckets if b.endswith(".test")):
        bucket = shards.bucket(name)
        documents = [bucket.tokens[a:b].tolist() for a, b in zip(bucket.offsets, bucket.offsets[1:], strict=False)]
        ours, text = bits_per_byte(session.engine.model, session.tokenizer, documents)
        xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
        out[name] = {"model": ours, "xz": xz, "bytes": len(text)}
        print(f"{name:<20} {ours:.3f} bits per byte   xz {xz:.3f}   {len(text)} bytes", flush=True)
    return out


@torch.inference_mode()
def bits_per_byte(
    model: Model, tokenizer: Tokenizer, documents: list[list[int]], window: int = 1024, max_windows: int = 96
) -> tuple[float, bytes]:
    """Mean bits per byte over windows of documents (each window starts without context), and the text itself."""
    windows = [d[a : a + window] for d in documents for a in range(0, len(d) - 1, window) if len(d) - a > 1]
    random.Random(0).shuffle(windows)
    nats, text = 0.0, b""
    cache = model.new_cache(window)
    for ids in windows[:max_windows]:
        tokens = torch.tensor(ids)
        h = model(tokens, Spans.of_sequence(0, len(ids)), cache)[:-1]
        nats += float(torch.nn.functional.cross_entropy(model.logits(h), tokens[1:], reduction="sum"))
        text += tokenizer.decode(ids[1:], skip_special=True).encode()
    return nats / math.log(2) / len(text), text
