"""A loaded model with everything a conversation needs: tokenizer, template, engine. What ``chat``, ``serve`` and
``eval`` start from."""

import hashlib
import json
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from glm52 import __version__, memory, ops
from glm52.cache import CacheFormat
from glm52.chat import ChatTemplate
from glm52.config import GLMConfig
from glm52.engine import Engine, SamplingParams
from glm52.engine.store import Store
from glm52.errors import CheckpointError, RequestError
from glm52.hub import name_of
from glm52.load import look_into
from glm52.options import integer
from glm52.quant import WeightFormat
from glm52.tokenizer import Tokenizer

PREFIX_CACHE_BYTES = 10_000_000_000
MOST_ROWS = 32_768  # of the cache, unless more are asked for


def add_context_argument(parser: ArgumentParser, *names: str) -> None:
    parser.add_argument("--context", *names, type=integer(64), help="cache rows, shared by all requests "
                        f"(default: the model's longest context, at most {MOST_ROWS:,})")  # fmt: skip


def add_format_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--format", choices=get_args(WeightFormat), help="format of the weights (default: as stored "
                        "if quantised, else f32 below 1 GiB, else bf16)")  # fmt: skip
    parser.add_argument("--kv-cache-dtype", choices=get_args(CacheFormat), default="auto",
                        help="format of cached rows and index keys (default: that of activations)")  # fmt: skip


@dataclass(frozen=True)
class Session:
    """name: what the model is called in a response. defaults: its generation_config.json."""

    name: str
    folder: Path
    config: GLMConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    engine: Engine
    defaults: dict[str, Any]

    @property
    def chunks(self) -> str:
        """For people: how prompts are read."""
        return f"prompts are read in chunks of up to {self.engine.scheduler.max_batch_tokens:,} tokens"

    @staticmethod
    def open(
        folder: Path,
        *,
        fmt: WeightFormat | None = None,
        context: int | None = None,
        max_seqs: int = 8,
        max_batch_tokens: int | None = None,
        num_drafts: int | None = None,
        cache: CacheFormat = "auto",
        prefix_cache: Path | None = None,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
    ) -> "Session":
        """Load a folder. fmt, cache: see ``look_into``. context: cache rows for all sequences together (default: the
        model's longest context, at most MOST_ROWS). max_batch_tokens: of a step; None: as ``Needs.step_tokens``
        chooses. PlanError if all that and the weights do not fit this machine. num_drafts None: with an MTP layer up to
        3, as many as pay. prefix_cache: where pages of the cache outlive the process."""
        config = GLMConfig.read(folder)
        tokenizer, template = Tokenizer.read(folder), ChatTemplate.read(folder)
        rows = min(config.max_position_embeddings, MOST_ROWS) if context is None else context
        source = look_into(folder, fmt, cache)
        tokens = source.needs.step_tokens(rows, max_seqs) if max_batch_tokens is None else max_batch_tokens
        model = source.load(rows=rows, tokens=tokens)
        with memory.running_out(name_of(folder)):
            engine = Engine(
                model,
                num_rows=rows,
                max_seqs=max_seqs,
                max_batch_tokens=tokens,
                num_drafts=(3 if model.mtp else 0) if num_drafts is None else num_drafts,
                adaptive=num_drafts is None,
                tokenizer=tokenizer,
            )
        if prefix_cache is not None:
            engine.store = Store(
                prefix_cache, engine.cache.pools(), engine.pages.page_size,
                fingerprint=f"{_weights(folder)} {fmt} {cache} top {model.index_topk} drafts {engine.num_drafts > 0}",
                max_bytes=prefix_cache_bytes,
            )  # fmt: skip
        return Session(name_of(folder), folder, model.config, tokenizer, template, engine, generation_defaults(folder))


def generation_defaults(folder: Path) -> dict[str, Any]:
    """A folder's generation_config.json."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        found = dict(json.loads(file.read_text("utf-8")))
        SamplingParams(**{k: found[k] for k in ("temperature", "top_p", "top_k") if found.get(k) is not None})
    except (ValueError, TypeError, RecursionError, RequestError) as error:
        raise CheckpointError(f"{file}: expected a JSON object with numbers for sampling ({error})") from error
    return found


def _weights(folder: Path) -> str:
    """Changes with the weights and with the code that runs them. Files are told apart by size and time, not read."""
    state = hashlib.blake2b(f"{__version__} {ops.backend()}".encode(), digest_size=16)
    state.update((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        stat = path.stat()
        state.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return state.hexdigest()
