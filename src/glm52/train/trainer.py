"""The training loop: stages of one recipe, each a mixture, a window, a schedule and what is trained.

A run is a pure function of its recipe, its shards and the number of processes: batches follow from the step number, and
the checkpoint holds weights, optimizer state and the place in the recipe, so that a killed run resumes bit for bit.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from glm52 import ops
from glm52.cache import CacheFormat
from glm52.checkpoint import write_checkpoint
from glm52.config import GLMConfig
from glm52.errors import ConfigError
from glm52.load import load
from glm52.model import GLM, Router
from glm52.shards import Shards
from glm52.train import parallel
from glm52.train.data import Batch, Piece, materialize, windows
from glm52.train.init import init_weights
from glm52.train.optim import Muon, product_dtype, uses_muon

logger = logging.getLogger(__name__)

Metrics = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of a run.

    tokens: how many to see. mixture: bucket -> share. window, batch_tokens, micro_tokens: length of a window, tokens of
    an optimizer step over all processes, and tokens of one forward. index_topk: rows a query selects in this stage (at
    least ``window`` means dense). distill_every: steps between indexer-distillation losses (0 = never).
    prompt_weight: loss weight of chat tokens that the assistant does not produce. stretch: length up to which documents
    of a dense stage may be pulled apart by skipping positions (0 = none). draft_depth: steps of the MTP layer that are
    trained, each on what the one before put out. cache_format: fp8 rounds rows as such a cache does. start: exports of
    earlier stages and their shares; this one begins with their weighted mean and new optimizer states (default: where
    the one before ended).
    """

    name: str
    tokens: int
    mixture: Mapping[str, float]
    window: int = 512
    batch_tokens: int = 8192
    micro_tokens: int = 4096
    trainable: Literal["all", "indexer", "mtp"] = "all"
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    warmup_steps: int = 100
    decay_fraction: float = 0.0
    final_lr: float = 0.0
    prompt_weight: float = 0.3
    stretch: int = 0
    mtp_weight: float = 0.3
    draft_depth: int = 1
    index_topk: int = 1 << 30
    distill_every: int = 0
    router_bias_lr: float = 1e-3
    cache_format: CacheFormat = "auto"
    start: Mapping[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.batch_tokens)

    def lr_factor(self, step: int) -> float:
        """Warm-up, constant, then linear to ``final_lr`` over the last ``decay_fraction`` of the steps."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = (self.steps - step) / max(1.0, self.decay_fraction * self.steps)
        return warm * (self.final_lr + (1 - self.final_lr) * min(1.0, left))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete run, from random weights."""

    name: str
    config: GLMConfig
    stages: tuple[Stage, ...]
    seed: int = 0
    clip_norm: float = 1.0
    save_every_s: float = 600.0


class Trainer:
    """Runs a recipe on this process's share of every batch. ``step()`` until ``finished``."""

    def __init__(self, recipe: Recipe, shards: Shards, out: Path, *, compiled: bool = True) -> None:
        self.recipe, self.shards, self.out = recipe, shards, out
        self.model = GLM(recipe.config)
        init_weights(self.model, torch.Generator().manual_seed(recipe.seed))
        self.model.train()
        named = list(self.model.named_parameters())
        self.muon = Muon([(n, p) for n, p in named if uses_muon(n, p)], recipe.config, lr=0.0)
        rest = [p for n, p in named if not uses_muon(n, p)]
        self.adam = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
        self.stage_index = self.step_in_stage = self.tokens_seen = 0
        self._last_save = time.monotonic()
        self.softmax = ops.softmax_gradient
        if compiled:
            # A graph for each kind of layer, window and loss: more than dynamo's default allows.
            torch._dynamo.config.recompile_limit = 64
            self.softmax = torch.compile(ops.softmax_gradient, dynamic=False)
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
        if (out / "checkpoint.pt").exists():
            self._resume()
        self._enter_stage()

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.stage_index]

    @property
    def finished(self) -> bool:
        return self.stage_index == len(self.recipe.stages)

    def step(self) -> Metrics:
        """One optimizer step: gradients of the whole batch, clip, update, balance the router, advance."""
        began = time.perf_counter()
        stage, batch_windows = self.stage, self._next_windows()
        distill = stage.distill_every > 0 and self.step_in_stage % stage.distill_every == 0
        sums = self._accumulate(batch_windows, distill)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        parallel.sum_over_processes(grads)
        norm = torch.nn.utils.get_total_norm(grads)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm.item()} in stage {stage.name}, step {self.step_in_stage}")
        torch.nn.utils.clip_grads_with_norm_(self._trained(), self.recipe.clip_norm, norm)
        factor = stage.lr_factor(self.step_in_stage)
        self.muon.param_groups[0]["lr"] = stage.muon_lr * factor
        self.adam.param_groups[0]["lr"] = stage.adam_lr * factor
        self.muon.step()
        self.adam.step()
        self._balance_router(stage.router_bias_lr)
        self.model.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        self.tokens_seen += stage.batch_tokens
        metrics = {
            "stage": stage.name,
            "step": self.step_in_stage,
            "tokens": self.tokens_seen,
            **sums,
            "grad_norm": norm.item(),
            "lr_factor": factor,
            "tokens_per_s": stage.batch_tokens / seconds,
        }
        self._advance()
        return metrics

    def _accumulate(self, batch_windows: list[list[Piece]], distill: bool) -> Metrics:
        """Backward over this process's windows; losses are sums over the batch divided by its weighted tokens."""
        stage = self.stage
        mine = batch_windows[parallel.rank() :: parallel.world_size()]
        per_micro = max(1, stage.micro_tokens // stage.window)
        micro = [
            materialize(
                self.shards,
                mine[i : i + per_micro],
                stage.window,
                self.recipe.config.pad_token_id,
                stage.prompt_weight,
                1 + stage.draft_depth,
                stage.stretch,
            )
            for i in range(0, len(mine), per_micro)
        ]
        weights = torch.stack([torch.stack((b.weight_AT[0].sum(), b.weight_AT[1:].sum())) for b in micro]).sum(0)
        parallel.sum_over_processes([weights])
        totals = torch.zeros(3)
        for batch in micro:
            share = batch.spans.num_tokens / stage.batch_tokens
            main, draft, index = self._losses(batch, distill)
            terms = torch.stack((main / weights[0].clamp(min=1), draft / weights[1].clamp(min=1), index * share))
            if stage.trainable == "all":
                loss = terms[0] + stage.mtp_weight * terms[1] + terms[2]
            else:
                loss = terms[1] if stage.trainable == "mtp" else terms[2]
            loss.backward()
            totals += terms.detach()
        parallel.sum_over_processes([totals])
        metrics = {"loss": totals[0].item(), "mtp_loss": totals[1].item()}
        return metrics | ({"index_loss": totals[2].item()} if distill else {})

    def _losses(self, batch: Batch, distill: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Summed next-token loss, summed MTP loss, mean indexer loss of a micro-batch."""
        model, head, zero = self.model, self.model.lm_head.weight, torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16, enabled=product_dtype() == torch.bfloat16):
            h, index = (
                model.forward_distill(batch.tokens_T, batch.spans)
                if distill
                else (model(batch.tokens_T, batch.spans), zero)
            )
            main, _ = ops.token_loss(h, head, batch.targets_AT[0], batch.weight_AT[0], softmax=self.softmax)
            if model.mtp is None or (not self.stage.mtp_weight and not distill):
                return main, zero, index
            steps, mtp_index = model.draft_steps(h, batch.targets_AT[:-1], batch.spans, distill)
            draft = zero
            for z, targets, weight in zip(steps, batch.targets_AT[1:], batch.weight_AT[1:], strict=True):
                draft = draft + ops.token_loss(z, head, targets, weight, softmax=self.softmax)[0]
        return main, draft, index + (zero if mtp_index is None else mtp_index)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.grad is not None]

    @torch.no_grad()
    def _balance_router(self, lr: float) -> None:
        """Raise the bias of experts below the mean load, lower it above, where the stage trains the layer. Source:
        DeepSeek-V3 report, 2.1.2."""
        routers = [m for m in self.model.modules() if isinstance(m, Router)]
        parallel.sum_over_processes([r.load_E for r in routers])
        for router in routers:
            if router.weight.requires_grad:
                router.e_score_correction_bias += lr * (router.load_E.mean() - router.load_E).sign()
            router.load_E.zero_()

    def _enter_stage(self) -> None:
        """Set what the stage trains and where its windows start."""
        if self.finished:
            return
        stage = self.stage
        if stage.batch_tokens % (stage.window * parallel.world_size()):
            raise ConfigError(
                f"stage {stage.name}: batch_tokens {stage.batch_tokens} is not a multiple of window {stage.window} "
                f"x {parallel.world_size()} processes"
            )
        if stage.trainable == "indexer" and stage.distill_every != 1:
            raise ConfigError(f"stage {stage.name}: indexers alone learn from distillation, so distill_every must be 1")
        if stage.trainable == "mtp" and (self.model.mtp is None or not stage.mtp_weight > 0):
            raise ConfigError(f"stage {stage.name}: the MTP layer alone needs one, and mtp_weight above 0")
        if stage.start and not self.step_in_stage:
            self._start_from(stage.start)
        self.model.index_topk, self.model.cache_format = stage.index_topk, stage.cache_format
        of_mtp = f"model.layers.{self.recipe.config.num_hidden_layers}."
        for name, p in self.model.named_parameters():
            is_trained = {"all": True, "indexer": "indexer." in name, "mtp": name.startswith(of_mtp)}
            p.requires_grad_(is_trained[stage.trainable])
        stream = windows(self.shards, stage.mixture, stage.window, self.recipe.seed + 1000 * self.stage_index)
        per_step = stage.batch_tokens // stage.window
        self._windows: Iterator[list[Piece]] = itertools.islice(stream, self.step_in_stage * per_step, None)

    @torch.no_grad()
    def _start_from(self, shares: Mapping[str, float]) -> None:
        """The mean of what earlier stages exported. Source: Wortsman et al., model soups (arXiv 2203.05482)."""
        parallel.sum_over_processes([torch.zeros(1)])  # the first process has written the last of them
        exports = {name: load(self.out / name, dtype=torch.float32).state_dict() for name in shares}
        for key, value in self.model.state_dict().items():
            value.copy_(sum(share * exports[name][key] for name, share in shares.items()) / sum(shares.values()))
        self.muon.state.clear()
        self.adam.state.clear()

    def _next_windows(self) -> list[list[Piece]]:
        return list(itertools.islice(self._windows, self.stage.batch_tokens // self.stage.window))

    def _advance(self) -> None:
        self.step_in_stage += 1
        ended = self.step_in_stage == self.stage.steps
        if ended:
            if parallel.rank() == 0:
                self.export(self.out / self.stage.name)
            self.stage_index, self.step_in_stage = self.stage_index + 1, 0
            self._enter_stage()
        if ended or time.monotonic() - self._last_save > self.recipe.save_every_s:
            self.save()

    def export(self, folder: Path) -> None:
        """Write the weights as an official checkpoint in bfloat16."""
        state = self.model.state_dict()
        write_checkpoint(folder, self.recipe.config, ((n, _exported(n, t)) for n, t in state.items()))

    def save(self) -> None:
        """Write the resumable checkpoint, whole or not at all."""
        self._last_save = time.monotonic()
        if parallel.rank() != 0:
            return
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "stage": self.stage_index,
            "step": self.step_in_stage,
            "tokens": self.tokens_seen,
        }
        temporary = self.out / "checkpoint.tmp"
        torch.save(state, temporary)
        temporary.replace(self.out / "checkpoint.pt")

    def _resume(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.stage_index, self.step_in_stage, self.tokens_seen = state["stage"], state["step"], state["tokens"]
        logger.info("resumed at stage %d, step %d", self.stage_index, self.step_in_stage)


def _exported(name: str, tensor: Tensor) -> Tensor:
    return tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)


def describe(recipe: Recipe) -> str:
    """The resolved recipe as JSON, written beside every checkpoint."""
    return json.dumps({**asdict(recipe), "config": recipe.config.to_dict()}, indent=2, default=str)
