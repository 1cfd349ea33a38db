"""Muon for matrices, AdamW for everything else.

Muon orthogonalises the momentum of each matrix with five Newton-Schulz steps. The MLA projections are split before
that, per head and per role, as GLM-5 does (Muon Split), gate and up rows are two matrices, and every expert is its own.
Source: Jordan et al., Muon (2024); GLM-5 technical report (arXiv 2602.15763), section on Muon Split.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glm52.config import GLMConfig

_ADAM_PARTS = ("embed_tokens", "lm_head", "mlp.gate.weight", "indexer.")


def uses_muon(name: str, p: Tensor) -> bool:
    """Matrices of the body; embedding, head, router, indexer and norms stay with AdamW."""
    return p.dim() >= 2 and not any(part in name for part in _ADAM_PARTS)


def split_matrices(name: str, x: Tensor, config: GLMConfig) -> list[Tensor]:
    """Views of a parameter as batches of the matrices [n, rows, columns] that Muon orthogonalises one by one."""
    H, A = config.num_attention_heads, config.qk_nope_head_dim
    if name.endswith("q_b_proj.weight"):
        return [x.view(H, -1, x.shape[-1])]
    if name.endswith("kv_b_proj.weight"):
        per_head = x.view(H, -1, x.shape[-1])
        return [per_head[:, :A], per_head[:, A:]]
    if name.endswith("kv_a_proj_with_mqa.weight"):
        return [x[None, : config.kv_lora_rank], x[None, config.kv_lora_rank :]]
    if name.endswith("experts.gate_up_proj"):
        half = x.shape[1] // 2
        return [x[:, :half], x[:, half:]]
    return [x] if x.dim() == 3 else [x[None]]


@cache
def product_dtype() -> torch.dtype:
    """What matrices are multiplied in: bfloat16 where this CPU has instructions for it, else float32. Without them
    torch multiplies bfloat16 some hundred times slower."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def orthogonalize(m_nAB: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of each matrix of a batch (rows <= columns), by products in ``product_dtype``. Singular values
    end in about [0.7, 1.2].

    Quintic Newton-Schulz iteration; coefficients from Jordan et al. (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m_nAB.to(product_dtype())
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov, orthogonalised update scaled by sqrt(max(1, rows / columns)), decoupled weight decay.

    With several processes each orthogonalises its share of every batch of equally shaped matrices and all gather the
    rest, so the work is not repeated.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        config: GLMConfig,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        self.named = list(named)
        self.config = config
        super().__init__([p for _, p in self.named], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for name, p in self.named:
            if p.grad is None:
                continue
            buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(buffer, group["momentum"])
            p.mul_(1 - group["lr"] * group["weight_decay"])
            pairs = zip(split_matrices(name, update, self.config), split_matrices(name, p, self.config), strict=True)
            for u, target in pairs:
                flip = u.shape[1] > u.shape[2]
                u, target = (u.mT, target.mT) if flip else (u, target)
                by_shape[tuple(u.shape[1:])].append((u, target))  # type: ignore[index]
        for pairs_of_shape in by_shape.values():
            o = _orthogonalize_shared(torch.cat([u.to(product_dtype()) for u, _ in pairs_of_shape]))
            for (_, target), part in zip(pairs_of_shape, o.split([len(u) for u, _ in pairs_of_shape]), strict=True):
                tall = target.stride(-1) != 1  # a transposed view: the parameter has more rows than columns
                scale = (target.shape[2] / target.shape[1]) ** 0.5 if tall else 1.0
                target.add_(part.to(target.dtype), alpha=-group["lr"] * scale)


def _orthogonalize_shared(m_nAB: Tensor) -> Tensor:
    """``orthogonalize``, with the batch divided among the processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return orthogonalize(m_nAB)
    world, rank = dist.get_world_size(), dist.get_rank()
    share = -(-len(m_nAB) // world)
    mine = m_nAB.new_zeros(share, *m_nAB.shape[1:])
    part = m_nAB[rank * share : (rank + 1) * share]
    if len(part):
        mine[: len(part)] = orthogonalize(part)
    everyone = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(everyone, mine)
    return torch.cat(everyone)[: len(m_nAB)]
