"""What a guide costs: compiling, shaping logits at the full vocabulary, and speed with the small model.

    python -m bench.guide [--length 400] [--repeats 5]

The bound of shaping one row of logits is reading and writing it once. The full vocabulary of 154,880 is the shipped
one, padded with joined pairs of its tokens.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as Backend

from bench.common import finish, read_bandwidth
from glm52.engine import SamplingParams, generate
from glm52.engine.guide import Guide
from glm52.engine.matcher import Matchers
from glm52.grammar import Grammar
from glm52.hub import NANO
from glm52.session import Session
from glm52.tokenizer import Tokenizer

WIDTH, PADDING = 154_880, 24


def agent_tools(count: int) -> list[dict[str, object]]:
    """Definitions of the size that coding agents send: eight arguments, some nested."""
    scalar = [{"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {"enum": ["a", "b", "c"]}]
    item = {"type": "object", "properties": {"id": {"type": "string"}, "done": {"type": "boolean"}}, "required": ["id"]}
    properties = {f"arg_{i}": scalar[i % 4] for i in range(7)} | {"items": {"type": "array", "items": item}}
    schema = {"type": "object", "properties": properties, "required": ["arg_0", "items"], "additionalProperties": False}
    return [{"type": "function", "function": {"name": f"tool_{i}", "parameters": schema}} for i in range(count)]


def wide_tokenizer() -> tuple[Tokenizer, frozenset[int]]:
    """The shipped tokenizer with a vocabulary as large as the official one, and its ids that end a reply."""
    data = json.loads((NANO / "tokenizer.json").read_text("utf-8"))
    vocab, added = data["model"]["vocab"], data["added_tokens"]
    words = sorted((w for w in vocab if len(w) > 1), key=vocab.get)
    special = {t["content"] for t in added}
    tokens = dict.fromkeys(sorted((w for w in vocab if w not in special), key=vocab.get))
    rng = random.Random(0)
    while len(tokens) < WIDTH - PADDING - len(added):
        tokens[rng.choice(words) + rng.choice(words)] = None
    data["model"]["vocab"] = {w: i for i, w in enumerate(tokens)}
    for i, token in enumerate(added):
        token["id"] = len(tokens) + i
    tokenizer = Tokenizer(Backend.from_str(json.dumps(data)))
    return tokenizer, frozenset({len(tokens), len(tokens) + 7, len(tokens) + 9})


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def shaping(matchers: Matchers, tokenizer: Tokenizer, grammar: Grammar, text: str) -> dict[str, float]:
    """Microseconds of shaping the logits before each token of a text."""
    guide = Guide(SamplingParams(grammar=grammar), [], 10_000, frozenset({0}), None, matchers.new(grammar))
    logits = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float32)
    times = []
    for token in tokenizer.encode(text):
        times.append(1e6 * timed(lambda: guide.shape(logits)))
        guide.follow(token)
    assert guide.error is None and len(times) > 20
    return {"median_us": statistics.median(times), "mean_us": statistics.mean(times), "max_us": max(times)}


def end_to_end(length: int, repeats: int) -> dict[str, float]:
    """Microseconds of one thread for a token of the small model, free and held in turn: medians, with the prompt."""
    torch.set_num_threads(1)
    session = Session.open(NANO, num_drafts=0)
    prompt = session.template.render_ids(session.tokenizer, [{"role": "user", "content": "Tell me."}], agent_tools(4))
    kinds = {"free": None, "held": Grammar.tool_calls(agent_tools(4), "none")}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind, grammar in kinds.items():
            params = SamplingParams(temperature=1.0, seed=1, max_tokens=length, ignore_eos=True, grammar=grammar)
            began = time.process_time()
            generate(session.engine, [prompt], params)
            times[kind].append(1e6 * (time.process_time() - began) / length)
    return {kind: statistics.median(t) for kind, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=400, help="tokens of a timed reply")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    bound_us = 1e6 * 2 * 4 * WIDTH / read_bandwidth(1)
    print(f"bound of shaping one row of {WIDTH} logits: {bound_us:.0f} us")
    tokenizer, eos = wide_tokenizer()
    matchers = Matchers(tokenizer, WIDTH, eos)
    tools = agent_tools(24)
    results: dict[str, Any] = {"bound_us": bound_us}
    results["vocabulary_s"] = timed(lambda: matchers.compile(Grammar.choice(["a"])))
    results["tools_text_ms"] = 1e3 * timed(lambda: Grammar.tool_calls(tools))
    results["tools_compile_ms"] = 1e3 * timed(lambda: matchers.compile(Grammar.tool_calls(tools)))
    results["matcher_us"] = 1e6 * timed(lambda: matchers.new(Grammar.choice(["a"])))
    prose = "The quick brown fox jumps over the lazy dog. " * 8
    arguments = "<arg_key>arg_0</arg_key><arg_value>a path/to/it</arg_value><arg_key>items</arg_key><arg_value>"
    arguments += '[{"id": "x y", "done": true}]</arg_value>'
    answer = '{"arg_0": "some words of text", "items": [{"id": "x", "done": true}, {"id": "y"}]}'
    schema = tools[0]["function"]["parameters"]  # type: ignore[index]
    print(
        f"once: vocabulary {results['vocabulary_s']:.1f} s; 24 tools: text {results['tools_text_ms']:.0f} ms, compiled"
    )
    print(f"      {results['tools_compile_ms']:.0f} ms. For each reply: a matcher {results['matcher_us']:.0f} us")
    texts = {
        "prose before calls": (Grammar.tool_calls(tools), prose),
        "a call": (Grammar.tool_calls(tools, "required"), f"<tool_call>tool_7{arguments}</tool_call>"),
        "json": (Grammar.json_schema(schema), answer), "pattern": (Grammar.regex("[A-Za-z .]+"), prose[:-1]),
    }  # fmt: skip
    for name, (grammar, text) in texts.items():
        cost = shaping(matchers, tokenizer, grammar, text)
        print(f"{name:<20} {'   '.join(f'{k[:-3]} {v:5.0f} us' for k, v in cost.items())}")
        results[name] = cost
    costs = end_to_end(args.length, args.repeats)
    print(f"small model: {costs['free']:.0f} us a token free, {costs['held']:.0f} us held")
    finish(results | {"small_model_us": costs})


if __name__ == "__main__":
    main()
