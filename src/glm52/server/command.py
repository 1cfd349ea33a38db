"""``glm52 serve``: load a model, bind the port, serve until told to stop."""

import argparse
import socket
import sys

import uvicorn

from glm52.engine import AsyncEngine
from glm52.errors import RequestError
from glm52.hub import resolve
from glm52.server.app import Service, create_app
from glm52.session import Session, add_format_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="folder or hub name (default: the small model that is shipped)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0 picks a free one")
    parser.add_argument("--served-model-name", help="name clients use (default: the folder's)")
    parser.add_argument("--context", type=int, help="cache rows shared by all requests")
    parser.add_argument("--max-seqs", type=int, default=8, help="requests computed together (default: 8)")
    parser.add_argument("--max-batch-tokens", type=int, default=512, help="tokens of one step (default: 512)")
    parser.add_argument("--drafts", type=int, help="tokens drafted per step, 0 to 5 (default: up to 3, as many as pay)")
    add_format_argument(parser)


def run(args: argparse.Namespace) -> int:
    listener = _bind(args.host, args.port)
    session = Session.open(
        resolve(args.model), fmt=args.format, context=args.context, max_seqs=args.max_seqs,
        max_batch_tokens=args.max_batch_tokens, num_drafts=args.drafts, cache=args.kv_cache_dtype,
    )  # fmt: skip
    backend = AsyncEngine(session.engine)
    name = args.served_model_name or session.name
    service = Service(
        backend, session.tokenizer, session.template, name=name, context_length=session.engine.context_length,
        defaults=session.defaults,
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    print(f"{name} at http://{host}:{port}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning")).run(sockets=[listener])
    backend.close()
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """The port, before anything is loaded; RequestError if it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except (OSError, OverflowError) as error:
        raise RequestError(
            f"--port: cannot listen on {host}:{port} ({error}); stop what uses it or choose another with --port"
        ) from error
    return listener
