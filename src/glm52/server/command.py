"""``glm52 serve``: load a model, bind the port, serve until told to stop."""

import argparse
import gc
import socket
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from glm52.chat import ChatTemplate
from glm52.config import GLMConfig
from glm52.engine import AsyncEngine
from glm52.engine.scheduler import BESIDE_REPLIES
from glm52.errors import RequestError
from glm52.hub import name_of, resolve
from glm52.memory import FEWEST, FOR_EXPERT, MOST, SHARE
from glm52.options import integer, number, some_name, some_path
from glm52.server import foreign
from glm52.server.connections import Server
from glm52.server.limits import Keys, Limits
from glm52.server.service import Options, Service
from glm52.server.upstream import Upstream, meet
from glm52.session import PREFIX_CACHE_BYTES, Session, add_context_argument, add_format_argument, generation_defaults
from glm52.tokenizer import Tokenizer

STREAM_EVERY_MS = 33.0  # thirty pictures a second
YOUNG = 10_000  # containers between two collections: of a request's, which are a thousand, most are gone by then


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="folder or hub name (default: the small model that is shipped)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=integer(0, 65_535), default=8000, help="default: 8000; 0 picks a free one")
    add("--served-model-name", type=some_name, action="append", nargs="+", metavar="NAME",
        help="names clients use, after MODEL; the first stands in replies (default: its own)")  # fmt: skip
    add("--api-key", action="append", default=[], metavar="KEY",
        help="let in only those who send this key; may be repeated; @FILE reads one a line")  # fmt: skip
    add("--insecure", action="store_true", help="listen on other addresses than this machine's without a key")
    add_context_argument(parser, "--max-model-len")
    add("--prefix-cache", type=some_path, metavar="DIR",
        help="keep pages of the cache here, so that they outlive restarts")  # fmt: skip
    add("--prefix-cache-size", type=integer(1, 1 << 62), metavar="BYTES",
        help=f"what they may take (default: {PREFIX_CACHE_BYTES:,})")  # fmt: skip
    add("--max-seqs", "--max-num-seqs", type=integer(1), default=8,
        help="replies computed together (default: 8)")  # fmt: skip
    add("--max-waiting", type=integer(0), default=256,
        help="replies that may queue; more are refused (default: 256)")  # fmt: skip
    add("--max-batch-tokens", "--max-num-batched-tokens", type=integer(1),
        help=f"tokens of one step; while a reply waits for it, {BESIDE_REPLIES} of prompts (default: {FOR_EXPERT} for "
             f"each expert, {FEWEST:,} to {MOST:,}, but no more than {SHARE:.0%}% of the memory that weights and cache "
             "leave has room for)")  # fmt: skip
    add("--stream-every", type=number(0, 1000), metavar="MS",
        help=f"milliseconds between two events of a stream; tokens in between are joined to one event "
             f"(default: {STREAM_EVERY_MS:g}; 0: an event for each step)")  # fmt: skip
    add("--deadline", type=number(0.001, 1e9), metavar="SECONDS",
        help="the longest a request may take (default: no limit)")  # fmt: skip
    add("--drafts", type=integer(0, 5),
        help="tokens drafted per step, 0 to 5 (default: up to 3, as many as pay)")  # fmt: skip
    add("--mode", choices=["chat", "coding"], default="chat",
        help="coding: keep all reasoning, think with Max effort, sample cooler (default: chat)")  # fmt: skip
    add("--verbatim", action="store_true", help="leave clocks and meters in prompts as they are, though prefixes miss")
    add("--log-prompts", action="store_true", help="with GLM52_LOG=INFO: also what was said, not only how much")
    add("--upstream", metavar="URL",
        help="let this vLLM, SGLang or llama.cpp server compute; MODEL gives tokenizer and template only")  # fmt: skip
    add("--upstream-key", metavar="KEY", help="the API key that it wants")
    add_format_argument(parser)
    foreign.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    keys = Keys(_read_keys(args.api_key))
    if not (keys or args.insecure or _is_loopback(args.host)):
        raise RequestError(
            f"--host: {args.host} can be reached from other machines; give --api-key, or --insecure to let everyone in"
        )
    if args.prefix_cache_size is not None and args.prefix_cache is None:
        raise RequestError("--prefix-cache-size: expected --prefix-cache too; without it nothing is kept")
    if args.upstream_key is not None and args.upstream is None:
        raise RequestError("--upstream-key: expected --upstream too; without it nobody wants the key")
    _names(args, "")
    listener = _bind(args.host, args.port)
    for note in foreign.notes(args):
        print(f"glm52 serve: {note}", file=sys.stderr)
    limits = Limits(max_running=args.max_seqs, max_waiting=args.max_waiting, deadline_s=args.deadline)
    options = Options(
        keys=keys, limits=limits, neutralise=not args.verbatim, mode=args.mode, log_prompts=args.log_prompts
    )
    service = _engine(args, options) if args.upstream is None else _gateway(args, options)
    # A full collection of all that is loaded takes a tenth of a second, in which no stream moves. It stays anyway.
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"{service.name} at http://{host}:{port}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)
    try:
        Server(service).run(sockets=[listener])
    finally:  # a failed engine, too, has pages queued for the disk, which were whole before it failed
        if isinstance(service.backend, AsyncEngine):
            service.backend.close()
    return 0


def _engine(args: argparse.Namespace, options: Options) -> Service:
    """A model that is computed here."""
    if args.max_batch_tokens is not None and args.max_seqs > args.max_batch_tokens:
        raise RequestError(
            f"--max-seqs: expected at most the {args.max_batch_tokens} of --max-batch-tokens, a token for each reply, "
            f"found {args.max_seqs}; lower it, or raise --max-batch-tokens"
        )
    session = Session.open(
        resolve(args.model), fmt=args.format, context=args.context, max_seqs=args.max_seqs,
        max_batch_tokens=args.max_batch_tokens, num_drafts=args.drafts, cache=args.kv_cache_dtype,
        prefix_cache=args.prefix_cache,
        prefix_cache_bytes=PREFIX_CACHE_BYTES if args.prefix_cache_size is None else args.prefix_cache_size,
    )  # fmt: skip
    print(f"glm52 serve: {session.chunks}", file=sys.stderr)
    name, *aliases = _names(args, session.name)
    return Service(
        AsyncEngine(
            session.engine, max_waiting=args.max_seqs + args.max_waiting,
            interval_s=(STREAM_EVERY_MS if args.stream_every is None else args.stream_every) / 1e3,
        ),
        session.tokenizer, session.template, name=name, aliases=aliases, defaults=session.defaults,
        context_length=session.engine.context_length, options=options,
    )  # fmt: skip


def _gateway(args: argparse.Namespace, options: Options) -> Service:
    """A model that another server computes."""
    if args.model is None:
        raise RequestError("--upstream: name the MODEL too; its tokenizer and template must be those of the server's")
    for flag, value in (
        ("--format", args.format),
        ("--drafts", args.drafts),
        ("--kv-cache-dtype", args.kv_cache_dtype),
        ("--stream-every", args.stream_every),
        ("--prefix-cache", args.prefix_cache),
        ("--max-batch-tokens", args.max_batch_tokens),
    ):
        if value not in (None, "auto"):
            raise RequestError(f"{flag}: the server at {args.upstream} computes, so this is for it to say")
    key = None if args.upstream_key is None else _sendable(args.upstream_key, "--upstream-key")
    host = meet(args.upstream, key)
    folder = resolve(args.model, weights=False)
    tokenizer = Tokenizer.read(folder)
    upstream = Upstream(host, tokenizer, GLMConfig.read(folder))
    name, *aliases = _names(args, upstream.model or name_of(folder))
    return Service(
        upstream, tokenizer, ChatTemplate.read(folder), name=name, aliases=aliases, options=options,
        defaults=generation_defaults(folder), context_length=min(args.context or 1 << 30, upstream.context_length),
    )  # fmt: skip


def _names(args: argparse.Namespace, default: str) -> list[str]:
    """What the model is called. Names behind one flag end at the next flag only, so that one of them may be MODEL."""
    groups: list[list[str]] = args.served_model_name or [[default]]
    longest = max(groups, key=len)
    if args.model is None and len(longest) > 1:
        raise RequestError(f"--served-model-name: {', '.join(longest)} are all names now; MODEL goes first")
    return [name for group in groups for name in group]


def _read_keys(given: Sequence[str]) -> list[str]:
    """Keys as they are given, and the lines of files."""
    keys: list[str] = []
    for key in given:
        try:
            lines = Path(key[1:]).read_text("utf-8").splitlines() if key.startswith("@") else [key]
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--api-key: cannot read {key[1:]} ({error})") from error
        keys += [_sendable(line.strip(), "--api-key") for line in lines if line.strip()]
    if given and not keys:
        raise RequestError("--api-key: expected at least one key, found none")
    return keys


def _sendable(key: str, option: str) -> str:
    """A key that a header carries as it is."""
    odd = next((c for c in key if not " " <= c <= "~"), None)
    if odd is not None:
        raise RequestError(f"{option}: expected printable ASCII, which headers carry as it is, found {odd!a} in a key")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    """The port, before anything is loaded; RequestError if it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # asyncio sends small frames at once (TCP_NODELAY) only where the protocol is named.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except (OSError, UnicodeError) as error:  # of the address, or of its name
        raise RequestError(
            f"--host, --port: cannot listen on {host}:{port} ({error}); stop what uses it or choose another with --port"
        ) from error
    return listener
