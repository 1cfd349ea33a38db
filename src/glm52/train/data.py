"""Windows of packed documents from token shards: the order is a pure function of the seed, so a step number resumes it.

A window holds whole chat documents and pieces of natural text. Attention and both losses stay inside a document. Which
document comes next is decided by the mixture: the bucket that is furthest behind its share.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glm52.cache import Spans
from glm52.shards import Bucket, Shards


@dataclass(frozen=True)
class Batch:
    """B windows of T tokens in all, packed. targets_AT[a]: the token a + 1 ahead; weight_AT: its share of the loss (0 =
    none). The model predicts the first row, the MTP layer's steps the others."""

    tokens_T: Tensor
    targets_AT: Tensor
    weight_AT: Tensor
    spans: Spans


@dataclass(frozen=True)
class Piece:
    """Tokens [begin, end) of a bucket; ``has_next``: the token at ``end`` continues the same document."""

    bucket: str
    begin: int
    end: int
    has_next: bool


class _Stream:
    """One bucket's documents in shuffled order, over and over, each epoch in an order of its own."""

    def __init__(self, name: str, bucket: Bucket, seed: int) -> None:
        self.name, self.offsets, self.seed = name, bucket.offsets, seed
        self.is_chat = bucket.is_chat
        self.epoch, self.cursor, self.used = -1, 0, 0
        self.order = np.empty(0, dtype=np.int64)
        self.begin = self.end = 0

    def head(self) -> int:
        """Length of what is left of the current document."""
        while self.begin >= self.end:
            if self.cursor >= len(self.order):
                self.epoch += 1
                self.order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.offsets) - 1)
                self.cursor = 0
            document = self.order[self.cursor]
            self.begin, self.end = int(self.offsets[document]), int(self.offsets[document + 1])
            self.cursor += 1
        return self.end - self.begin

    def take(self, count: int) -> Piece:
        count = min(count, self.head())
        piece = Piece(self.name, self.begin, self.begin + count, self.begin + count < self.end)
        self.begin += count
        self.used += count
        return piece


def windows(shards: Shards, mixture: Mapping[str, float], window: int, seed: int) -> Iterator[list[Piece]]:
    """Endless windows as lists of pieces with at most ``window`` tokens. Same arguments, same windows."""
    streams = {name: _Stream(name, shards.bucket(name), seed + i) for i, name in enumerate(sorted(mixture))}
    while True:
        pieces: list[Piece] = []
        room = window
        while room > 0:
            by_need = sorted(streams.values(), key=lambda s: (s.used / mixture[s.name], s.name))
            chosen = next((s for s in by_need if not s.is_chat or s.head() <= room or not pieces), None)
            if chosen is None:
                break
            piece = chosen.take(room)
            if chosen.is_chat and piece.has_next:  # longer than a whole window: its tail has lost its question
                chosen.begin = chosen.end
            pieces.append(piece)
            room -= piece.end - piece.begin
        yield pieces


def materialize(
    shards: Shards,
    batch: list[list[Piece]],
    window: int,
    pad_id: int,
    prompt_weight: float,
    ahead: int = 2,
    stretch: int = 0,
) -> Batch:
    """Tensors of a list of windows. prompt_weight: the weight of chat tokens that the assistant does not produce.
    ahead: rows of targets.

    stretch: if set, half of the documents skip positions at two places, so that they seem up to this long: distances
    are learned that the window does not hold. Source: Zhu et al., PoSE (arXiv 2309.10400).
    """
    B = len(batch)
    tokens = np.full((B, window), pad_id, dtype=np.int64)
    targets = np.full((ahead, B, window), pad_id, dtype=np.int64)
    weight = np.zeros((ahead, B, window), dtype=np.float32)
    lengths: list[int] = []
    skips: list[np.ndarray] = []
    for b, pieces in enumerate(batch):
        at = 0
        for piece in pieces:
            bucket = shards.bucket(piece.bucket)
            n = piece.end - piece.begin
            stop = piece.end + piece.has_next
            ids = bucket.tokens[piece.begin : stop].astype(np.int64)
            w = np.where(bucket.reply[piece.begin : stop] > 0, 1.0, prompt_weight if bucket.is_chat else 1.0)
            tokens[b, at : at + n] = ids[:n]
            for a in range(ahead):
                count = min(max(0, len(ids) - a - 1), n)
                targets[a, b, at : at + count] = ids[a + 1 : a + 1 + count]
                weight[a, b, at : at + count] = w[a + 1 : a + 1 + count]
            lengths.append(n)
            skips.append(_skips(n, stretch, piece.begin))
            at += n
        if at < window:
            lengths.append(window - at)
            skips.append(np.zeros(window - at, dtype=np.int64))
    spans = Spans.of_documents(lengths, window)
    if stretch:
        spans.positions_T.add_(torch.from_numpy(np.concatenate(skips)))
    by_row = [torch.from_numpy(x.reshape(ahead, -1)) for x in (targets, weight)]
    return Batch(torch.from_numpy(tokens.reshape(-1)), by_row[0], by_row[1], spans)


def _skips(length: int, stretch: int, seed: int) -> np.ndarray:
    """What to add to each position of a document: for half of the documents zero, else a staircase of two steps."""
    rng = np.random.default_rng(seed)
    if length >= stretch or rng.random() < 0.5:
        return np.zeros(length, dtype=np.int64)
    places, steps = rng.integers(1, max(length, 2), 2), rng.integers(0, (stretch - length) // 2 + 1, 2)
    skips: np.ndarray = ((np.arange(length)[:, None] >= places) * steps).sum(1)
    return skips
