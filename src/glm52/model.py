"""GLM-5.2, once: the same forward serves prefill, decode, drafting, evaluation and training.

Parameter names are the checkpoint's names; the one exception is the routed experts, stacked as ``[E, ...]``. The model
knows tokens, rows and operators. It refuses to know files, plans, requests, pages and devices.

    x ─ input_layernorm ─ MLA(+ indexer) ─ + ─ post_attention_layernorm ─ MLP | MoE ─ +      (78 times)
                          │   ▲
                          └───┴── Selection: a full layer makes it, the shared layers above reuse it (IndexShare)
"""

import re
from operator import attrgetter
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from glm52 import ops
from glm52.cache import CacheFormat, LatentCache, Pool, Spans, as_cached_fp8, cache_dtype
from glm52.config import GLMConfig

# Fixed by the published model code, not by config.json.
INDEX_NORM_EPS = 1e-6


class Selection(NamedTuple):
    """Which rows each token attends to, made by a full layer and threaded through the shared layers above it.

    ids_TG: int32 rows, -1 padded; None = every visible row. scores_BTT and loss exist only while the indexer is being
    distilled: its scores within each window, and the sum of the losses of the layers so far.
    """

    ids_TG: Tensor | None = None
    scores_BTT: Tensor | None = None
    loss: Tensor | None = None


class Context(NamedTuple):
    """What every layer of one forward shares.

    dense: no cache, and no token sees more rows than the indexer would select, so nothing is selected. distill: the
    indexers' loss is wanted. write: this forward owns the rows of its tokens (False for later draft steps); without a
    cache such a step attends to ``rows``, those of the first. is_rounded: without a cache, rows are what an FP8 one
    would give back.
    """

    spans: Spans
    rope: Tensor
    cache: LatentCache | None
    top_k: int
    dense: bool
    distill: bool = False
    write: bool = True
    rows: Tensor | None = None
    is_rounded: bool = False


class Linear(nn.Module):
    """A weight [N, D] without bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.linear(x_TD, self.weight)


class Embedding(nn.Module):
    """A table [W, D], left uninitialised: filling one on the meta device costs torch a second of imports."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))

    def forward(self, ids_T: Tensor) -> Tensor:
        return nn.functional.embedding(ids_T, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.norm(x_TD, self.weight, self.eps)


class LayerNorm(nn.Module):
    """The indexer's key norm: the only norm with a mean and a bias."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.layer_norm(x_TD, self.weight, self.bias, self.eps)


class Indexer(nn.Module):
    """Lightning indexer of DeepSeek Sparse Attention: scores every visible token with a few small heads.

    Source: DeepSeek-V3.2 report, 2.1; GLM rotates the first R dimensions in interleaved pairs.
    """

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.heads, self.rope_dim = config.index_n_heads, config.qk_rope_head_dim
        self.wq_b = Linear(config.q_lora_rank, config.index_n_heads * config.index_head_dim)
        self.wk = Linear(config.hidden_size, config.index_head_dim)
        self.k_norm = LayerNorm(config.index_head_dim, INDEX_NORM_EPS)
        self.weights_proj = Linear(config.hidden_size, config.index_n_heads)

    def forward(self, h_TD: Tensor, q_TQ: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h_TD: normed hidden; q_TQ: *normalised* query latent -> q_TXI, w_TX (fp32, signed), k_TI."""
        q_TXI = self._rotate(self.wq_b(q_TQ).unflatten(-1, (self.heads, -1)), rope)
        k_TI = self._rotate(self.k_norm(self.wk(h_TD)), rope)
        with torch.autocast("cpu", enabled=False):
            w_TX = ops.linear(ops.wide(h_TD), ops.wide(self.weights_proj.weight)) * self.heads**-0.5
        return q_TXI, w_TX, k_TI

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        return torch.cat((ops.rope(x[..., : self.rope_dim], rope), x[..., self.rope_dim :]), dim=-1)


class Attention(nn.Module):
    """Multi-head latent attention over selected rows. Layers that share indices own no indexer."""

    def __init__(self, config: GLMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.latent_dim = config.num_attention_heads, config.kv_lora_rank
        self.nope_dim, self.rope_dim, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scale = config.qk_head_dim**-0.5
        self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.latent_norm_eps)
        self.q_b_proj = Linear(config.q_lora_rank, self.heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, config.row_width)
        self.kv_a_layernorm = RMSNorm(self.latent_dim, config.latent_norm_eps)
        self.kv_b_proj = Linear(self.latent_dim, self.heads * (self.nope_dim + self.v_dim))
        self.o_proj = Linear(self.heads * self.v_dim, config.hidden_size)
        self.indexer = Indexer(config) if layer in config.index_layers else None

    def forward(self, h_TD: Tensor, selection: Selection, context: Context) -> tuple[Tensor, Selection]:
        q_TQ = self.q_a_layernorm(self.q_a_proj(h_TD))
        q_nope, q_rope = self.q_b_proj(q_TQ).unflatten(-1, (self.heads, -1)).split((self.nope_dim, self.rope_dim), -1)
        q_rope = ops.rope(q_rope, context.rope)
        rows = self.rows(h_TD, context) if context.rows is None else context.rows
        if context.cache is not None:
            pool = context.cache.rows(self.layer)
            if context.write:
                ops.write_rows(pool, context.spans.row_T, rows)
        if self.indexer is not None and context.write:
            selection = self._select(self.indexer, h_TD, q_TQ, selection, context)
        kv_b = self.kv_b_proj.weight.view(self.heads, -1, self.latent_dim)
        if context.cache is not None:
            assert selection.ids_TG is not None
            o = ops.mla_absorbed(q_nope, q_rope, pool, kv_b, selection.ids_TG, self.scale)
        else:
            o = ops.mla_expanded(q_nope, q_rope, rows, kv_b, selection.ids_TG, context.spans, self.scale)
            if selection.scores_BTT is not None:
                assert selection.loss is not None
                loss = ops.index_distillation(
                    selection.scores_BTT, q_nope, q_rope, rows, kv_b, selection.ids_TG, context.spans, self.scale
                )
                selection = selection._replace(loss=selection.loss + loss)
        return self.o_proj(o.flatten(1)), selection

    def rows(self, h_TD: Tensor, context: Context) -> Tensor:
        """What the cache holds of each token: the normalised latent and the rotated key, [T, Z]."""
        latent, k_rope = self.kv_a_proj_with_mqa(h_TD).split((self.latent_dim, self.rope_dim), -1)
        rows = torch.cat((self.kv_a_layernorm(latent), ops.rope(k_rope, context.rope)), dim=-1)
        return as_cached_fp8(rows, self.latent_dim) if context.is_rounded else rows

    def _select(
        self, indexer: Indexer, h_TD: Tensor, q_TQ: Tensor, selection: Selection, context: Context
    ) -> Selection:
        """A full layer's own selection. Index keys are written for every token, also where nothing is scored."""
        spans, cache = context.spans, context.cache
        if context.dense and not context.distill:
            return Selection()
        # The language-model loss never trains the indexer: its inputs are detached.
        q, w, k = indexer(h_TD.detach(), q_TQ.detach(), context.rope)
        keys: Pool = k
        if cache is not None:
            keys = cache.keys(self.layer)
            ops.write_rows(keys, spans.row_T, k)
        with torch.no_grad():
            ids = None if context.dense else ops.select_rows(q, w, keys, spans, context.top_k)
        if not context.distill:
            return Selection(ids)
        window = spans.window or spans.num_tokens
        scores = ops.index_scores(*(x.unflatten(0, (-1, window)) for x in (q, w, k)))
        return Selection(ids, scores, scores.new_zeros(()) if selection.loss is None else selection.loss)


class MLP(nn.Module):
    """A dense SwiGLU; also the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden = ops.swiglu(torch.cat((self.gate_proj(x_TD), self.up_proj(x_TD)), dim=-1))
        out: Tensor = self.down_proj(hidden)
        return out


class Router(nn.Module):
    """Sigmoid router, all fp32. ``load_E`` counts the tokens of each expert while training, for the bias update."""

    load_E: Tensor
    e_score_correction_bias: Tensor

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.k, self.scale, self.normalize = (
            config.num_experts_per_tok,
            config.routed_scaling_factor,
            config.norm_topk_prob,
        )
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("load_E", torch.zeros_like(bias), persistent=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            logits_TE = ops.linear(ops.wide(x_TD), ops.wide(self.weight))
            ids_TK, w_TK = ops.route(logits_TE, self.e_score_correction_bias, self.k, self.scale, self.normalize)
        if self.training:
            self.load_E += torch.nn.functional.one_hot(ids_TK, self.weight.shape[0]).sum((0, 1))
        return ids_TK, w_TK


class StackedExperts(nn.Module):
    """All routed experts of a layer as two tensors: gate_up_proj [E, 2F, D] (gate rows first), down_proj [E, D, F]."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        E, F, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))

    def forward(self, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor) -> Tensor:
        return ops.expert_ffn(x_TD, ids_TK, w_TK, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Routed experts plus the shared expert, which is neither weighted nor scaled."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = StackedExperts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x_TD: Tensor) -> Tensor:
        ids_TK, w_TK = self.gate(x_TD)
        out: Tensor = self.experts(x_TD, ids_TK, w_TK) + self.shared_experts(x_TD)
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: GLMConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_sparse(layer) else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x_TD: Tensor, selection: Selection, context: Context) -> tuple[Tensor, Selection]:
        a_TD, selection = self.self_attn(self.input_layernorm(x_TD), selection, context)
        x_TD = x_TD + a_TD
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD)), selection


class MTPLayer(DecoderLayer):
    """The multi-token-prediction layer: a full sparse layer behind a projection of [embedding, hidden].

    Source: DeepSeek-V3 report, 2.2; GLM feeds the hidden state after ``model.norm`` and recycles the one after
    ``shared_head.norm``.
    """

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config, config.num_hidden_layers)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def combine(self, embedding_TD: Tensor, h_TD: Tensor) -> Tensor:
        """The layer's input: embedding half first."""
        out: Tensor = self.eh_proj(torch.cat((self.enorm(embedding_TD), self.hnorm(h_TD)), dim=-1))
        return out


class Decoder(nn.Module):
    """The part of the checkpoint under the prefix ``model.``; the MTP layer, if any, is the last of ``layers``."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        if config.num_nextn_predict_layers:
            self.layers.append(MTPLayer(config))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class GLM(nn.Module):
    """The whole model. Weights are left uninitialised until they are loaded or ``train.init`` fills them.

    ``index_topk`` starts as the configuration's; training raises it to attend densely. ``cache_format``: what
    ``new_cache`` makes; without a cache, what rows are rounded to.
    """

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.config = config
        self.index_topk = config.index_topk
        self.cache_format: CacheFormat = "auto"
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def mtp(self) -> MTPLayer | None:
        last = self.model.layers[-1]
        return last if isinstance(last, MTPLayer) else None

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def weight(self, name: str) -> Tensor:
        """A weight by its name in the checkpoint, where experts are not stacked."""
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if expert is None:
            return cast(Tensor, attrgetter(name)(self)).detach()
        prefix, number, kind = expert.groups()
        stacked = f"{prefix}.down_proj" if kind == "down" else f"{prefix}.gate_up_proj"
        matrix = cast(Tensor, attrgetter(stacked)(self)).detach()[int(number)]
        return matrix if kind == "down" else matrix.chunk(2)[kind == "up"]

    def new_cache(self, num_rows: int) -> LatentCache:
        return LatentCache(self.config, num_rows, cache_dtype(self.cache_format, self.dtype))

    def forward(self, tokens_T: Tensor, spans: Spans, cache: LatentCache | None = None) -> Tensor:
        """tokens_T int64 -> h_TD, the hidden state after ``model.norm``. With a cache, the tokens' rows are written."""
        return self.run(tokens_T, self._context(spans, cache))[0]

    def forward_distill(self, tokens_T: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        """Forward without a cache -> h_TD and the indexers' distillation loss, summed over the main layers."""
        h_TD, selection = self.run(tokens_T, self._context(spans, None)._replace(distill=True))
        assert selection.loss is not None
        return h_TD, selection.loss

    def run(self, tokens_T: Tensor, context: Context) -> tuple[Tensor, Selection]:
        x_TD, selection = self.model.embed_tokens(tokens_T), Selection()
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            x_TD, selection = layer(x_TD, selection, context)
        return self.model.norm(x_TD), selection

    def logits(self, h_TD: Tensor) -> Tensor:
        """[T, W] in fp32 (fp64 for a float64 model)."""
        return ops.wide(self.lm_head(h_TD))

    def extend(
        self, h_TD: Tensor, tokens_T: Tensor, spans: Spans, cache: LatentCache, last_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The MTP layer over tokens of which the target's h_TD is known: at position i, that of i and token i + 1.

        Its rows are written. Returns of the tokens that last_S points at z_SD, after ``shared_head.norm``, whose logits
        ``self.logits(z_SD)`` predict token i + 2, and the selection ids_SG.
        """
        y_TD, selection = self._mtp_step(h_TD, tokens_T, self._context(spans, cache), Selection())
        assert selection.ids_TG is not None
        return y_TD[last_S], selection.ids_TG[last_S]

    def draft(
        self, z_SD: Tensor, tokens_S: Tensor, positions_S: Tensor, cache: LatentCache, selection_SG: Tensor
    ) -> Tensor:
        """The next z_SD after ``extend`` or ``draft``, from its z_SD and the tokens that these made likely.

        positions_S: one more than before. Nothing is written and only the rows of the selection, all of them
        target-derived, are attended. Source: facts of GLM-5.2's ``index_share_for_mtp_iteration``.
        """
        context = self._context(Spans.of_positions(positions_S), cache)._replace(write=False)
        return self._mtp_step(z_SD, tokens_S, context, Selection(selection_SG))[0]

    def propose(
        self, h_TD: Tensor, tokens_T: Tensor, spans: Spans, cache: LatentCache, last_S: Tensor, count: int
    ) -> Tensor:
        """``extend``, then greedy drafts [S, count] behind the tokens that last_S points at: the likeliest token of
        z_SD, then that of a step of ``draft`` with it, and so on."""
        z_SD, selection_SG = self.extend(h_TD, tokens_T, spans, cache, last_S)
        tokens = [self.logits(z_SD).argmax(-1)]
        for step in range(1, count):
            z_SD = self.draft(z_SD, tokens[-1], spans.positions_T[last_S] + step, cache, selection_SG)
            tokens.append(self.logits(z_SD).argmax(-1))
        return torch.stack(tokens, dim=1)

    def _mtp_step(
        self, h_TD: Tensor, tokens_T: Tensor, context: Context, selection: Selection
    ) -> tuple[Tensor, Selection]:
        mtp = self.mtp
        assert mtp is not None, "this model has no MTP layer"
        y_TD, selection = mtp(mtp.combine(self.model.embed_tokens(tokens_T), h_TD), selection, context)
        return mtp.shared_head["norm"](y_TD), selection

    def draft_steps(
        self, h_TD: Tensor, tokens_AT: Tensor, spans: Spans, distill: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Training's form of ``extend`` and ``draft``, every token at once and no cache: A steps from each position i.

        tokens_AT[a] is token i + 1 + a; step a returns the z_TD that predicts token i + 2 + a. Later steps stand at
        position i + a and read the rows and the selection of the first up to i, as drafting does. Also the MTP
        layer's indexer loss where ``distill`` wants it.
        """
        mtp = self.mtp
        assert mtp is not None
        context = self._context(spans, None)._replace(distill=distill)
        x_TD = mtp.combine(self.model.embed_tokens(tokens_AT[0]), h_TD)
        y_TD, chosen = mtp(x_TD, Selection(), context)
        steps = [mtp.shared_head["norm"](y_TD)]
        if len(tokens_AT) > 1:
            rows = mtp.self_attn.rows(mtp.input_layernorm(x_TD), context)
            context = context._replace(write=False, distill=False, rows=rows)
        for a, tokens_T in enumerate(tokens_AT[1:], 1):
            context = context._replace(rope=self._rope(spans.positions_T + a))
            steps.append(self._mtp_step(steps[-1], tokens_T, context, Selection(chosen.ids_TG))[0])
        return steps, chosen.loss

    def _context(self, spans: Spans, cache: LatentCache | None) -> Context:
        dense = cache is None and spans.max_length <= self.index_topk
        is_rounded = cache is None and self.cache_format == "fp8"
        return Context(spans, self._rope(spans.positions_T), cache, self.index_topk, dense, is_rounded=is_rounded)

    def _rope(self, positions_T: Tensor) -> Tensor:
        table = ops.rope_table(positions_T, self.config.qk_rope_head_dim, self.config.rope_theta)
        return table.to(torch.promote_types(self.dtype, torch.float32))
