"""What HTTP costs: the same prompts through the engine and through ``glm52 serve``, in turn.

    python -m bench.http [MODEL] [--streams 8] [--tokens 128,512] [--rounds 5] [--stream-every MS]

Time to the first token of one request, and tokens a second of several at once, streamed as text completions of token
ids: of whole replies, which begin one after another and end in a last event, and, from the time that replies of the
last length take longer than those of the first, while all run. What comes within ``--stream-every`` (the server's own
option and default; 0: every step is an event) is one event, so the events are counted too. The server is a process of
its own. So that it is measured and no client, this one reads bytes from sockets that were connected beforehand. It is
woken by the first event of one request, but of several at their end only: being woken takes time of the cores that the
server computes on, which a client elsewhere does not.
"""

import argparse
import gc
import json
import random
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from typing import cast

import httpx

from bench.common import finish
from glm52.engine import SamplingParams
from glm52.hub import resolve
from glm52.server.command import YOUNG
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


def over_http(port: int, prompts: list[list[int]], tokens: int) -> tuple[float, float, int]:
    """The same, for a client that looks into what came afterwards; and the number of events. The first token is seen
    where there is one prompt."""
    streams = {socket.create_connection(("127.0.0.1", port)): bytearray() for _ in prompts}
    for connection in streams if len(streams) > 1 else ():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1 << 20)  # more than a stream: woken by its end
    began, first = time.perf_counter(), None
    with selectors.DefaultSelector() as ready:
        for connection, prompt in zip(streams, prompts, strict=True):
            connection.sendall(request(prompt, tokens))
            ready.register(connection, selectors.EVENT_READ)
        while ready.get_map():
            for key, _ in ready.select():
                connection = cast(socket.socket, key.fileobj)
                piece = connection.recv(1 << 16)
                if not piece:
                    ready.unregister(connection)
                    connection.close()
                elif first is None and b"data: {" in piece:
                    first = time.perf_counter() - began
                streams[connection] += piece
    seconds = time.perf_counter() - began
    assert all(b"data: [DONE]" in stream for stream in streams.values()), "every reply is whole"
    return first or 0.0, seconds, sum(stream.count(b"data: {") for stream in streams.values())


def request(prompt: list[int], tokens: int) -> bytes:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: here\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def measure(args: argparse.Namespace, session: Session, port: int) -> dict[str, list[float]]:
    """Seconds of each round: to the ``first`` token of one, and to the last of several with so many tokens; events."""
    rng, vocabulary = random.Random(0), session.tokenizer.vocab_size

    def fresh(count: int) -> list[list[int]]:
        return [[rng.randrange(vocabulary) for _ in range(PROMPT)] for _ in range(count)]

    out: dict[str, list[float]] = defaultdict(list)
    for turn in range(args.rounds + 1):  # the first warms up
        single, many = fresh(1), {tokens: fresh(args.streams) for tokens in args.tokens}
        found: dict[str, float] = {}
        for way in ("direct", "http") if turn % 2 else ("http", "direct"):
            if way == "direct":
                found["first direct"] = direct(session, single, 2)[0]
                found |= {f"{n} direct": direct(session, prompts, n)[1] for n, prompts in many.items()}
                continue
            found["first http"] = over_http(port, single, 2)[0]
            for n, prompts in many.items():
                _, found[f"{n} http"], found[f"{n} events"] = over_http(port, prompts, n)
        for name, seconds in found.items() if turn else ():
            out[name].append(seconds)
    return out


def report(args: argparse.Namespace, found: dict[str, list[float]]) -> None:
    middle = {k: statistics.median(v) for k, v in found.items()}
    waits = [(b - a) * 1e3 for a, b in zip(found["first direct"], found["first http"], strict=True)]
    print(f"first token: {middle['first direct'] * 1e3:.2f} ms directly, {middle['first http'] * 1e3:.2f} over HTTP; "
          f"{statistics.median(waits):+.2f} ms in a round, {min(waits):+.2f} to {max(waits):+.2f}")  # fmt: skip
    for n in args.tokens:
        shares = [a / b for a, b in zip(found[f"{n} direct"], found[f"{n} http"], strict=True)]
        rates = [args.streams * n / middle[f"{n} {way}"] for way in ("direct", "http")]
        print(f"{args.streams} replies of {n} tokens: {rates[0]:.0f} tokens/s directly, {rates[1]:.0f} over HTTP; "
              f"{statistics.median(shares):.1%} in a round, {min(shares):.1%} to {max(shares):.1%}; "
              f"{middle[f'{n} events']:.0f} events")  # fmt: skip
    least, most = args.tokens[0], args.tokens[-1]
    if least < most:
        longer = {way: [b - a for a, b in zip(found[f"{least} {way}"], found[f"{most} {way}"], strict=True)]
                  for way in ("direct", "http")}  # fmt: skip
        shares = [a / b for a, b in zip(longer["direct"], longer["http"], strict=True)]
        rates = [args.streams * (most - least) / statistics.median(v) for v in longer.values()]
        print(f"while {args.streams} run: {rates[0]:.0f} tokens/s directly, {rates[1]:.0f} over HTTP; "
              f"{statistics.median(shares):.1%} in a round, {min(shares):.1%} to {max(shares):.1%}")  # fmt: skip


def lengths(text: str) -> list[int]:
    return sorted(map(int, text.split(",")))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=lengths, default=[128, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream-every", metavar="MS", help="the server's; 0: every step is an event")
    args = parser.parse_args()
    folder, port = resolve(args.model), free_port()
    options = ["--port", str(port), "--max-seqs", str(args.streams), "--drafts", "0"]
    options += ["--stream-every", args.stream_every] if args.stream_every else []
    server = subprocess.Popen([sys.executable, "-m", "glm52.cli", "serve", str(folder), *options])
    try:
        session = Session.open(folder, max_seqs=args.streams, num_drafts=0)
        gc.freeze()  # as the server does
        gc.set_threshold(YOUNG)
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        found = measure(args, session, port)
    finally:
        server.terminate()
        server.wait()
    report(args, found)
    finish({"model": folder.name, "streams": args.streams, "found": found})


if __name__ == "__main__":
    main()
