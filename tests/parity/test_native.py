"""The native stack against the reference model: the same function in every format, the same bits in every batch."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from glm52 import ops
from glm52.cache import Spans
from glm52.model import GLM
from glm52.native import NativeGLM
from glm52.quant import quantize
from tests.fixtures import random_model, tiny_config

if ops.backend() == "reference":
    pytest.skip("built without native kernels", allow_module_level=True)

FORMATS = ("f32", "bf16", "int8", "int4", "fp8")
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "wider": {"hidden_size": 64, "num_attention_heads": 5, "qk_nope_head_dim": 20, "qk_rope_head_dim": 8,
              "kv_lora_rank": 40, "index_n_heads": 13, "index_head_dim": 12, "moe_intermediate_size": 24,
              "n_routed_experts": 9, "num_experts_per_tok": 3},
    "no MTP, weights as they are": {"num_nextn_predict_layers": 0, "norm_topk_prob": False, "index_topk": 30},
}  # fmt: skip
LENGTH = 150


def tokens(count: int = LENGTH) -> Tensor:
    return torch.randint(0, 60, (count,), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def forward(model: Any, ids: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Logits and hidden states of one sequence, computed ``chunk`` tokens at a time."""
    cache = model.new_cache(-(-len(ids) // 16) * 16)
    parts = [model(ids[i : i + chunk], Spans.of_sequence(i, min(i + chunk, len(ids)), 16), cache)
             for i in range(0, len(ids), chunk)]  # fmt: skip
    h = torch.cat(parts)
    return model.logits(h), h


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_f32_is_the_reference(shape: str, seed: int) -> None:
    """Selections far below the length, so a wrong score or tie would show; 1e-4 as in the comparison with transformers."""
    model = random_model(tiny_config(**SHAPES[shape]), seed)
    with torch.inference_mode():
        expected = model.logits(model(tokens(), Spans.of_documents([LENGTH])))
    assert (forward(NativeGLM(model, "f32", threads=2), tokens(), 64)[0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("odd", [-torch.inf, torch.inf, torch.nan])
def test_experts_are_distinct_whatever_their_biases(odd: float) -> None:
    """Of those that are never to be chosen the first was chosen again and again, where it took some to have enough. And
    what is not a number was not chosen at all, where the reference chooses it first, so that it shows."""
    model = random_model(tiny_config(**SHAPES["wider"] | {"num_nextn_predict_layers": 0}))
    for name, bias_E in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias_E[[0, *range(2, 9)]] = odd
    with torch.inference_mode():
        expected = model.logits(model(tokens(), Spans.of_documents([LENGTH])))
    native = NativeGLM(model, "f32", threads=2)
    assert (forward(native, tokens(), LENGTH)[0] - expected).abs().max() < 1e-4
    assert {reads for _, reads in native.expert_use.values()} == {3}


def test_use_of_experts_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """hits: tokens times experts; reads: different experts of each step, as the reference's router chooses them."""
    config = tiny_config(num_nextn_predict_layers=0)
    model, chosen, route = random_model(config), [], ops.route

    def spy(*args: Any) -> Any:
        ids, weights = route(*args)
        chosen.append(ids)
        return ids, weights

    monkeypatch.setattr(ops, "route", spy)
    with torch.inference_mode():
        model(tokens(), Spans.of_documents([LENGTH]))
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer)]
    expected = {
        layer: (ids.numel(), sum(len(part.unique()) for part in ids.split(7)))
        for layer, ids in zip(layers, chosen, strict=True)
    }
    native = NativeGLM(model, "f32", threads=2)
    assert set(native.expert_use.values()) == {(0, 0)}
    forward(native, tokens(), 7)
    assert native.expert_use == expected


@pytest.mark.parametrize(("fmt", "cache"), [*((f, "auto") for f in FORMATS), ("bf16", "fp8"), ("f32", "fp8")])
def test_bits_do_not_depend_on_chunk_or_threads(fmt: str, cache: Any) -> None:
    model = random_model(tiny_config(index_topk=40))
    one, two = NativeGLM(model, fmt, threads=1, cache=cache), NativeGLM(model, fmt, threads=2, cache=cache)
    whole = forward(one, tokens(), LENGTH)[0]
    for native, chunk in ((two, LENGTH), (one, 1), (two, 1), (two, 7), (one, 32)):
        assert torch.equal(forward(native, tokens(), chunk)[0], whole)


@pytest.mark.parametrize("fmt", ["f32", "bf16"])
@torch.inference_mode()
def test_bits_do_not_depend_on_where_pages_lie(fmt: str) -> None:
    """Selected rows that begin and end as if they lay in a row, and do not."""
    native, page = NativeGLM(random_model(tiny_config(index_topk=24)), fmt, threads=2), 16
    pages, positions = -(-LENGTH // page), torch.arange(LENGTH)
    whole = forward(native, tokens(), LENGTH)[0]
    for seed in range(20):
        table = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
        rows = table[positions // page] * page + positions % page
        where = torch.stack((positions, rows, torch.zeros_like(rows)))
        spans = Spans(where_3T=where, tables_SP=table.to(torch.int32)[None], page_size=page)
        assert torch.equal(native.logits(native(tokens(), spans, native.new_cache(pages * page))), whole)


def quantized_reference(model: GLM, fmt: str) -> GLM:
    """The reference with the weights that the native model holds after quantisation, in fp32."""
    soft = {"int4": "int8", "fp8": "bf16"}.get(fmt, fmt)

    def through(w: Tensor, f: str) -> Tensor:
        return w.bfloat16().float() if f == "bf16" else quantize(w, f).dequantize()  # type: ignore[arg-type]

    for name, p in model.named_parameters():
        if p.dim() < 2 or "weights_proj" in name or "mlp.gate.weight" in name:
            continue
        if "kv_b_proj" in name:
            c = model.config
            heads = p.view(c.num_attention_heads, -1, c.kv_lora_rank)
            for h in heads:
                h[: c.qk_nope_head_dim] = through(h[: c.qk_nope_head_dim].t().contiguous(), soft).t()
                h[c.qk_nope_head_dim :] = through(h[c.qk_nope_head_dim :], soft)
        elif p.dim() == 3:
            for expert in p:
                for half in expert.chunk(2) if "gate_up" in name else (expert,):
                    half.copy_(through(half, fmt))
        else:
            p.copy_(through(p, "bf16" if "embed" in name else soft if "lm_head" in name or "eh_proj" in name else fmt))
    return model


@pytest.mark.parametrize("fmt", FORMATS[1:])
def test_quantized_formats_are_the_reference_of_their_weights(fmt: str) -> None:
    """Dense attention and every expert, so that no choice flips. What is left is activations rounded to bf16: 2^-9 of each product,
    about twenty in a row: 0.03 of the deviation in the root mean square; a wrong scale is 0.5."""
    config = tiny_config(index_topk=1000, num_experts_per_tok=4)
    native = NativeGLM(random_model(config), fmt, threads=2)  # type: ignore[arg-type]
    reference = quantized_reference(random_model(config), fmt)
    got, h = forward(native, tokens(), 64)
    expected, h_reference = forward(reference, tokens(), 64)
    assert (got - expected).square().mean().sqrt() < 0.03 * expected.std()
    with torch.inference_mode():
        cache, spans = native.new_cache(160), Spans.of_sequence(0, LENGTH, 16)
        other = reference.new_cache(160)
        every = torch.arange(LENGTH)
        z, _ = native.extend(h, tokens(), spans, cache, every)
        z_reference, _ = reference.extend(h_reference, tokens(), spans, other, every)
    assert (z - z_reference).square().mean().sqrt() < 0.03 * z_reference.std()


@pytest.mark.parametrize("shape", SHAPES)
def test_an_fp8_cache_holds_what_the_reference_holds(shape: str) -> None:
    """The same bytes but for values that lie between two codes, and the same logits within the rounding of queries to bf16.
    Dense attention and every expert, so that no choice flips."""
    experts = SHAPES[shape].get("n_routed_experts", 4)
    model = random_model(tiny_config(**SHAPES[shape] | {"index_topk": 1000, "num_experts_per_tok": experts}))
    model.cache_format = "fp8"
    native = NativeGLM(model, "f32", threads=2, cache="fp8")
    spans = Spans.of_sequence(0, LENGTH, 16)
    with torch.inference_mode():
        ours, theirs = native.new_cache(160), model.new_cache(160)
        got, expected = native.logits(native(tokens(), spans, ours)), model.logits(model(tokens(), spans, theirs))
    rows = ours.handle.rows(0).view(160, -1)[:LENGTH]
    assert rows.shape[1] == model.config.row_bytes("fp8")[0]
    assert (rows == theirs.rows(0).bytes_NB[:LENGTH]).float().mean() > 0.999
    assert (got - expected).square().mean().sqrt() < 0.02 * expected.std()


def test_fp8_index_keys_choose_what_the_reference_chooses() -> None:
    """The rows that the first layer selects, whose inputs are the same: its logits would be off by a tenth otherwise."""
    model = random_model(tiny_config(num_hidden_layers=2, index_topk=16, indexer_types=("full",) * 2,
                                     mlp_layer_types=("dense",) * 2, num_nextn_predict_layers=0))  # fmt: skip
    model.cache_format = "fp8"
    with torch.inference_mode():
        spans = Spans.of_sequence(0, LENGTH, 16)
        expected = model.logits(model(tokens(), spans, model.new_cache(160)))
    got = forward(NativeGLM(model, "f32", threads=2, cache="fp8"), tokens(), 64)[0]
    close = (got - expected).abs().amax(1) < 0.05 * expected.std()
    assert close.float().mean() > 0.9


@torch.inference_mode()
def test_drafts_are_the_reference() -> None:
    """The first step writes every row, whichever tokens it returns; later ones use its selection and write nothing."""
    model = random_model(tiny_config())
    native = NativeGLM(model, "f32", threads=2)
    outputs = []
    for body in (model, native):
        cache, ids = body.new_cache(160), tokens(100)
        h = body(ids, Spans.of_sequence(0, 100, 16), cache)
        body.extend(h[:60], ids[1:61], Spans.of_sequence(0, 60, 16), cache, torch.tensor([], dtype=torch.int64))
        some, _ = body.extend(h[60:90], ids[61:91], Spans.of_sequence(60, 90, 16), cache, torch.tensor([3, 29]))
        at = torch.tensor([99])
        first, selection = body.extend(h[90:], ids.roll(-1)[90:], Spans.of_sequence(90, 100, 16), cache, at - 90)
        second = body.draft(first, torch.tensor([5]), at + 1, cache, selection)
        third = body.draft(second, torch.tensor([9]), at + 2, cache, selection)
        outputs.append(torch.cat((some, first, second, third)))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4


@torch.inference_mode()
def test_proposed_drafts_are_those_of_single_steps() -> None:
    """Behind two tokens at once, four drafts: the likeliest token of each step, as the head for drafts has it, which is int8
    natively."""
    model = random_model(tiny_config())
    model.lm_head.weight.copy_(quantize(model.lm_head.weight, "int8").dequantize())
    proposed = []
    for body in (model, NativeGLM(model, "f32", threads=2)):
        cache, ids, spans = body.new_cache(160), tokens(100), Spans.of_sequence(0, 100, 16)
        h, last = body(ids, spans, cache), torch.tensor([60, 99])
        drafts = body.propose(h, ids.roll(-1), spans, cache, last, 4)
        z, selection = body.extend(h, ids.roll(-1), spans, cache, last)
        for step in range(4):
            assert torch.equal(body.logits(z).argmax(1), drafts[:, step])
            z = body.draft(z, drafts[:, step].contiguous(), last + 1 + step, cache, selection)
        proposed.append(drafts)
    assert torch.equal(*proposed)


@torch.inference_mode()
def test_several_threads_may_call_one_model() -> None:
    """They take turns over its scratch; two at once were a crash."""
    native = NativeGLM(random_model(tiny_config()), "f32", threads=2)
    caches, spans = [native.new_cache(160) for _ in range(3)], Spans.of_sequence(0, 100, 16)

    def logits(seed: int) -> Tensor:
        with torch.inference_mode():
            ids = torch.randint(2, 60, (100,), generator=torch.Generator().manual_seed(seed))
            return torch.stack([native.logits(native(ids, spans, caches[seed])) for _ in range(20)])

    alone = [logits(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert all(map(torch.equal, pool.map(logits, range(3)), alone))


@pytest.mark.parametrize(("change", "named"), [
    ({"rows": 100}, "rows"), ({"page": 8}, "page_size"), ({"row": 160}, "where"), ({"page_id": 10}, "tables"),
    ({"position": 160}, "tables"), ({"seq": 1}, "where"), ({"h": torch.zeros(4, 31)}, "h"),
    ({"h": torch.zeros(4, 32, dtype=torch.float64)}, "h"), ({"h": torch.zeros(3, 32)}, "h"),
    ({"tokens": torch.tensor([1, 2, 3, 61])}, "tokens"), ({"tokens": torch.tensor([1, 2])}, "where"),
    ({"tokens": torch.tensor([1, 2, 3, 4], dtype=torch.int32)}, "tokens"),
])  # fmt: skip
def test_wrong_places_are_value_errors(change: dict[str, Any], named: str) -> None:
    native = NativeGLM(random_model(tiny_config()), "f32", threads=1)
    with pytest.raises(ValueError, match=named):
        cache = native.new_cache(change.get("rows", 160))
        where = torch.tensor([[0, 1, 2, change.get("position", 3)], [0, 1, 2, change.get("row", 3)],
                              [0, 0, 0, change.get("seq", 0)]])  # fmt: skip
        tables = torch.full((1, 10), change.get("page_id", 0), dtype=torch.int32)
        native._stack.forward(
            change.get("tokens", torch.arange(4)), where, tables, change.get("page", 16), cache.handle,
            change.get("h", torch.zeros(4, 32)),
        )  # fmt: skip
