"""Pages of the cache on disk, so that a prefix outlives its process: one file a page.

A page's name is a hash chained over the tokens of its prefix, from a root that stands for all else that its bits depend
on. A file that is not what it should be is thrown away and its page computed again. A thread of its own writes; what it
cannot keep up with is left out and offered again later.

    file:  BLAKE2b of name and bytes | rows of each layer, then index keys of each indexer, as they lie in the cache

Tokens are not written. The MTP layer's last row of a page may stem from another continuation (see ``pages``).
"""

import contextlib
import errno
import hashlib
import logging
import os
import queue
import re
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm52.errors import RequestError
from glm52.ids import new_id

logger = logging.getLogger(__name__)

_DIGEST = 32  # bytes
_QUEUED_BYTES = 1 << 28  # of pages that wait to be written
_NAME = re.compile(f"[0-9a-f]{{{2 * _DIGEST}}}")
_UNFINISHED, _STALE_S = ".tmp", 3600.0


class Store:
    """pools: the cache, as bytes [N, width] each. fingerprint: the weights, their format and the kernels. The files of
    ``folder`` take at most ``max_bytes``; what was used longest ago goes first, and of a prefix its end."""

    def __init__(
        self, folder: Path, pools: list[Tensor], page_size: int, *, fingerprint: str, max_bytes: int
    ) -> None:  # fmt: skip
        widths = [pool.shape[1] for pool in pools]
        self._page_bytes = page_size * sum(widths)
        if max_bytes < self._page_bytes + _DIGEST:
            raise RequestError(f"--prefix-cache-size: a page is {self._page_bytes + _DIGEST} bytes, "
                               f"more than the {max_bytes} given")  # fmt: skip
        self._folder, self._pools, self._page_size, self._max_bytes = folder, pools, page_size, max_bytes
        self._root = _digest(fingerprint, f"{page_size} {widths}".encode()).hex()
        self._sizes = _listed(folder)
        self._lock = threading.Lock()  # over _sizes
        self._token = new_id("", 8)  # of the names of unfinished files: two containers have the same process ids
        self._warned: set[str] = set()
        self._is_broken = False
        self._evict()
        # Names of a prefix with the bytes of its last page, or without: it was used.
        self._jobs: queue.Queue[tuple[list[str], Tensor | None] | None] = queue.Queue(
            max(1, _QUEUED_BYTES // self._page_bytes)
        )
        self._thread = threading.Thread(target=self._work, name="glm52-store", daemon=True)
        self._thread.start()

    def name(self, tokens: Sequence[int], known: list[str]) -> list[str]:
        """Names of all full pages of ``tokens``. ``known`` are names of the same sequence, and grows."""
        for begin in range(len(known) * self._page_size, len(tokens) - self._page_size + 1, self._page_size):
            block = np.asarray(tokens[begin : begin + self._page_size], dtype="<i8")
            known.append(_digest(known[-1] if known else self._root, block.tobytes()).hex())
        return known[: len(tokens) // self._page_size]

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def save(self, names: Sequence[str], pages: Sequence[int]) -> None:
        """Queue the pages of a prefix that are not kept yet: their bytes are copied now and written later."""
        for i, (name, page) in enumerate(zip(names, pages, strict=False)):
            if name in self._sizes:
                continue
            if self._is_broken or self._jobs.full():
                return
            data = torch.cat([pool[self._rows(page)].flatten() for pool in self._pools])
            with self._lock:
                self._sizes[name] = len(data) + _DIGEST
            self._jobs.put((list(names[: i + 1]), data))

    def restore(self, name: str, page: int) -> bool:
        """Read a page into the cache -> whether it was there, and whole."""
        try:
            data = self._read(self._folder / name)
        except FileNotFoundError:  # not written yet, or thrown out by another process
            self._forget(name)
            return False
        except OSError as error:
            self._refuse(name, str(error))
            return False
        body = data[_DIGEST:]
        if _digest(name, body.data) != data[:_DIGEST].tobytes():
            self._refuse(name, "its checksum is wrong")
            return False
        parts = torch.from_numpy(body).split([pool.shape[1] * self._page_size for pool in self._pools])
        for pool, part in zip(self._pools, parts, strict=True):
            pool[self._rows(page)] = part.view(self._page_size, -1)
        return True

    def _read(self, path: Path) -> NDArray[np.uint8]:
        """The bytes of a page. OSError before anything is read that is no page: a pipe, say, or a terabyte."""
        size, found = self._page_bytes + _DIGEST, path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise OSError(f"expected a file of {size} bytes")
        return np.fromfile(path, dtype=np.uint8, count=size)

    def mark_used(self, names: Sequence[str]) -> None:
        if not self._jobs.full():
            self._jobs.put((list(names), None))

    def close(self) -> None:
        """Write what is queued."""
        self._jobs.put(None)
        self._thread.join()

    def _rows(self, page: int) -> slice:
        return slice(page * self._page_size, (page + 1) * self._page_size)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._sizes.pop(name, None)

    def _refuse(self, name: str, fault: str) -> None:
        """Throw a file away, if it can be."""
        self._forget(name)
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()
        self._warn("prefix cache: %s is ignored and computed again: %s", self._folder / name, fault)

    def _warn(self, message: str, *args: Any) -> None:
        """Each kind of fault is told once."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *args)

    # ── the writing thread ───────────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            names, data = job
            if data is None:
                self._mark(names)
            elif not self._is_broken:
                try:
                    self._write(names, data)
                except Exception as error:  # whatever it is, close() must find the thread alive
                    self._fail(names[-1], error)

    def _mark(self, names: list[str]) -> None:
        """In memory and, for the next process, on disk. The end of a prefix counts as its oldest part."""
        now = time.time_ns()
        with self._lock:
            self._renew(names)
        for i, name in enumerate(reversed(names)):
            with contextlib.suppress(OSError):  # not there, or another user's
                os.utime(self._folder / name, ns=(now + i, now + i))

    def _renew(self, names: Sequence[str]) -> None:
        for name in reversed(names):
            if name in self._sizes:
                self._sizes.move_to_end(name)

    def _write(self, names: list[str], data: Tensor) -> None:
        """The last page of a prefix: whole or not at all, whatever happens. What would be too much goes before."""
        name, page = names[-1], data.numpy().data
        unfinished = self._folder / f"{name}.{self._token}{_UNFINISHED}"
        with self._lock:
            self._sizes[name] = len(data) + _DIGEST
        self._evict(names)
        while name in self._sizes:
            try:
                with unfinished.open("wb") as file:
                    file.write(_digest(name, page))
                    file.write(page)
                unfinished.replace(self._folder / name)
                return
            except OSError as error:
                with contextlib.suppress(OSError):
                    unfinished.unlink()
                if error.errno != errno.ENOSPC:
                    raise
                self._warn("prefix cache: the disk of %s is full; older pages make room", self._folder)
                self._evict(names, at_least=1)

    def _evict(self, newest: Sequence[str] = (), at_least: int = 0) -> None:
        """What is beyond the bound, and so many bytes, the oldest first; last the prefix ``newest``, from its end."""
        with self._lock:
            excess = max(sum(self._sizes.values()) - self._max_bytes, at_least)
            if excess > 0:
                self._renew(newest)
            while excess > 0:
                oldest, size = self._sizes.popitem(last=False)
                with contextlib.suppress(OSError):  # not written yet, thrown out by another process, or not ours
                    (self._folder / oldest).unlink()
                excess -= size

    def _fail(self, name: str, error: Exception) -> None:
        """A page was not written: it is left out, and so are all others unless it was the page's own fault."""
        self._forget(name)
        if isinstance(error, FileNotFoundError | IsADirectoryError) and self._folder.is_dir():
            self._warn("prefix cache: %s is not kept: %s", self._folder / name, error)
        else:
            self._is_broken = True
            self._warn("prefix cache: no more pages are written to %s: %s", self._folder, error)


def _digest(before: str, data: bytes | memoryview) -> bytes:
    state = hashlib.blake2b(before.encode(), digest_size=_DIGEST)
    state.update(data)
    return state.digest()


def _listed(folder: Path) -> OrderedDict[str, int]:
    """Bytes of each file, the one that was used longest ago first; the folder is made if it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = []
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another server has finished it, or thrown it away
                info = path.stat()
                if stat.S_ISREG(info.st_mode):
                    found.append((path, info))
        for path, info in found:
            if path.suffix == _UNFINISHED and info.st_mtime < time.time() - _STALE_S:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise RequestError(f"--prefix-cache: cannot use {folder} ({error.strerror})") from error
    pages = [(info.st_mtime_ns, path.name, info.st_size) for path, info in found if _NAME.fullmatch(path.name)]
    return OrderedDict((name, size) for _, name, size in sorted(pages))
