"""The model against transformers' GlmMoeDsaForCausalLM, in fp32, on random checkpoints that transformers wrote.

``index_topk`` is far below the sequence length, so a wrong indexer cannot hide behind dense attention.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from glm52 import ops
from glm52.cache import LatentCache, Spans
from glm52.load import load, save
from glm52.model import GLM

SHAPES = {
    "base": {},
    "wide-heads": {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 48, "index_head_dim": 32},
    "nine-layers": {"num_hidden_layers": 9, "first_k_dense_replace": 3, "num_experts_per_tok": 3},
}


def indexer_types(layers: int) -> list[str]:
    return ["full" if max(i - 2, 0) % 4 == 0 else "shared" for i in range(layers)]


def write_oracle(folder: Path, seed: int, **overrides: int) -> GlmMoeDsaForCausalLM:
    """A random model with visible attention, routing and selection, saved by transformers."""
    shape = {
        "vocab_size": 151,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 8,
        "first_k_dense_replace": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 32,
        "index_topk": 8,
        "index_n_heads": 4,
        "index_head_dim": 16,
    } | overrides
    config = GlmMoeDsaConfig(
        **shape, indexer_types=indexer_types(shape["num_hidden_layers"]), n_group=1, topk_group=1, norm_topk_prob=True,
        routed_scaling_factor=2.5, max_position_embeddings=4096, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 8e6}, eos_token_id=1, pad_token_id=0,
        mlp_layer_types=["dense" if i < shape["first_k_dense_replace"] else "sparse"
                         for i in range(shape["num_hidden_layers"])],
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = GlmMoeDsaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            if "norm" in name or "e_score" in name:
                p.copy_((0.0 if "bias" in name else 1.0) + 0.1 * torch.randn(p.shape, generator=generator))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model


def load_as_transformers(folder: Path) -> GLM:
    """Ours with the one constant in which transformers differs: the eps of the latent norms."""
    model = load(folder, dtype=torch.float32)
    for module in model.modules():
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if hasattr(module, name):
                getattr(module, name).eps = 1e-6
    return model


@pytest.fixture(autouse=True)
def lowest_index_ties(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers breaks ties of the indexer by torch.topk's order; ours, and here both, by the lowest index."""

    def topk(x: Tensor, k: int, dim: int = -1, **_: object) -> torch.return_types.topk:
        values, indices = x.sort(dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    yield


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], tuple[GlmMoeDsaForCausalLM, Path]]:
    @functools.cache
    def make(seed: int, shape: str) -> tuple[GlmMoeDsaForCausalLM, Path]:
        folder = tmp_path_factory.mktemp("oracle")
        return write_oracle(folder, seed, **SHAPES[shape]), folder

    return make


@torch.inference_mode()
def prefill(model: GLM, tokens: Tensor) -> Tensor:
    return model.logits(model(tokens, Spans.of_documents([len(tokens)])))


@torch.inference_mode()
def stepwise(model: GLM, tokens: Tensor, chunk: int) -> Tensor:
    """Logits of every position, computed ``chunk`` tokens at a time over a cache."""
    cache = LatentCache(model.config, len(tokens), torch.float32)
    spans = [Spans.of_sequence(i, min(i + chunk, len(tokens)), 1) for i in range(0, len(tokens), chunk)]
    return torch.cat([model.logits(model(tokens[s.positions_T], s, cache)) for s in spans])


def random_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 150, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_prefill_and_cached_decode_equal_transformers(oracle, seed: int, shape: str) -> None:
    theirs, folder = oracle(seed, shape)
    ours = load_as_transformers(folder)
    tokens = random_tokens(96, seed)
    with torch.inference_mode():
        expected = theirs(tokens[None]).logits[0]
    assert (prefill(ours, tokens) - expected).abs().max() < 1e-4
    assert (stepwise(ours, tokens, 1) - expected).abs().max() < 1e-4
    assert (stepwise(ours, tokens, 40) - expected).abs().max() < 1e-4


def test_greedy_tokens_equal_transformers_far_beyond_top_k(oracle) -> None:
    theirs, folder = oracle(0, "base")
    ours = load_as_transformers(folder)
    prompt = random_tokens(20)
    expected = theirs.generate(prompt[None], max_new_tokens=220, do_sample=False, eos_token_id=None)[0]
    cache = LatentCache(ours.config, 256, torch.float32)
    tokens, begin = prompt.tolist(), 0
    with torch.inference_mode():
        while len(tokens) < 240:
            spans = Spans.of_sequence(begin, len(tokens), 1)
            h = ours(torch.tensor(tokens[begin:]), spans, cache)
            begin = len(tokens)
            tokens.append(int(ours.logits(h[-1:]).argmax()))
    assert tokens == expected.tolist()


def test_what_we_save_transformers_loads_with_identical_logits(oracle, tmp_path: Path) -> None:
    theirs, folder = oracle(1, "base")
    save(load(folder, dtype=torch.float32), tmp_path)
    again = GlmMoeDsaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = random_tokens(64)
    with torch.inference_mode():
        assert torch.equal(again(tokens[None]).logits, theirs(tokens[None]).logits)


def test_dense_when_everything_fits(oracle) -> None:
    """With index_topk >= length nothing an indexer says can matter."""
    _, folder = oracle(0, "base")
    model = load(folder, dtype=torch.float32)
    model.index_topk = 64
    tokens = random_tokens(64)
    before = prefill(model, tokens)
    for layer in model.model.layers:
        if layer.self_attn.indexer is not None:
            torch.nn.init.normal_(layer.self_attn.indexer.wk.weight)
    assert torch.equal(prefill(model, tokens), before)
    assert (stepwise(model, tokens, 16) - before).abs().max() < 1e-4


def test_a_full_layer_rules_its_group(oracle) -> None:
    """Randomising layer 2's indexer changes what layers 2 to 5 attend to, and layer 6 on chooses for itself."""
    _, folder = oracle(0, "base")
    model = load(folder, dtype=torch.float32)
    chosen: dict[int, Tensor | None] = {}
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _m, _a, out, i=i: chosen.__setitem__(i, out[1].ids_TG))
    tokens = random_tokens(64)
    prefill(model, tokens)
    before = dict(chosen)
    torch.nn.init.normal_(model.model.layers[2].self_attn.indexer.wk.weight)
    prefill(model, tokens)
    assert all(torch.equal(before[i], chosen[i]) for i in (0, 1))
    assert not torch.equal(before[2], chosen[2])
    assert all(chosen[i] is chosen[2] for i in (3, 4, 5)) and chosen[6] is not chosen[2]


def half_split_rope(x: Tensor, table: Tensor) -> Tensor:
    cos, sin = table.to(x.dtype).unbind(1)
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _mutate_indexer_rope(model: GLM, patch: pytest.MonkeyPatch) -> None:
    indexer = type(model.model.layers[0].self_attn.indexer)
    patch.setattr(
        indexer,
        "_rotate",
        lambda self, x, rope: torch.cat(
            (half_split_rope(x[..., : self.rope_dim], rope), x[..., self.rope_dim :]), dim=-1
        ),
    )


def _mutate_indexer_rope_last(model: GLM, patch: pytest.MonkeyPatch) -> None:
    indexer = type(model.model.layers[0].self_attn.indexer)
    patch.setattr(
        indexer,
        "_rotate",
        lambda self, x, rope: torch.cat((x[..., : -self.rope_dim], ops.rope(x[..., -self.rope_dim :], rope)), dim=-1),
    )


def _for_indexers(change: Callable[[torch.nn.Module], None]) -> Callable[[GLM, pytest.MonkeyPatch], None]:
    def apply(model: GLM, _: pytest.MonkeyPatch) -> None:
        for layer in model.model.layers:
            if layer.self_attn.indexer is not None:
                change(layer.self_attn.indexer)

    return apply


def _drop_bias(indexer: torch.nn.Module) -> None:
    indexer.k_norm.bias.data.zero_()


def _rms_instead_of_layer_norm(indexer: torch.nn.Module) -> None:
    indexer.k_norm.forward = lambda x: ops.norm(x, indexer.k_norm.weight, 1e-6) + indexer.k_norm.bias


def _unsigned_weights(indexer: torch.nn.Module) -> None:
    original = indexer.forward
    indexer.forward = lambda *a: (lambda q, w, k: (q, w.abs(), k))(*original(*a))


def _mutate_unnormalised_query(model: GLM, patch: pytest.MonkeyPatch) -> None:
    """The indexer reads q_a_proj's output instead of q_a_layernorm's."""
    attention = type(model.model.layers[0].self_attn)
    original = attention._select
    patch.setattr(
        attention, "_select", lambda self, indexer, h, q, s, c: original(self, indexer, h, self.q_a_proj(h), s, c)
    )


def _mutate_own_dense_selection(model: GLM, _: pytest.MonkeyPatch) -> None:
    model.index_topk = 1 << 20


def _mutate_trailing_selection(model: GLM, patch: pytest.MonkeyPatch) -> None:
    """A reduction that silently returns zeros degenerates the selection (here: to the first rows)."""
    original = ops.select_rows
    patch.setattr(ops, "select_rows", lambda q, w, k, s, g: original(q, torch.zeros_like(w), k, s, g))


def _mutate_shared_layers_select(model: GLM, _: pytest.MonkeyPatch) -> None:
    """IndexShare ignored: a shared layer runs an indexer of its own."""
    for layer in model.model.layers:
        if layer.self_attn.indexer is None:
            layer.self_attn.indexer = model.model.layers[0].self_attn.indexer


def _mutate_scale(model: GLM, _: pytest.MonkeyPatch) -> None:
    """Softmax scaled by the width of the cache row instead of the head."""
    for layer in model.model.layers:
        layer.self_attn.scale = model.config.row_width**-0.5


def _mutate_route(**change: object) -> Callable[[GLM, pytest.MonkeyPatch], None]:
    def apply(_: GLM, patch: pytest.MonkeyPatch) -> None:
        original = ops.route

        def route(logits: Tensor, bias: Tensor, k: int, scale: float, normalize: bool) -> tuple[Tensor, Tensor]:
            if "bias_weighs" in change:
                ids, w = original(logits, bias, k, 1.0, False)
                w = w + bias[ids]
                return ids, w / w.sum(-1, keepdim=True) * scale
            arguments = {"bias": bias, "scale": scale, "normalize": normalize} | change
            return original(logits, arguments["bias"] * 1.0, k, arguments["scale"], arguments["normalize"])

        patch.setattr(ops, "route", route)

    return apply


def _mutate_shared_expert_scaled(model: GLM, _: pytest.MonkeyPatch) -> None:
    for layer in model.model.layers:
        if hasattr(layer.mlp, "shared_experts"):
            layer.mlp.shared_experts.down_proj.weight.data.mul_(2.5)


def _mutate_gate_and_up_swapped(model: GLM, _: pytest.MonkeyPatch) -> None:
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            p = layer.mlp.experts.gate_up_proj.data
            p.copy_(torch.cat(p.chunk(2, dim=1)[::-1], dim=1))


def _mutate_theta(model: GLM, patch: pytest.MonkeyPatch) -> None:
    """rope_theta read from the top level falls back to 10,000."""
    original = ops.rope_table
    patch.setattr(ops, "rope_table", lambda positions, dim, theta: original(positions, dim, 1e4))


def _mutate_main_rope(model: GLM, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ops, "rope", half_split_rope)


def _mutate_kv_b_order(model: GLM, _: pytest.MonkeyPatch) -> None:
    """All keys then all values, instead of keys and values of each head."""
    for layer in model.model.layers:
        a = layer.self_attn
        w = a.kv_b_proj.weight.data.view(a.heads, -1, a.latent_dim)
        a.kv_b_proj.weight.data = torch.cat((w[:, : a.nope_dim].flatten(0, 1), w[:, a.nope_dim :].flatten(0, 1)))


MUTANTS: dict[str, Callable[[GLM, pytest.MonkeyPatch], None]] = {
    "indexer rope half-split": _mutate_indexer_rope,
    "indexer rope on the last dimensions": _mutate_indexer_rope_last,
    "k_norm bias dropped": _for_indexers(_drop_bias),
    "k_norm as RMSNorm": _for_indexers(_rms_instead_of_layer_norm),
    "index weights without sign": _for_indexers(_unsigned_weights),
    "indexer fed the un-normalised query": _mutate_unnormalised_query,
    "indexer ignored, dense attention": _mutate_own_dense_selection,
    "index scores all zero": _mutate_trailing_selection,
    "shared layers select for themselves": _mutate_shared_layers_select,
    "softmax scale of the row": _mutate_scale,
    "router bias ignored": _mutate_route(bias=torch.zeros(())),
    "router bias weighs": _mutate_route(bias_weighs=True),
    "router weights not normalised": _mutate_route(normalize=False),
    "routed scaling ignored": _mutate_route(scale=1.0),
    "shared expert scaled": _mutate_shared_expert_scaled,
    "gate and up swapped": _mutate_gate_and_up_swapped,
    "rope_theta from the top level": _mutate_theta,
    "main rope half-split": _mutate_main_rope,
    "kv_b rows in the wrong order": _mutate_kv_b_order,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_each_known_bug_breaks_parity(oracle, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs that shipped in other implementations: parity must notice every one of them."""
    theirs, folder = oracle(0, "base")
    ours = load_as_transformers(folder)
    tokens = random_tokens(96)
    with torch.inference_mode():
        expected = theirs(tokens[None]).logits[0]
    MUTANTS[name](ours, monkeypatch)
    assert (prefill(ours, tokens) - expected).abs().max() > 1e-3


def test_oracle_version() -> None:
    """The comparison was derived for this transformers; a new one must be looked at before it is trusted."""
    assert transformers.__version__.startswith("5.")
