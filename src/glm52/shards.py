"""Token shards on disk: per bucket three arrays, and one manifest that says where every token came from.

{bucket}.tokens.npy   uint16 [n]        token ids, documents back to back
{bucket}.reply.npy    uint8  [n]        1 = a token the assistant must produce
{bucket}.offsets.npy  int64  [docs+1]   where documents begin and end
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm52.errors import ConfigError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Bucket:
    """The documents of one bucket, memory-mapped. is_chat: some tokens are replies."""

    tokens: NDArray[np.uint16]
    reply: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    is_chat: bool

    def __len__(self) -> int:
        return len(self.offsets) - 1


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest; ConfigError if it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / MANIFEST}: not valid JSON ({error}); build the shards again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("buckets"), dict):
        raise ConfigError(f"{folder / MANIFEST}: expected an object with an object buckets; build the shards again")
    return manifest


class Shards:
    """A folder written by ``glm52 data build``."""

    def __init__(self, folder: Path, option: str = "--data") -> None:
        """option: where the folder was named."""
        if not (folder / MANIFEST).is_file():
            raise ConfigError(f"{option}: expected token shards with a {MANIFEST}, found none in {folder}; "
                              "write one with: glm52 data build --out DIR")  # fmt: skip
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._open = lru_cache(maxsize=None)(self._read)

    @property
    def buckets(self) -> list[str]:
        return sorted(self.manifest["buckets"])

    def bucket(self, name: str) -> Bucket:
        """ConfigError lists the buckets there are if this one is missing or damaged."""
        return self._open(name)

    def _read(self, name: str) -> Bucket:
        if name not in self.manifest["buckets"]:
            raise ConfigError(f"bucket: expected one of {', '.join(self.buckets)} in {self.folder}, found {name!r}")
        parts = ("tokens", "reply", "offsets")
        tokens, reply, offsets = (np.load(self.folder / f"{name}.{p}.npy", mmap_mode="r") for p in parts)
        if not len(tokens) == len(reply) == offsets[-1]:
            raise ConfigError(f"{self.folder}/{name}: {len(tokens)} tokens, {len(reply)} reply marks and an end at "
                              f"{offsets[-1]} disagree; build the bucket again")  # fmt: skip
        return Bucket(tokens, reply, offsets, bool(np.any(reply)))


def write_bucket(folder: Path, name: str, documents: Iterable[tuple[list[int], list[bool] | None]]) -> dict[str, int]:
    """Write one bucket -> its numbers of documents and tokens. The mask None means natural text."""
    tokens, replies, offsets = [], [], [0]
    for ids, mask in documents:
        tokens.append(np.array(ids, dtype=np.uint16))
        replies.append(np.zeros(len(ids), np.uint8) if mask is None else np.array(mask, dtype=np.uint8))
        offsets.append(offsets[-1] + len(ids))
    if not tokens:
        raise ConfigError(f"bucket {name}: no document was found; add sources or leave the bucket out")
    np.save(folder / f"{name}.tokens.npy", np.concatenate(tokens))
    np.save(folder / f"{name}.reply.npy", np.concatenate(replies))
    np.save(folder / f"{name}.offsets.npy", np.array(offsets, dtype=np.int64))
    return {"documents": len(tokens), "tokens": offsets[-1]}
