"""GLM-5.2 for inference on CPUs: the forward of ``model.GLM`` as one native call over packed weights.

The same contract as ``GLM`` (forward, logits, drafts) for whoever generates; nothing here can be trained. Weights are
f32, bf16, int8, int4 or fp8. The residual stream, norms, router and softmax are fp32; what a product multiplies is
rounded to bf16 unless its weights are f32. The bits of a token depend on its sequence alone: not on the batch, the
chunk, the drafts or the number of threads.
"""

from typing import Any

import torch
from torch import Tensor

from glm52 import ops
from glm52.cache import CacheFormat, Spans
from glm52.config import GLMConfig
from glm52.model import INDEX_NORM_EPS
from glm52.packing import Packer, Weights
from glm52.quant import WeightFormat

_KEY_BLOCK = 64  # rows that index keys are kept for at a time; see csrc/stack.cpp


class NativeCache:
    """Rows and index keys of every layer, inside the extension: f32, bf16 or fp8."""

    def __init__(self, config: GLMConfig, num_rows: int, fmt: str) -> None:
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        has_index = [i in config.index_layers for i in range(layers)]
        self.handle = ops.kernels().Cache(_dims(config), has_index, num_rows, fmt)
        self.num_rows = num_rows
        self._has_index = has_index

    @property
    def num_bytes(self) -> int:
        return int(self.handle.num_bytes)

    def pools(self) -> list[Tensor]:
        """Every layer's rows, then every indexer's keys, as bytes [N, width], in place. Keys lie in panels of rows, so
        only whole panels mean something there; their number is rounded up to whole blocks."""
        padded = -(-self.num_rows // _KEY_BLOCK) * _KEY_BLOCK
        rows = [self.handle.rows(layer).view(self.num_rows, -1) for layer in range(len(self._has_index))]
        keys = [self.handle.keys(layer).view(padded, -1) for layer, has in enumerate(self._has_index) if has]
        return [*rows, *(pool[: self.num_rows] for pool in keys)]


class NativeGLM:
    """A model packed from its weights, which are read one by one and never held twice, but the head: see ``propose``.

    fmt: the format of the large matrices, see ``Packer``; None: as they are stored. The embedding stays as it is.
    cache: what ``new_cache`` makes.
    """

    def __init__(
        self, source: Weights, fmt: WeightFormat | None, threads: int | None = None, *, cache: CacheFormat = "auto"
    ) -> None:
        self.config, self.format, self.cache_format = source.config, fmt, cache
        self._extension = ops.kernels()
        self._stack = self._extension.Stack(_dims(self.config), threads or torch.get_num_threads())
        packer = Packer(source, fmt, self._extension)
        self.mtp = self.config.num_nextn_predict_layers > 0
        self._head, self._draft_head = packer.heads(drafts=self.mtp)
        for number in range(self.config.num_hidden_layers + self.config.num_nextn_predict_layers):
            self._stack.add_layer(packer.layer(number))
        self.dtype = torch.float32 if fmt == "f32" else torch.bfloat16
        embedding = packer.floats("model.embed_tokens").to(self.dtype)
        self._stack.set_ends(embedding, packer.floats("model.norm"), self._draft_ends(packer) if self.mtp else {})

    def _draft_ends(self, packer: Packer) -> dict[str, Any]:
        """What stands around the drafting layer."""
        at = f"model.layers.{self.config.num_hidden_layers}"
        norms = {name: packer.floats(f"{at}.{name}") for name in ("enorm", "hnorm", "shared_head.norm")}
        return norms | {"eh_proj": packer.soft(f"{at}.eh_proj")}

    @property
    def index_topk(self) -> int:
        return int(self._stack.top_k)

    @index_topk.setter
    def index_topk(self, rows: int) -> None:
        self._stack.top_k = rows

    @property
    def threads(self) -> int:
        return int(self._stack.threads)

    @threads.setter
    def threads(self, count: int) -> None:
        self._stack.threads = count

    @property
    def select_s(self) -> float:
        """Seconds that the indexers' search took so far."""
        return float(self._stack.select_s)

    @property
    def expert_use(self) -> dict[int, tuple[int, int]]:
        """Of each sparse layer so far: products of a token with a routed expert, and how often one's weights were read
        for them. May be asked while a step runs."""
        use = self._stack.expert_use
        return {layer: use[layer] for layer in range(len(use)) if self.config.is_sparse(layer)}

    def new_cache(self, num_rows: int) -> NativeCache:
        own = "f32" if self.format == "f32" else "bf16"
        return NativeCache(self.config, num_rows, own if self.cache_format == "auto" else self.cache_format)

    def __call__(self, tokens_T: Tensor, spans: Spans, cache: NativeCache) -> Tensor:
        """tokens_T int64 -> h_TD fp32, the hidden state after ``model.norm``; the tokens' rows are written."""
        h_TD = torch.empty(len(tokens_T), self.config.hidden_size)
        self._stack.forward(tokens_T.numpy(), *_where(spans), cache.handle, h_TD.numpy())
        return h_TD

    def logits(self, h_TD: Tensor) -> Tensor:
        """[T, W] in fp32."""
        y_TW = torch.empty(len(h_TD), self.config.vocab_size)
        self._stack.linear(self._head, h_TD.numpy(), y_TW.numpy())
        return y_TW

    def extend(
        self, h_TD: Tensor, tokens_T: Tensor, spans: Spans, cache: NativeCache, last_S: Tensor
    ) -> tuple[Tensor, Any]:
        """See ``GLM.extend``; beyond their rows, only the tokens last_S are computed. The selection is opaque."""
        z_SD, selection = torch.empty(len(last_S), self.config.hidden_size), self._extension.Selection()
        self._stack.extend(
            h_TD.numpy(), tokens_T.numpy(), *_where(spans), cache.handle, last_S.numpy(), selection, z_SD.numpy()
        )
        return z_SD, selection

    def draft(self, z_SD: Tensor, tokens_S: Tensor, positions_S: Tensor, cache: NativeCache, selection: Any) -> Tensor:
        """See ``GLM.draft``."""
        out_SD = torch.empty_like(z_SD)
        self._stack.draft(z_SD.numpy(), tokens_S.numpy(), positions_S.numpy(), cache.handle, selection, out_SD.numpy())
        return out_SD

    def propose(
        self, h_TD: Tensor, tokens_T: Tensor, spans: Spans, cache: NativeCache, last_S: Tensor, count: int
    ) -> Tensor:
        """``extend`` and all greedy drafts [S, count] in one call; see ``GLM.propose``. Their head is int8: drafts are
        verified, and reading a head for each is much of what they cost."""
        drafts_SK = torch.empty(len(last_S), count, dtype=torch.int64)
        self._stack.propose(
            self._draft_head, h_TD.numpy(), tokens_T.numpy(), *_where(spans), cache.handle, last_S.numpy(),
            drafts_SK.numpy(),
        )  # fmt: skip
        return drafts_SK


def rounded_bytes(fmt: WeightFormat | None) -> int:
    """Of a value as products with weights of a format take it. Only AVX-512 multiplies bfloat16 as it is."""
    multiplies_pairs = ops.backend() in ("native (avx512)", "native (amx)")
    return 2 if fmt in ("int8", "int4") or (fmt != "f32" and multiplies_pairs) else 4


def _where(spans: Spans) -> tuple[Any, Any, int]:
    """As numpy, which the extension takes in a tenth of the time it takes a torch tensor in."""
    return spans.where_3T.numpy(), spans.tables_SP.numpy(), spans.page_size


def _dims(config: GLMConfig) -> dict[str, Any]:
    return {
        "hidden": config.hidden_size, "heads": config.num_attention_heads, "query_rank": config.q_lora_rank,
        "latent": config.kv_lora_rank, "nope": config.qk_nope_head_dim, "rotary": config.qk_rope_head_dim,
        "value": config.v_head_dim, "index_heads": config.index_n_heads, "index_dim": config.index_head_dim,
        "top_k": config.index_topk, "experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok, "eps": config.rms_norm_eps,
        "latent_eps": config.latent_norm_eps, "index_eps": INDEX_NORM_EPS,
        "route_scale": config.routed_scaling_factor, "normalize_weights": config.norm_topk_prob,
        "theta": config.rope_theta,
    }  # fmt: skip
