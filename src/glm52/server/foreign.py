"""Flags that users of vLLM and SGLang know, as far as they mean anything here. What means nothing is named."""

import argparse

_HERE = "nothing here: one process computes, with every core of this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("known from vLLM", "also --max-model-len, --max-num-seqs and so on, see above")
    add = group.add_argument
    add("--tool-call-parser", choices=["glm47"], help="the form of calls; always this one")
    add("--reasoning-parser", choices=["glm45"], help="the form of reasoning; always this one")
    add("--enable-auto-tool-choice", action="store_true", help="always on")
    add("--tensor-parallel-size", type=int, metavar="N", help=_HERE)


def notes(args: argparse.Namespace) -> list[str]:
    """One line for each flag that was given and changes nothing. Pure."""
    out = []
    if args.tensor_parallel_size not in (None, 1):
        out.append(f"--tensor-parallel-size {args.tensor_parallel_size} means {_HERE}")
    return out
