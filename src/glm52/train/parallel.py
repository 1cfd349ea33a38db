"""Data parallelism: every process holds the whole model, takes its share of each batch, and sums gradients.

On one machine ``glm52 train --processes N`` starts the processes itself; under ``torchrun`` they find each other
through the usual environment. Two single-threaded processes beat one with two threads on small matrices.
"""

import os
import signal
import socket
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in one exchange."""
    if world_size() == 1:
        return
    tensors = list(tensors)
    flat = torch.cat([t.flatten().float() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


def launch(work: Callable[..., None], processes: int, *args: Any) -> None:
    """Run ``work(*args)`` in that many connected processes; an error in one ends all and is raised here."""
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
        work(*args)
    elif processes == 1:
        work(*args)
    else:
        init = _free_address()
        spawn(_entry, (work, processes, init, args), nprocs=processes)


def _free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{s.getsockname()[1]}"


def _entry(rank: int, work: Callable[..., None], processes: int, address: str, args: tuple[Any, ...]) -> None:
    # torch sends SIGINT to the children of a parent that dies; one started in the background would ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    try:
        work(*args)
    finally:
        dist.destroy_process_group()
