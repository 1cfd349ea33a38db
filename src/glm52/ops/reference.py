"""The reference body of every operator: plain torch, differentiable, any float dtype. It defines what is right.

Nothing here knows layers, caches or requests. Sums that the contract fixes in fp32 are taken in fp32 or, for float64
inputs, in float64. The legend of tensor suffixes is in CONVENTIONS.md.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from glm52.cache import Pool, Spans

# Elements that a tile of gathered rows or of scores may hold: bounds scratch memory, not results.
_TILE_ELEMENTS = 1 << 23


def wide(x: Tensor) -> Tensor:
    """x in the dtype sums are taken in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def linear(x_TD: Tensor, w_ND: Tensor) -> Tensor:
    """x_TD @ w_ND^T -> [T, N] in the dtype of x."""
    return F.linear(x_TD, w_ND)


def norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: normalised in fp32, cast back, then weighted."""
    x = wide(x_TD)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(x_TD.dtype) * w_D


def layer_norm(x_TD: Tensor, w_D: Tensor, b_D: Tensor, eps: float) -> Tensor:
    """LayerNorm with weight and bias over the last dimension, in fp32, returned in the dtype of x."""
    return F.layer_norm(wide(x_TD), x_TD.shape[-1:], wide(w_D), wide(b_D), eps).to(x_TD.dtype)


def rope_table(positions_T: Tensor, dim: int, theta: float) -> Tensor:
    """cos and sin of the rotation angles: float64 [T, 2, dim / 2].

    In fp64, because position * frequency in fp32 is off by hundredths of a radian near a million.
    """
    inv_freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = positions_T.to(torch.float64)[:, None] * inv_freq
    return torch.stack((angle.cos(), angle.sin()), dim=1)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved pairs (2i, 2i+1) of the last dimension. x: [T, R] or [T, heads, R]; table: [T, 2, R / 2]."""
    pairs = wide(x).unflatten(-1, (-1, 2))
    cos, sin = table.to(pairs.dtype).unbind(1)
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    a, b = pairs.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def index_scores(q_TXI: Tensor, w_TX: Tensor, keys_NI: Tensor) -> Tensor:
    """Lightning-indexer score of every query against every key: [..., T, N] in fp32.

    sum over heads of w * relu(q . k / sqrt(I)). Leading batch dimensions broadcast. Source: DeepSeek-V3.2 report, 2.1.
    """
    q, k = wide(q_TXI), wide(keys_NI)
    with torch.autocast("cpu", enabled=False):
        dots = torch.einsum("...txi,...ni->...txn", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("...tx,...txn->...tn", wide(w_TX), F.relu(dots))


def select_rows(q_TXI: Tensor, w_TX: Tensor, keys_NI: Pool, spans: Spans, G: int) -> Tensor:
    """Rows of the G best-scored keys each token may see -> ids_TG int32, in order of position, -1 at the end.

    Causal; ties go to the lowest position. With G or fewer visible keys all are taken and nothing is scored. The width
    is min(G, longest context), in the training layout min(G, window). Scratch is bounded by tiles of queries.
    """
    if spans.window and isinstance(keys_NI, Tensor):
        return _select_in_windows(q_TXI, w_TX, keys_NI, spans.seq_T.view(-1, spans.window), G)
    width = min(G, spans.max_length)
    ids_TG = torch.full((spans.num_tokens, width), -1, dtype=torch.int32)
    counts = torch.bincount(spans.seq_T, minlength=len(spans.tables_SP)).tolist()
    start = 0
    for s, count in enumerate(counts):
        if not count:
            continue
        rows_n = spans.context_rows(s)
        tile = max(1, _TILE_ELEMENTS // (q_TXI.shape[1] * len(rows_n)))
        for begin in range(start, start + count, tile):
            t = slice(begin, min(begin + tile, start + count))
            visible = torch.arange(len(rows_n)) <= spans.positions_T[t, None]
            if len(rows_n) <= G:
                chosen = visible
            else:
                scores = index_scores(q_TXI[t], w_TX[t], keys_NI[rows_n].to(q_TXI.dtype))
                chosen = visible & _is_top(scores.masked_fill(~visible, -torch.inf), G)
            ids_TG[t] = _pack(chosen, rows_n, width)
        start += count
    return ids_TG


def _select_in_windows(q_TXI: Tensor, w_TX: Tensor, keys_TI: Tensor, seq_BW: Tensor, G: int) -> Tensor:
    """``select_rows`` where a token's context lies in its own window: the same shapes whatever documents it holds."""
    B, W = seq_BW.shape
    scores = index_scores(*(x.unflatten(0, (B, W)) for x in (q_TXI, w_TX, keys_TI)))
    visible = _visible(seq_BW, 0, W)
    chosen = visible & _is_top(scores.masked_fill(~visible, -torch.inf), min(G, W))
    rows = torch.arange(B * W).view(B, 1, W).expand(B, W, W)
    return _pack(chosen.flatten(0, 1), rows.flatten(0, 1), min(G, W))


def _is_top(scores_TN: Tensor, G: int) -> Tensor:
    """Mask of the G largest of each row, ties to the lowest index."""
    last = scores_TN.topk(G, dim=-1, sorted=True).values[..., -1:]
    above, tied = scores_TN > last, scores_TN == last
    return above | (tied & (tied.cumsum(-1) <= G - above.sum(-1, keepdim=True)))


def _pack(chosen_TN: Tensor, rows_N: Tensor, width: int) -> Tensor:
    """Row numbers of the chosen entries, moved to the front in their order: int32 [T, width], -1 at the end."""
    slot = torch.where(chosen_TN, chosen_TN.cumsum(1) - 1, width)
    packed = torch.full((chosen_TN.shape[0], width + 1), -1, dtype=torch.int64)
    packed.scatter_(1, slot, rows_N.expand_as(slot))
    return packed[:, :width].to(torch.int32)


def sparse_mla(q_THZ: Tensor, rows_NZ: Pool, ids_TG: Tensor, C: int, scale: float) -> Tensor:
    """Absorbed MLA over selected cache rows: MQA with one key of Z = C + R values whose first C are the value.

    q_THZ, rows_NZ float, ids_TG int32 (-1 = none) -> o_THC in the dtype of q. Softmax and sums in fp32.
    Source: DeepSeek-V3.2 report, section 2.
    """
    T, H, Z = q_THZ.shape
    o_THC = q_THZ.new_empty(T, H, C)
    tile = max(1, _TILE_ELEMENTS // (ids_TG.shape[1] * Z))
    for begin in range(0, T, tile):
        t = slice(begin, begin + tile)
        ids = ids_TG[t]
        q_tHZ = wide(q_THZ[t])
        rows_tGZ = rows_NZ[ids.clamp(min=0)].to(q_tHZ.dtype)
        scores = torch.einsum("thz,tgz->thg", q_tHZ, rows_tGZ) * scale
        p = scores.masked_fill((ids < 0)[:, None], -torch.inf).softmax(-1)
        o_THC[t] = torch.einsum("thg,tgc->thc", p, rows_tGZ[..., :C]).to(q_THZ.dtype)
    return o_THC


def mla_absorbed(
    q_nope_THA: Tensor, q_rope_THR: Tensor, rows_NZ: Pool, kv_b_HEC: Tensor, ids_TG: Tensor, scale: float
) -> Tensor:
    """MLA with kv_b_proj absorbed into query and output -> o_THV. kv_b_HEC: per head A key rows, then V value rows."""
    A, C = q_nope_THA.shape[-1], kv_b_HEC.shape[-1]
    q_THC = torch.einsum("tha,hac->thc", q_nope_THA, kv_b_HEC[:, :A])
    o_THC = sparse_mla(torch.cat((q_THC, q_rope_THR), dim=-1), rows_NZ, ids_TG, C, scale)
    return torch.einsum("thc,hvc->thv", o_THC, kv_b_HEC[:, A:])


def mla_expanded(
    q_nope_THA: Tensor,
    q_rope_THR: Tensor,
    rows_TZ: Tensor,
    kv_b_HEC: Tensor,
    ids_TG: Tensor | None,
    spans: Spans,
    scale: float,
) -> Tensor:
    """MLA with keys and values written out, for tokens whose context is the batch itself (no cache) -> o_THV.

    The same function as ``mla_absorbed`` and cheaper where every row is some token's context, as in training. ids_TG
    None means every visible row. Queries are taken in blocks, so that the causal half is never computed.
    """
    window = spans.window or spans.num_tokens
    q, k, v, seq = _expand(q_nope_THA, q_rope_THR, rows_TZ, kv_b_HEC, spans)
    chosen = None if ids_TG is None else _windowed_mask(ids_TG, window)
    out = []
    for begin, end in _blocks(window):
        allowed = _visible(seq, begin, end)
        if chosen is not None:
            allowed = allowed & chosen[:, begin:end, :end]
        scores = wide(q[:, :, begin:end] @ k[:, :, :end].transpose(-1, -2)) * scale
        p = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        out.append(p.to(v.dtype) @ v[:, :, :end])
    return torch.cat(out, dim=2).transpose(1, 2).flatten(0, 1)


def _expand(
    q_nope_THA: Tensor, q_rope_THR: Tensor, rows_TZ: Tensor, kv_b_HEC: Tensor, spans: Spans
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values as [B, H, window, ...] and sequence numbers as [B, window]."""
    A, (H, E, C) = q_nope_THA.shape[-1], kv_b_HEC.shape
    window = spans.window or spans.num_tokens
    kv = F.linear(rows_TZ[:, :C], kv_b_HEC.reshape(H * E, C)).view(-1, H, E)
    k_rope = rows_TZ[:, None, C:].expand(-1, H, -1).to(kv.dtype)
    q = torch.cat((q_nope_THA, q_rope_THR), dim=-1)
    k = torch.cat((kv[..., :A], k_rope), dim=-1)
    q, k, v = (x.unflatten(0, (-1, window)).transpose(1, 2) for x in (q, k, kv[..., A:]))
    return q, k, v, spans.seq_T.view(-1, window)


def _blocks(window: int) -> list[tuple[int, int]]:
    """Blocks of queries: small enough to skip most of the masked half, few enough to unroll."""
    block = max(128, window // 8)
    return [(begin, min(begin + block, window)) for begin in range(0, window, block)]


def _visible(seq_BT: Tensor, begin: int, end: int) -> Tensor:
    """[B, end - begin, end]: same document and not later, for queries begin..end."""
    causal = torch.arange(end) <= torch.arange(begin, end)[:, None]
    return causal & (seq_BT[:, begin:end, None] == seq_BT[:, None, :end])


def _windowed_mask(ids_TG: Tensor, window: int) -> Tensor:
    """Selected rows as a mask [B, window, window] inside each window."""
    ids = ids_TG.to(torch.int64).unflatten(0, (-1, window))
    start = torch.arange(ids.shape[0])[:, None, None] * window
    slot = torch.where(ids < 0, window, ids - start)
    mask = torch.zeros(*ids.shape[:2], window + 1, dtype=torch.bool)
    return mask.scatter_(2, slot, True)[..., :window]


def index_distillation(
    scores_BTT: Tensor,
    q_nope_THA: Tensor,
    q_rope_THR: Tensor,
    rows_TZ: Tensor,
    kv_b_HEC: Tensor,
    ids_TG: Tensor | None,
    spans: Spans,
    scale: float,
) -> Tensor:
    """KL(attention, averaged over heads || softmax of the index scores), mean over tokens: the indexer's loss.

    scores_BTT: ``index_scores`` within each window. Over the visible rows (dense warm-up) or, with ids_TG, over the
    selected ones (sparse stage). No gradient reaches the attention. Source: DeepSeek-V3.2 report, 2.1.1.
    """
    window = spans.window or spans.num_tokens
    with torch.no_grad():
        q, k, _, seq = _expand(q_nope_THA, q_rope_THR, rows_TZ, kv_b_HEC, spans)
        chosen = None if ids_TG is None else _windowed_mask(ids_TG, window)
    total = scores_BTT.new_zeros(())
    for begin, end in _blocks(window):
        with torch.no_grad():
            allowed = _visible(seq, begin, end)
            if chosen is not None:
                allowed = allowed & chosen[:, begin:end, :end]
            logits = (q[:, :, begin:end] @ k[:, :, :end].transpose(-1, -2)).to(scores_BTT.dtype) * scale
            p = logits.masked_fill(~allowed[:, None], -torch.inf).softmax(-1).mean(1)
        log_q = scores_BTT[:, begin:end, :end].masked_fill(~allowed, -torch.inf).log_softmax(-1)
        log_q = log_q.masked_fill(~allowed, 0.0)
        total = total + (torch.special.xlogy(p, p) - p * log_q).sum()
    return total / spans.num_tokens


def route(logits_TE: Tensor, bias_E: Tensor, K: int, scale: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """The K experts of each token and their weights -> ids_TK int64, w_TK fp32.

    Sigmoid scores; the bias chooses and never weighs; ties go to the lowest expert. Source: DeepSeek-V3 report, 2.1.2.
    """
    scores = wide(logits_TE).sigmoid()
    ids_TK = (scores + bias_E).sort(dim=-1, descending=True, stable=True).indices[:, :K]
    w_TK = scores.gather(1, ids_TK)
    if normalize:
        w_TK = w_TK / (w_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK, w_TK * scale


@torch.library.custom_op("glm52::grouped_mm", mutates_args=())
def _grouped_mm(x_NA: Tensor, w_EBA: Tensor, counts_E: Tensor) -> Tensor:
    """Rows of x, sorted by expert, each times its own expert's matrix -> [N, B]."""
    out = x_NA.new_empty(len(x_NA), w_EBA.shape[1])
    counts = counts_E.tolist()
    for x, w, y in zip(x_NA.split(counts), w_EBA, out.split(counts), strict=True):
        torch.mm(x, w.t(), out=y)
    return out


@_grouped_mm.register_fake
def _(x_NA: Tensor, w_EBA: Tensor, counts_E: Tensor) -> Tensor:
    return x_NA.new_empty(len(x_NA), w_EBA.shape[1])


@torch.library.custom_op("glm52::grouped_outer", mutates_args=())
def _grouped_outer(g_NB: Tensor, x_NA: Tensor, counts_E: Tensor) -> Tensor:
    """For each expert the sum over its rows of g^T x: the gradient of its matrix, [E, B, A]."""
    out = x_NA.new_empty(len(counts_E), g_NB.shape[1], x_NA.shape[1])
    counts = counts_E.tolist()
    for g, x, y in zip(g_NB.split(counts), x_NA.split(counts), out, strict=True):
        torch.mm(g.t(), x, out=y)
    return out


@_grouped_outer.register_fake
def _(g_NB: Tensor, x_NA: Tensor, counts_E: Tensor) -> Tensor:
    return x_NA.new_empty(len(counts_E), g_NB.shape[1], x_NA.shape[1])


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_NB):  # type: ignore[no-untyped-def]
    x_NA, w_EBA, counts_E = ctx.saved_tensors
    grad_NB = grad_NB.contiguous()
    return _grouped_mm(grad_NB, w_EBA.mT, counts_E), _grouped_outer(grad_NB, x_NA, counts_E), None


_grouped_mm.register_autograd(_backward, setup_context=_save_for_backward)


class _Permute(torch.autograd.Function):
    """x[order]; the gradient is gathered by the inverse, where indexing would scatter it."""

    @staticmethod
    def forward(ctx, x_ND, order, inverse):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse)
        return x_ND[order]

    @staticmethod
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        return grad_ND[ctx.saved_tensors[0]], None, None


def expert_ffn(x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Weighted sum of K expert SwiGLUs per token -> y_TD, summed over k in fp32 in the order of ids.

    gate_up_EGD: [E, 2F, D], gate rows first; down_EDF: [E, D, F]. No token is dropped. Each expert multiplies all of
    its tokens at once; under autocast in the autocast dtype.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x_TD, gate_up_EGD, down_EDF = x_TD.to(dtype), gate_up_EGD.to(dtype), down_EDF.to(dtype)
    T, K = ids_TK.shape
    order = ids_TK.flatten().argsort(stable=True)
    inverse = order.argsort()
    counts_E = F.one_hot(ids_TK.flatten(), len(gate_up_EGD)).sum(0)
    x_ND = x_TD[:, None].expand(T, K, -1).flatten(0, 1)
    x_ND = _Permute.apply(x_ND, order, inverse)  # type: ignore[no-untyped-call]
    hidden = swiglu(_grouped_mm(x_ND, gate_up_EGD, counts_E))
    y_ND = _Permute.apply(_grouped_mm(hidden, down_EDF, counts_E), inverse, order)  # type: ignore[no-untyped-call]
    y_TD: Tensor = (wide(y_ND.view(T, K, -1)) * w_TK.unsqueeze(-1)).sum(1).to(x_TD.dtype)
    return y_TD


def write_rows(pool_NZ: Pool, row_T: Tensor, x_TZ: Tensor) -> None:
    """pool[row] = x, in place, rounded as the pool holds it."""
    pool_NZ[row_T] = x_TZ.to(pool_NZ.dtype)


def softmax_gradient(logits_TW: Tensor, targets_T: Tensor, weight_T: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token in fp32, and the gradient of the weighted sum in the dtype of the logits."""
    x = wide(logits_TW)
    largest = x.amax(-1, keepdim=True)
    e = (x - largest).exp()
    total = e.sum(-1, keepdim=True)
    loss_T = (total.log() + largest - x.gather(1, targets_T[:, None])).squeeze(1)
    is_target = torch.arange(x.shape[1]) == targets_T[:, None]
    return loss_T, ((e / total - is_target.to(x.dtype)) * weight_T[:, None]).to(logits_TW.dtype)


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy in chunks of tokens; gradients are taken on the way forward, so logits are never kept."""

    @staticmethod
    def forward(ctx, h_TD, w_WD, targets_T, weight_T, chunk, dtype, softmax):  # type: ignore[no-untyped-def]
        h, w = h_TD.detach().to(dtype), w_WD.detach().to(dtype)
        loss_T, grad_h, grad_w = wide(h).new_empty(len(h)), torch.empty_like(h_TD), torch.zeros_like(w_WD)
        for begin in range(0, len(h), chunk):
            t = slice(begin, begin + chunk)
            loss_T[t], grad = softmax(h[t] @ w.t(), targets_T[t], weight_T[t])
            grad_h[t] = (grad @ w).to(grad_h.dtype)
            grad_w += grad.t() @ h[t]
        ctx.save_for_backward(grad_h, grad_w)
        ctx.mark_non_differentiable(loss_T)
        return (loss_T * weight_T).sum(), loss_T

    @staticmethod
    def backward(ctx, grad, _loss_T):  # type: ignore[no-untyped-def]
        grad_h, grad_w = ctx.saved_tensors
        return grad * grad_h, grad * grad_w, None, None, None, None, None


def token_loss(
    h_TD: Tensor,
    w_WD: Tensor,
    targets_T: Tensor,
    weight_T: Tensor,
    chunk: int = 1024,
    softmax: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = softmax_gradient,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of next-token cross-entropies (nats), and each token's own, which carries no gradient.

    Chunked over tokens: full logits never exist. Matrix products in the autocast dtype, softmax and sums in fp32.
    ``softmax`` may be a compiled ``softmax_gradient``.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else h_TD.dtype
    total, loss_T = _TokenLoss.apply(  # type: ignore[no-untyped-call]
        h_TD, w_WD, targets_T, weight_T, chunk, dtype, softmax
    )
    return total, loss_T
