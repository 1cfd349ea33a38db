"""``glm52 launch``: the command that starts vLLM or SGLang for a checkpoint of GLM-5.2 on given GPUs. Needs neither.

The flags are those of the recipes that the projects publish for it; so is the least memory: 1.2 times the weights.
"""

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from glm52.config import GLMConfig
from glm52.errors import PlanError
from glm52.headers import stored_bytes
from glm52.options import integer, some_name

MODEL = "zai-org/GLM-5.2-FP8"
CONFIG = GLMConfig.preset("glm-5.2")


@dataclass(frozen=True)
class Gpu:
    """memory_gb: GB = 1e9 bytes. What vLLM's recipe gives it: kv, the dtype of the cache; window, the longest context;
    flags and environment. forms: those beyond FP8 and BF16 that it has for it."""

    memory_gb: int
    kv: str
    window: str = "auto"  # as much as the memory holds: without it vLLM stops where a million tokens do not fit
    flags: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()


_HOPPER = partial(Gpu, kv="fp8")
_BLACKWELL = partial(Gpu, kv="fp8_e4m3", flags=("--max-num-seqs", "32"), forms=("nvfp4",))
_AMD = partial(
    Gpu, kv="fp8_e4m3", window="524288",
    flags=("--gpu-memory-utilization", "0.80", "--max-num-seqs", "32", "--linear-backend", "aiter",
           "--moe-backend", "aiter"),
    environment=("VLLM_ROCM_USE_AITER=1", "VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=1"),
)  # fmt: skip
GPUS = {
    "h100": _HOPPER(80), "h200": _HOPPER(141), "h20": _HOPPER(141, kv="auto"), "h20-96gb": _HOPPER(96, kv="auto"),
    "b200": _BLACKWELL(180), "b300": _BLACKWELL(288), "mi300x": _AMD(192), "mi355x": _AMD(288, forms=("mxfp4",)),
}  # fmt: skip
_LEAST_GB = {"mxfp4": 446, "nvfp4": 558, "fp8": 893, r"bf16|glm-5\.2$": 1786}  # by what a repository's name says


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("server", choices=["vllm", "sglang"])
    add("model", nargs="?", default=MODEL, help=f"folder or hub name of a GLM-5.2 checkpoint (default: {MODEL})")
    add("--gpu", choices=GPUS, default="h200", help="default: h200")
    add("--tensor-parallel-size", "--tp", type=integer(1, 1024), default=8, metavar="N",
        help="GPUs (default: 8)")  # fmt: skip
    add("--kv-cache-dtype", metavar="TYPE", help="default: what the recipe has for the GPU")
    add("--drafts", type=integer(0, 64), default=5,
        help="tokens the MTP layer drafts per step; 0: none (default: 5)")  # fmt: skip
    add("--max-model-len", type=_window, metavar="N",
        help="the longest context; auto: what fits, as vLLM finds (default: the recipe's, else auto)")  # fmt: skip
    add("--served-model-name", type=some_name, default="glm-5.2", metavar="NAME", help="default: glm-5.2")
    add("--tool-call-parser", default="glm47", help="default: glm47, which GLM-5's calls need")
    add("--reasoning-parser", default="glm45", help="default: glm45")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1")
    add("--port", type=integer(1, 65_535), default=8001,
        help="default: 8001, so that glm52 serve --upstream can have 8000")  # fmt: skip
    add("--exec", action="store_true", help="run the command instead of printing it")


def _window(text: str) -> str:
    """For argparse: the longest context."""
    return text if text == "auto" else str(integer(1, CONFIG.max_position_embeddings)(text))


def run(args: argparse.Namespace) -> int:
    heads = CONFIG.num_attention_heads
    if heads % args.tensor_parallel_size:
        raise PlanError(f"--tensor-parallel-size: expected a divisor of {heads}, the heads of attention, found "
                        f"{args.tensor_parallel_size}")  # fmt: skip
    check_memory(args.model, args.gpu, args.tensor_parallel_size)
    environment, words = command(args)
    if not args.exec:
        print(" ".join([*environment, shlex.join(words)]))
        return 0
    program = shutil.which(words[0])
    if program is None:
        raise PlanError(f"--exec: there is no {words[0]} here; install it, or run the command elsewhere")
    os.execve(program, words, os.environ | dict(pair.split("=", 1) for pair in environment))


def check_memory(model: str, gpu: str, num_gpus: int) -> None:
    """PlanError if the weights do not fit; a word on standard error if nothing says how large they are."""
    least, has = least_gb(model), GPUS[gpu].memory_gb * num_gpus
    form = next((f for f in ("nvfp4", "mxfp4") if f in model.lower()), None)
    if form and form not in GPUS[gpu].forms:
        those = ", ".join(name for name, g in GPUS.items() if form in g.forms)
        print(f"glm52: {model}: vLLM's recipe has {form.upper()} for {those} alone", file=sys.stderr)
    if least is None:
        print(f"glm52: {model}: neither files nor the name tell how its weights are stored, so whether they fit "
              f"{num_gpus} x {gpu} ({has} GB) was not checked", file=sys.stderr)  # fmt: skip
    elif has < least:
        raise PlanError(f"{model} needs {least:.0f} GB of GPU memory; {num_gpus} x {gpu} have {has} GB. Take more GPUs "
                        "or a smaller form (FP8, NVFP4)")  # fmt: skip


def least_gb(model: str) -> float | None:
    """What a checkpoint needs: by the files of a folder, by the name of a repository; None where neither tells."""
    if stored := stored_bytes(Path(model)):
        return 1.2 * stored / 1e9
    return next((gb for name, gb in _LEAST_GB.items() if re.search(name, model.lower())), None)


def command(args: argparse.Namespace) -> tuple[Sequence[str], list[str]]:
    """Variables of the environment, and the command as words. Pure."""
    return (GPUS[args.gpu].environment, _vllm(args)) if args.server == "vllm" else ((), _sglang(args))


def _shared(args: argparse.Namespace) -> Sequence[str]:
    return ("--served-model-name", args.served_model_name, "--tool-call-parser", args.tool_call_parser,
            "--reasoning-parser", args.reasoning_parser, "--host", args.host, "--port", str(args.port))  # fmt: skip


def _vllm(args: argparse.Namespace) -> list[str]:
    """Source: vllm-project/recipes, models/zai-org/GLM-5.2.yaml."""
    gpu = GPUS[args.gpu]
    kv = args.kv_cache_dtype or gpu.kv
    words = ["vllm", "serve", args.model, "--tensor-parallel-size", str(args.tensor_parallel_size)]
    words += ["--kv-cache-dtype", kv] if kv != "auto" else []
    if args.drafts:
        words += ["--speculative-config.method", "mtp"]
        words += ["--speculative-config.num_speculative_tokens", str(args.drafts)]
    words += ["--max-model-len", args.max_model_len or gpu.window, *gpu.flags]
    words += ["--trust-remote-code"] if "mxfp4" in args.model.lower() else []
    return [*words, "--enable-auto-tool-choice", "--enable-prompt-tokens-details", *_shared(args)]


def _sglang(args: argparse.Namespace) -> list[str]:
    """Source: the cookbook of sgl-project/sglang, GLM-5.2. One draft more is verified than is made. A context that the
    memory does not hold is no error there."""
    words = ["python", "-m", "sglang.launch_server", "--model-path", args.model, "--tp", str(args.tensor_parallel_size)]
    words += ["--kv-cache-dtype", args.kv_cache_dtype] if args.kv_cache_dtype else []
    if args.drafts:
        words += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(args.drafts)]
        words += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(args.drafts + 1)]
    words += ["--context-length", args.max_model_len] if args.max_model_len not in (None, "auto") else []
    return [*words, "--enable-cache-report", *_shared(args)]
