"""``glm52 train RECIPE``: start the processes, run the stages, keep metrics, a progress bar and a plot."""

import argparse
import itertools
import json
import logging
import runpy
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from glm52.errors import ConfigError
from glm52.shards import Shards
from glm52.train import parallel
from glm52.train.optim import product_dtype
from glm52.train.trainer import Metrics, Recipe, Trainer, describe

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="Python file with a function recipe() that returns a Recipe")
    parser.add_argument("--data", type=Path, required=True, help="folder of token shards (glm52 data build)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an existing run is resumed")
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes of one thread each")
    parser.add_argument("--no-compile", action="store_true", help="run eagerly (no C++ compiler needed, slower)")


def run(args: argparse.Namespace) -> int:
    recipe = read_recipe(args.recipe)
    shards = Shards(args.data)
    for stage in recipe.stages:
        for bucket in stage.mixture:
            shards.bucket(bucket)
    args.out.mkdir(parents=True, exist_ok=True)
    parallel.launch(train, args.processes, args.recipe, args.data, args.out, not args.no_compile)
    return 0


def read_recipe(path: Path) -> Recipe:
    """Call ``recipe()`` of a Python file."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise ConfigError(f"recipe: expected a Python file, found {found} at {path}")
    try:
        make = runpy.run_path(str(path)).get("recipe")
        recipe = make() if callable(make) else None
    except Exception as error:  # whatever its code does
        lines = [f", line {f.lineno}" for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f"{path}{lines[-1] if lines else ''}"  # where it is not valid Python, the error itself says which line
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"recipe: {where}: {what}; GLM52_LOG=debug shows all") from error
    if not callable(make):
        raise ConfigError(f"recipe: {path} has no function recipe() that returns a Recipe")
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"recipe: recipe() of {path} returned {type(recipe).__name__}, expected a Recipe")
    return recipe


def train(recipe_path: Path, data: Path, out: Path, compiled: bool) -> None:
    """The whole run in this process; rank 0 also writes metrics and shows progress."""
    recipe = read_recipe(recipe_path)
    leader = parallel.rank() == 0
    lock = FileLock(out / "lock")
    if leader:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"--out {out}: another run is writing there; wait or choose another folder") from error
    trainer = Trainer(recipe, Shards(data), out, compiled=compiled)
    peak = matmul_peak_flops() * parallel.world_size()
    if leader:
        (out / "recipe.json").write_text(describe(recipe))
    total = sum(s.steps * s.batch_tokens for s in recipe.stages)
    log = Log(out / "metrics.jsonl", trainer.tokens_seen) if leader else None
    with tqdm(total=total, initial=trainer.tokens_seen, unit="tok", unit_scale=True, disable=not leader) as bar:
        while not trainer.finished:
            window = trainer.stage.window
            metrics = trainer.step()
            if log is None:
                continue
            share = metrics["tokens_per_s"] * training_flops_per_token(recipe, window) / peak
            log.write(metrics | {"peak_share": share})
            bar.update(metrics["tokens"] - bar.n)
            bar.set_postfix_str(f"{metrics['stage']} loss {metrics['loss']:.3f} mtp {metrics['mtp_loss']:.3f}")
    if leader:
        plot(out)


class Log:
    """metrics.jsonl: one JSON object per step.

    On resuming, lines past the checkpoint are dropped, so that no step stands twice, and so is a line that a kill cut.
    """

    def __init__(self, path: Path, tokens_seen: int) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["tokens"] <= tokens_seen]
        self._file = path.open("w")
        for line in kept:
            print(line, file=self._file)
        self._began = time.time()

    def write(self, metrics: Metrics) -> None:
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}
        print(json.dumps({**rounded, "t_s": round(time.time() - self._began, 1)}), file=self._file, flush=True)


def training_flops_per_token(recipe: Recipe, window: int) -> float:
    """Multiply-adds of forward and backward, times two: 6 per active matrix weight plus dense causal attention.

    The MTP layer and the second use of the output head count; embedding look-ups, norms and the router do not.
    """
    c = recipe.config
    D, H, F = c.hidden_size, c.num_attention_heads, c.moe_intermediate_size
    attention = D * c.q_lora_rank + c.q_lora_rank * H * c.qk_head_dim + D * c.row_width
    attention += c.kv_lora_rank * H * (c.qk_nope_head_dim + c.v_head_dim) + H * c.v_head_dim * D
    core = H * (c.qk_head_dim + c.v_head_dim) * window / 2
    sparse = 3 * D * F * (c.num_experts_per_tok + c.n_shared_experts)
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    num_sparse = sum(c.is_sparse(i) for i in range(layers))
    heads = (1 + c.num_nextn_predict_layers) * c.vocab_size * D + c.num_nextn_predict_layers * 2 * D * D
    weights = layers * (attention + core) + num_sparse * sparse + (layers - num_sparse) * 3 * D * c.intermediate_size
    return 6.0 * (weights + heads)


def matmul_peak_flops(size: int = 1024, repeats: int = 8) -> float:
    """FLOP/s of this process's threads in ``product_dtype``: the best of a few square products."""
    a, b = torch.randn(size, size).to(product_dtype()), torch.randn(size, size).to(product_dtype())
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def plot(out: Path) -> None:
    """loss.png from metrics.jsonl; needs matplotlib (the ``train`` extra)."""
    try:
        import matplotlib
    except ImportError:
        logger.warning("no loss plot: matplotlib is not installed (pip install 'glm52[train]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows: list[dict[str, Any]] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(9, 5))
    for key in ("loss", "mtp_loss"):
        axes.plot([r["tokens"] / 1e6 for r in rows], [r[key] for r in rows], linewidth=0.6, label=key)
    for before, after in itertools.pairwise(rows):
        if before["stage"] != after["stage"]:
            axes.axvline(after["tokens"] / 1e6, color="grey", linewidth=0.6)
            axes.text(after["tokens"] / 1e6, axes.get_ylim()[1], after["stage"], fontsize=7, va="top", rotation=90)
    axes.set(xlabel="tokens (millions)", ylabel="nats per token", yscale="log")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120)
