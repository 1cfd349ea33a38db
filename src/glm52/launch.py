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
from pathlib import Path

from glm52.errors import PlanError
from glm52.options import integer, some_name

MODEL = "zai-org/GLM-5.2-FP8"


@dataclass(frozen=True)
class Gpu:
    """memory_gb: GB = 1e9 bytes. kv: the dtype of the cache that vLLM's recipe gives it. is_amd: not Nvidia."""

    memory_gb: int
    kv: str
    is_amd: bool = False


GPUS = {
    "h100": Gpu(80, "fp8"), "h200": Gpu(141, "fp8"), "h20": Gpu(96, "auto"), "b200": Gpu(180, "fp8_e4m3"),
    "b300": Gpu(288, "fp8_e4m3"), "mi300x": Gpu(192, "fp8_e4m3", True), "mi355x": Gpu(288, "fp8_e4m3", True),
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
    add("--max-model-len", type=integer(1), metavar="N", help="the longest context (default: the server's)")
    add("--served-model-name", type=some_name, default="glm-5.2", metavar="NAME", help="default: glm-5.2")
    add("--tool-call-parser", default="glm47", help="default: glm47, which GLM-5's calls need")
    add("--reasoning-parser", default="glm45", help="default: glm45")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1")
    add("--port", type=integer(1, 65_535), default=8001,
        help="default: 8001, so that glm52 serve --upstream can have 8000")  # fmt: skip
    add("--exec", action="store_true", help="run the command instead of printing it")


def run(args: argparse.Namespace) -> int:
    check_memory(args.model, args.gpu, args.tensor_parallel_size)
    words = command(args)
    if not args.exec:
        print(shlex.join(words))
        return 0
    program = shutil.which(words[0])
    if program is None:
        raise PlanError(f"--exec: there is no {words[0]} here; install it, or run the command elsewhere")
    os.execv(program, words)


def check_memory(model: str, gpu: str, num_gpus: int) -> None:
    """PlanError if the weights do not fit; a word on standard error if nothing says how large they are."""
    least, has = least_gb(model), GPUS[gpu].memory_gb * num_gpus
    if least is None:
        print(f"glm52: {model}: neither files nor the name tell how its weights are stored, so whether they fit "
              f"{num_gpus} x {gpu} ({has} GB) was not checked", file=sys.stderr)  # fmt: skip
    elif has < least:
        raise PlanError(f"{model} needs {least:.0f} GB of GPU memory; {num_gpus} x {gpu} have {has} GB. Take more GPUs "
                        "or a smaller form (FP8, NVFP4)")  # fmt: skip


def least_gb(model: str) -> float | None:
    """What a checkpoint needs: by the files of a folder, by the name of a repository; None where neither tells."""
    stored = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    if stored:
        return 1.2 * stored / 1e9
    return next((gb for name, gb in _LEAST_GB.items() if re.search(name, model.lower())), None)


def command(args: argparse.Namespace) -> list[str]:
    """The command as words. Pure."""
    return (_vllm if args.server == "vllm" else _sglang)(args)


def _shared(args: argparse.Namespace) -> Sequence[str]:
    return ("--served-model-name", args.served_model_name, "--tool-call-parser", args.tool_call_parser,
            "--reasoning-parser", args.reasoning_parser, "--host", args.host, "--port", str(args.port))  # fmt: skip


def _vllm(args: argparse.Namespace) -> list[str]:
    """Source: vllm-project/recipes, models/zai-org/GLM-5.2.yaml."""
    kv, window = args.kv_cache_dtype or GPUS[args.gpu].kv, args.max_model_len
    if window is None and GPUS[args.gpu].is_amd:
        window = 524_288
    words = ["vllm", "serve", args.model, "--tensor-parallel-size", str(args.tensor_parallel_size)]
    words += ["--kv-cache-dtype", kv] if kv != "auto" else []
    if args.drafts:
        words += ["--speculative-config.method", "mtp"]
        words += ["--speculative-config.num_speculative_tokens", str(args.drafts)]
    words += ["--max-model-len", str(window)] if window else []
    return [*words, "--enable-auto-tool-choice", "--enable-prompt-tokens-details", *_shared(args)]


def _sglang(args: argparse.Namespace) -> list[str]:
    """Source: the cookbook of sgl-project/sglang, GLM-5.2. One draft more is verified than is made."""
    words = ["python", "-m", "sglang.launch_server", "--model-path", args.model, "--tp", str(args.tensor_parallel_size)]
    words += ["--kv-cache-dtype", args.kv_cache_dtype] if args.kv_cache_dtype else []
    if args.drafts:
        words += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(args.drafts)]
        words += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(args.drafts + 1)]
    words += ["--context-length", str(args.max_model_len)] if args.max_model_len else []
    return [*words, "--enable-cache-report", *_shared(args)]
