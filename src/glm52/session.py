"""A loaded model with everything a conversation needs: tokenizer, template, engine. What ``chat``, ``serve`` and
``eval`` start from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glm52.chat import ChatTemplate
from glm52.config import GLMConfig
from glm52.engine import Engine
from glm52.errors import RequestError
from glm52.load import load
from glm52.tokenizer import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Below this size a model is computed in fp32 unless told otherwise: it costs little and rounds less.
_SMALL_BYTES = 1 << 30


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

    @staticmethod
    def open(
        folder: Path,
        *,
        dtype: str = "auto",
        context: int | None = None,
        max_seqs: int = 8,
        max_batch_tokens: int = 512,
        num_drafts: int | None = None,
    ) -> "Session":
        """Load a folder. context: cache rows for all sequences together (default: the model's longest context, at most
        32,768). num_drafts None: 1 where the checkpoint has an MTP layer."""
        config = GLMConfig.read(folder)
        if dtype == "auto":
            size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
            dtype = "float32" if size < _SMALL_BYTES else "bfloat16"
        tokenizer, template = Tokenizer.read(folder), ChatTemplate.read(folder)
        model = load(folder, dtype=_DTYPES[dtype])
        if context is not None and context < 64:
            raise RequestError(f"--context: expected at least 64 tokens, found {context}")
        engine = Engine(
            model,
            num_rows=context or min(config.max_position_embeddings, 32_768),
            max_seqs=max_seqs,
            max_batch_tokens=max_batch_tokens,
            num_drafts=(1 if model.mtp else 0) if num_drafts is None else num_drafts,
            tokenizer=tokenizer,
        )
        file = folder / "generation_config.json"
        defaults = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        return Session(folder.name, folder, model.config, tokenizer, template, engine, defaults)
