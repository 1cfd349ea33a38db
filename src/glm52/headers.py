"""Safetensors headers, read and checked without torch and without touching a tensor's bytes.

A file is eight bytes of header length, the header as JSON, and the tensors' bytes. Everything the header claims is held
against the file: length, JSON, dtypes, shapes, bytes = shape x dtype, no gap, no overlap, nothing beyond the end.
Source: the safetensors format specification.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm52.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100 << 20
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes [begin, end) of the file ``shard``."""

    dtype: str
    shape: tuple[int, ...]
    shard: Path
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder, from its index or its single file."""
    if (folder / INDEX).is_file():
        return _read_indexed(folder)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}, found {found or 'an empty folder'}")


def stored_bytes(folder: Path) -> int:
    """Of the files that hold a folder's weights; 0 if there are none."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _read_indexed(folder: Path) -> dict[str, TensorInfo]:
    weight_map = read_index(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in (".", ".."):
            raise CheckpointError(
                f"{folder / INDEX}: weight_map leaves the folder with {file!r}; do not trust this copy"
            )
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder}: the index names the shard {file}, which is missing; download it again")
        for name, info in read_header(folder / file).items():
            if name in tensors:
                raise CheckpointError(f"{folder}: {name} is in both {tensors[name].shard.name} and {file}; "
                                      "remove the shard that does not belong")  # fmt: skip
            tensors[name] = info
    wrong = [n for n, file in weight_map.items() if n not in tensors or tensors[n].shard.name != file]
    if wrong:
        raise CheckpointError(f"{folder / INDEX}: says {wrong[0]} is in {weight_map[wrong[0]]}, and it is not "
                              f"({len(wrong)} such tensors); index and shards are of different versions")  # fmt: skip
    return tensors


def read_index(folder: Path) -> dict[str, str]:
    """The shard of every tensor, as a folder's index says."""
    path = folder / INDEX
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON object with a weight_map ({error!r}); download it again"
        ) from error
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    return weight_map


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: claims a header of {length} bytes in a file of {size}; truncated or not "
                                  "safetensors, download it again")  # fmt: skip
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not valid JSON ({error}); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is {type(header).__name__}, expected an object; download it again")
    header.pop("__metadata__", None)
    infos = {name: _info(path, name, entry, 8 + length) for name, entry in header.items()}
    at = 8 + length
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != at:
            raise CheckpointError(f"{path}: {name} begins at byte {info.begin}, expected {at} (gap or overlap)")
        at = info.end
    if at != size:
        raise CheckpointError(f"{path}: expected {at} bytes, found {size}; it is "
                              f"{'truncated' if size < at else 'longer than its header'}, get it again")  # fmt: skip
    return infos


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key stands twice")
    return out


def _info(path: Path, name: str, entry: Any, data_begin: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(x) is int and x >= 0 for x in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: the entry of {name} lacks dtype, shape or data_offsets") from error
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype!r}, expected one of {', '.join(DTYPE_BYTES)}")
    if not whole or end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(f"{path}: {name} of shape {list(shape)} and dtype {dtype} claims bytes {begin} to {end}")
    return TensorInfo(dtype, shape, path, data_begin + begin, data_begin + end)
