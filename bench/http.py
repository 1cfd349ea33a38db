"""What HTTP costs: the same prompts through the engine and through ``glm52 serve``, in turn.

    python -m bench.http [MODEL] [--streams 8] [--tokens 128] [--rounds 5]

Time to the first token of one request, and tokens a second of several at once, streamed as text completions of token
ids. The server is a process of its own; this one, which reads the streams, shares the two cores with it.
"""

import argparse
import asyncio
import random
import socket
import statistics
import subprocess
import sys
import time

import httpx

from bench.common import finish
from glm52.engine import SamplingParams
from glm52.hub import resolve
from glm52.session import Session

PROMPT = 64  # tokens


def direct(session: Session, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and to the last."""
    engine = session.engine
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    began, first = time.perf_counter(), None
    for prompt in prompts:
        engine.submit(prompt, params)
    while engine.has_work:
        if any(event.token_ids for event in engine.step()) and first is None:
            first = time.perf_counter() - began
    return first or 0.0, time.perf_counter() - began


async def over_http(client: httpx.AsyncClient, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    began, firsts = time.perf_counter(), []

    async def one(prompt: list[int]) -> None:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        seen = 0
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {") and not seen:
                    firsts.append(time.perf_counter() - began)
                    seen = 1

    await asyncio.gather(*map(one, prompts))
    return min(firsts), time.perf_counter() - began


async def measure(args: argparse.Namespace, session: Session, url: str) -> dict[str, list[float]]:
    rng, vocabulary = random.Random(0), session.tokenizer.vocab_size
    fresh = lambda n: [[rng.randrange(vocabulary) for _ in range(PROMPT)] for _ in range(n)]  # noqa: E731
    out: dict[str, list[float]] = {k: [] for k in ("first direct", "first http", "all direct", "all http")}
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        for turn in range(args.rounds + 1):  # the first warms up
            single, many = fresh(1), fresh(args.streams)
            found = {
                "first direct": direct(session, single, 2)[0],
                "first http": (await over_http(client, single, 2))[0],
                "all direct": direct(session, many, args.tokens)[1],
                "all http": (await over_http(client, many, args.tokens))[1],
            }
            if turn:
                for name, seconds in found.items():
                    out[name].append(seconds)
    return out


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder, port = resolve(args.model), free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--port", str(port), "--max-seqs", str(args.streams), "--drafts", "0"]
    server = subprocess.Popen([sys.executable, "-m", "glm52.cli", "serve", str(folder), *options])
    try:
        session = Session.open(folder, max_seqs=args.streams, num_drafts=0)
        for _ in range(600):
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        seconds = {k: statistics.median(v) for k, v in asyncio.run(measure(args, session, url)).items()}
    finally:
        server.terminate()
        server.wait()
    total = args.streams * args.tokens
    rates = {k: total / seconds[f"all {k}"] for k in ("direct", "http")}
    print(
        f"first token: {seconds['first direct'] * 1e3:.2f} ms directly, {seconds['first http'] * 1e3:.2f} ms over HTTP"
    )
    print(f"{args.streams} streams: {rates['direct']:.0f} tokens/s directly, {rates['http']:.0f} over HTTP, "
          f"{rates['http'] / rates['direct']:.1%}")  # fmt: skip
    finish({"model": folder.name, "streams": args.streams, "seconds": seconds, "tokens_per_s": rates})


if __name__ == "__main__":
    main()
