"""GLM-5.2 for inference on CPUs: the forward of ``model.GLM`` as one native call over packed weights.

The same contract as ``GLM`` (forward, logits, draft) for whoever generates; nothing here can be trained. Weights are
f32, bf16, int8, int4 or fp8. The residual stream, norms, router and softmax are fp32; what a product multiplies is
rounded to bf16 unless its weights are f32. The bits of a token depend on its sequence alone: not on the batch, the
chunk, the drafts or the number of threads.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from glm52 import ops
from glm52.cache import Spans
from glm52.config import GLMConfig
from glm52.model import GLM, INDEX_NORM_EPS, MLP, DecoderLayer, MoE, RMSNorm
from glm52.quant import WeightFormat, quantize

_PANEL = 16  # rows of a panel; see csrc/matrix.h
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
    """A model packed from ``GLM``'s weights. consume: empty each layer of the source once it is packed, so that the
    weights are never held twice; the source is then of no use.

    fmt: the format of the large matrices. Embedding, router, index weights and norms stay as they are; the output head
    and kv_b_proj, whose rows are split by head, are int8 where fmt is int4 and bf16 where it is fp8.
    """

    def __init__(self, model: GLM, fmt: WeightFormat, threads: int | None = None, *, consume: bool = False) -> None:
        self.config, self.format, self.cache_format = model.config, fmt, model.cache_format
        self._extension = ops.kernels()
        self._stack = self._extension.Stack(_dims(model.config), threads or torch.get_num_threads())
        self.dtype = torch.float32 if fmt == "f32" else torch.bfloat16
        self._soft = soft_format(fmt)
        with torch.no_grad():
            self._head = self._pack(model.lm_head.weight, self._soft)
            draft = self._draft_ends(model)
            self.mtp = bool(draft)
            for layer in model.model.layers:
                assert isinstance(layer, DecoderLayer)
                self._stack.add_layer(self._layer(layer))
                if consume:
                    for p in layer.parameters():
                        p.data = p.new_empty(0)
            embedding = model.model.embed_tokens.weight.detach().to(self.dtype).contiguous()
            self._stack.set_ends(embedding, model.model.norm.weight.detach().float(), draft)

    def _draft_ends(self, model: GLM) -> dict[str, Any]:
        """What stands around the drafting layer; empty without one."""
        if model.mtp is None:
            return {}
        norms = {"enorm": model.mtp.enorm, "hnorm": model.mtp.hnorm}
        norms["shared_head.norm"] = cast(RMSNorm, model.mtp.shared_head["norm"])
        out: dict[str, Any] = {name: norm.weight.detach().float() for name, norm in norms.items()}
        return out | {"eh_proj": self._pack(model.mtp.eh_proj.weight, self._soft)}

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

    def new_cache(self, num_rows: int) -> NativeCache:
        own = "f32" if self.format == "f32" else "bf16"
        return NativeCache(self.config, num_rows, own if self.cache_format == "auto" else self.cache_format)

    def __call__(self, tokens_T: Tensor, spans: Spans, cache: NativeCache) -> Tensor:
        """tokens_T int64 -> h_TD fp32, the hidden state after ``model.norm``; the tokens' rows are written."""
        h_TD = torch.empty(len(tokens_T), self.config.hidden_size)
        self._stack.forward(tokens_T, spans.where_3T, spans.tables_SP, spans.page_size, cache.handle, h_TD)
        return h_TD

    def logits(self, h_TD: Tensor) -> Tensor:
        """[T, W] in fp32."""
        y_TW = torch.empty(len(h_TD), self.config.vocab_size)
        self._stack.linear(self._head, h_TD, y_TW)
        return y_TW

    def draft(
        self, h_TD: Tensor, tokens_T: Tensor, spans: Spans, cache: NativeCache, selection: Any = None
    ) -> tuple[Tensor, Any]:
        """One step of the MTP layer; see ``GLM.draft``. A selection is indexed by token like the tensor there."""
        z_TD, first = torch.empty_like(h_TD), selection is None
        selection = self._extension.Selection() if first else selection
        self._stack.draft(
            h_TD, tokens_T, spans.where_3T, spans.tables_SP, spans.page_size, cache.handle, selection, first, z_TD
        )
        return z_TD, selection

    def propose(self, z_SD: Tensor, positions_S: Tensor, cache: NativeCache, selection: Any, count: int) -> Tensor:
        """Greedy drafts [S, count] in one call; see ``GLM.propose``."""
        tokens_SK = torch.empty(len(positions_S), count, dtype=torch.int64)
        self._stack.propose(self._head, positions_S, cache.handle, selection, z_SD.clone(), tokens_SK)
        return tokens_SK

    # ── packing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _pack(self, w_ND: Tensor, fmt: WeightFormat | None = None) -> Any:
        return pack(self._extension, [w_ND], fmt or self.format)

    def _layer(self, layer: DecoderLayer) -> dict[str, Any]:
        attention, config = layer.self_attn, self.config
        kv_b = attention.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
        nope = config.qk_nope_head_dim
        index = attention.indexer
        from_hidden = [attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight]
        from_query = [attention.q_b_proj.weight]
        if index is not None:
            from_hidden.append(index.wk.weight)
            from_query.append(index.wq_b.weight)
        out = {
            "input_norm": layer.input_layernorm.weight.detach().float(),
            "post_norm": layer.post_attention_layernorm.weight.detach().float(),
            "q_norm": attention.q_a_layernorm.weight.detach().float(),
            "kv_norm": attention.kv_a_layernorm.weight.detach().float(),
            "a": pack(self._extension, from_hidden, self.format),
            "q": pack(self._extension, from_query, self.format),
            "key": [self._pack(h[:nope].t(), self._soft) for h in kv_b],
            "value": [self._pack(h[nope:], self._soft) for h in kv_b],
            "o": self._pack(attention.o_proj.weight),
        }
        if index is not None:
            out["index_weights"] = self._pack(index.weights_proj.weight, "f32")
            out["index_norm"] = index.k_norm.weight.detach().float()
            out["index_bias"] = index.k_norm.bias.detach().float()
        if isinstance(layer.mlp, MoE):
            experts = layer.mlp.experts
            out["router"] = self._pack(layer.mlp.gate.weight, "f32")
            out["router_bias"] = layer.mlp.gate.e_score_correction_bias.detach().float()
            out["experts"] = [
                (self._gate_up(*gate_up.chunk(2)), self._pack(down))
                for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True)
            ]
        mlp = layer.mlp.shared_experts if isinstance(layer.mlp, MoE) else layer.mlp
        assert isinstance(mlp, MLP)
        if mlp.down_proj.weight.shape[1]:
            out["dense"] = (
                self._gate_up(mlp.gate_proj.weight, mlp.up_proj.weight), self._pack(mlp.down_proj.weight)
            )  # fmt: skip
        return out

    def _gate_up(self, gate_FD: Tensor, up_FD: Tensor) -> Any:
        return pack(self._extension, [gate_FD, up_FD], self.format, alternate=True)


def soft_format(fmt: WeightFormat) -> WeightFormat:
    """What the output head and kv_b_proj are kept in, where all other matrices are in ``fmt``."""
    return {"int4": "int8", "fp8": "bf16"}.get(fmt, fmt)  # type: ignore[return-value]


def pack(kernels: ModuleType, parts: Sequence[Tensor], fmt: WeightFormat, *, alternate: bool = False) -> Any:
    """Matrices one below the other, quantised each by itself, as one packed matrix.

    alternate: two of equal shape, panel by panel in turn, each filled up with zero rows to whole panels.
    """
    parts = [p.detach() for p in parts]
    if fmt in ("f32", "bf16"):
        dtype = torch.float32 if fmt == "f32" else torch.bfloat16
        data = _join([p.to(dtype) for p in parts], alternate)
        return kernels.pack(fmt, data, threads=torch.get_num_threads())
    quantized = [quantize(p, fmt) for p in parts]
    data = _join([q.data.view(torch.uint8) if fmt == "fp8" else q.data for q in quantized], alternate)
    scale = _join([q.scale for q in quantized], alternate)
    return kernels.pack(fmt, data, scale, quantized[0].group, threads=torch.get_num_threads())


def _join(parts: list[Tensor], alternate: bool) -> Tensor:
    if not alternate:
        return torch.cat(parts).contiguous()
    rows = -(-len(parts[0]) // _PANEL) * _PANEL
    padded = [torch.cat((p, p.new_zeros(rows - len(p), p.shape[1]))).view(-1, _PANEL, p.shape[1]) for p in parts]
    return torch.stack(padded, dim=1).flatten(0, 2)


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
