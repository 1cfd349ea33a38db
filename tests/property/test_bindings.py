"""Whatever is handed to the native bindings, they answer or raise ValueError, and never crash: every function of the
extension is called with one argument spoilt in its dtype, shape, strides, type or values."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm52 import ops
from glm52.native import _dims
from glm52.packing import Packer, pack, pack_held
from tests.fixtures import random_model, tiny_config

if ops.backend() == "reference":
    pytest.skip("built without native kernels", allow_module_level=True)
kernels = ops.kernels()
MODEL = random_model(tiny_config())
CONFIG, PACKER = MODEL.config, Packer(MODEL, "int4", kernels)
D, ROWS, MTP = CONFIG.hidden_size, 64, CONFIG.num_hidden_layers
LAYERS = [PACKER.layer(i) for i in range(MTP + 1)]
DRAFT = {name: PACKER.floats(f"model.layers.{MTP}.{name}") for name in ("enorm", "hnorm", "shared_head.norm")}
DRAFT["eh_proj"] = PACKER.soft(f"model.layers.{MTP}.eh_proj")
HEAD = PACKER.soft("lm_head")
EMBEDDING, NORM = MODEL.weight("model.embed_tokens.weight"), MODEL.weight("model.norm.weight")
PLACES = {"tokens": torch.arange(4), "where": torch.tensor([[0, 1, 2, 3]] * 2 + [[0] * 4]),
          "tables": torch.zeros(1, 2, dtype=torch.int32), "page_size": 16}  # fmt: skip


def stack(*, ends: bool = True) -> Any:
    out = kernels.Stack(_dims(CONFIG), 1)
    for layer in LAYERS:
        out.add_layer(layer)
    if ends:
        out.set_ends(EMBEDDING, NORM, DRAFT)
    return out


def cache(config: Any = CONFIG, rows: int = ROWS, keys: bool = True, layers: int = MTP + 1) -> Any:
    return kernels.Cache(_dims(config), [keys and i in config.index_layers for i in range(layers)], rows, "f32")


def selection(rows: int = ROWS, page: int = 0, last: Sequence[int] = range(4)) -> Any:
    """What the drafting layer of a stack selects for tokens of the four."""
    out = kernels.Selection()
    places = PLACES | {"tables": torch.full((1, 2), page, dtype=torch.int32)}
    ends = torch.tensor(last)
    STACK.extend(
        torch.zeros(4, D), **places, cache=cache(rows=rows), last=ends, selection=out, z=torch.zeros(len(last), D)
    )
    return out


STACK, CACHE = stack(), cache()
CHOSEN = selection()
MATRIX = pack(kernels, [torch.randn(24, D)], "int8")
WRONG = (kernels.pack("f32", torch.ones(3, 4)), pack(kernels, [torch.ones(24, D + 1)], "bf16"))
EXPERTS = [
    (pack_held(kernels, [torch.randn(8, D)] * 2, alternate=True), pack(kernels, [torch.randn(D, 8)], "bf16"))
] * 2
QUANTISED = {
    "w": torch.ones(6, 32, dtype=torch.int8),
    "scales": torch.ones(6, 2),
    "group": 16,
    "scale_rows": 1,
    "threads": 1,
}
Call = tuple[Callable[..., Any], dict[str, Any]]
CALLS: dict[str, Call] = {
    "pack": (kernels.pack, {"format": "f32", "w": torch.ones(6, 32), "threads": 1}),
    "pack int4": (kernels.pack, QUANTISED | {"format": "int4", "zeros": torch.ones(6, 2, dtype=torch.int8)}),
    "pack fp8": (kernels.pack, QUANTISED | {"format": "fp8", "w": torch.ones(6, 32, dtype=torch.uint8)}),
    "linear": (kernels.linear, {"x": torch.ones(4, D), "w": MATRIX, "y": torch.ones(4, 24), "threads": 2}),
    "expert_ffn": (kernels.expert_ffn, {
        "x": torch.ones(4, D), "ids": torch.tensor([[0, 1]] * 4, dtype=torch.int32), "weights": torch.ones(4, 2), "experts": EXPERTS,
        "y": torch.ones(4, D), "threads": 2,
    }),
    "read_seconds": (kernels.read_seconds, {"data": torch.ones(100), "threads": 2}),
    "Cache": (kernels.Cache, {"dims": _dims(CONFIG), "has_index": [True], "rows": 32, "format": "f32"}),
    "Cache.rows": (CACHE.rows, {"layer": 0}),
    "Cache.keys": (CACHE.keys, {"layer": 0}),
    "Stack": (kernels.Stack, {"dims": _dims(CONFIG), "threads": 1}),
    "Stack.threads": (lambda n: setattr(stack(), "threads", n), {"n": 1}),
    "Stack.top_k": (lambda n: setattr(stack(), "top_k", n), {"n": 1}),
    "Stack.add_layer": (lambda **layer: kernels.Stack(_dims(CONFIG), 1).add_layer(layer), LAYERS[0]),
    "Stack.add_layer with experts": (lambda **layer: kernels.Stack(_dims(CONFIG), 1).add_layer(layer), LAYERS[MTP]),
    "Stack.set_ends": (lambda **ends: stack(ends=False).set_ends(**ends), {"embedding": EMBEDDING, "norm": NORM, "draft": DRAFT}),
    "Stack.forward": (STACK.forward, PLACES | {"cache": CACHE, "h": torch.zeros(4, D)}),
    "Stack.extend": (STACK.extend, PLACES | {
        "h": torch.ones(4, D), "cache": CACHE, "last": torch.tensor([1, 3]), "selection": kernels.Selection(),
        "z": torch.zeros(2, D),
    }),
    "Stack.draft": (STACK.draft, {
        "z": torch.ones(4, D), "tokens": PLACES["tokens"], "positions": torch.arange(4), "cache": CACHE,
        "selection": CHOSEN, "out": torch.zeros(4, D),
    }),
    "Stack.propose": (STACK.propose, PLACES | {
        "head": HEAD, "h": torch.ones(4, D), "cache": CACHE, "last": torch.tensor([1, 3]),
        "out": torch.zeros(2, 3, dtype=torch.int64),
    }),
    "Stack.linear": (STACK.linear, {"w": MATRIX, "x": torch.ones(4, D), "y": torch.ones(4, 24)}),
}  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)
# What may have any length, or be left out.
FREE = {("pack", "w", "shape"), ("pack int4", "w", "shape"), ("pack fp8", "w", "shape"), ("read_seconds", "data", "shape"), ("Stack", "dims", "number"),
        ("Cache", "dims", "number"), ("Cache", "has_index", "shape"), ("Stack.set_ends", "embedding", "shape"),
        ("Stack.set_ends", "embedding", "dtype"), ("Stack.forward", "tables", "shape"), ("Stack.extend", "tables", "shape"),
        ("pack int4", "zeros", "none"), ("Stack.set_ends", "draft", "none"), ("Stack.propose", "out", "shape"),
        ("Stack.propose", "tables", "shape")}  # fmt: skip


def spoil_tensor(draw: Any, x: Tensor) -> tuple[str, Any]:
    kind = draw(st.sampled_from(("dtype", "axes", "shape", "strides", "none")))
    if kind == "dtype":
        return kind, x.to(draw(st.sampled_from([d for d in DTYPES if d != x.dtype])))
    if kind == "axes":
        return kind, draw(st.sampled_from((x[None], x.flatten()[0], x.flatten() if x.dim() > 1 else x[None, None])))
    if kind == "strides":
        return kind, torch.stack((x, x), -1)[..., 0]
    if kind == "shape":
        axis = draw(st.integers(0, x.dim() - 1))
        size = draw(st.integers(0, 2 * x.shape[axis]).filter(lambda n: n != x.shape[axis]))
        return kind, torch.cat((x, x), axis).narrow(axis, 0, size).contiguous()
    return kind, None


def spoil(draw: Any, x: Any) -> tuple[str, Any]:
    """A way to spoil a value, and the value spoilt."""
    if isinstance(x, Tensor):
        return spoil_tensor(draw, x)
    if isinstance(x, bool) or x is None:
        return "none", "no"
    if isinstance(x, int | float):
        return "number", draw(st.sampled_from((0, -1, 7, 2**31 + 1, 2**62, 2**64 - 16, 2**70)))
    if isinstance(x, str):
        return "value", draw(st.text(max_size=4))
    if isinstance(x, dict) and x:
        key = draw(st.sampled_from(sorted(x)))
        kind, spoilt = spoil(draw, x[key])
        return kind, {k: v for k, v in x.items() if k != key} if kind == "none" else x | {key: spoilt}
    if isinstance(x, list | tuple) and x:
        at = draw(st.integers(0, len(x) - 1))
        if draw(st.booleans()):
            return "shape", type(x)(x[:at])
        kind, spoilt = spoil(draw, x[at])
        return kind, type(x)([*x[:at], spoilt, *x[at + 1 :]])
    if isinstance(x, kernels.Matrix):
        return "matrix", draw(st.sampled_from((None, *WRONG)))
    return "none", None


@settings(max_examples=1500, deadline=None)
@given(name=st.sampled_from(sorted(CALLS)), data=st.data())
def test_a_spoilt_argument_is_a_value_error(name: str, data: st.DataObject) -> None:
    """TypeError is for what is no number or array at all."""
    call, arguments = CALLS[name]
    which = data.draw(st.sampled_from(sorted(arguments)))
    kind, spoilt = spoil(data.draw, arguments[which])
    try:
        call(**arguments | {which: spoilt})
    except ValueError:
        return
    except TypeError:
        assert kind in ("none", "number", "matrix")
    else:
        must_fail = kind in ("dtype", "axes", "shape", "strides", "matrix") and (name, which, kind) not in FREE
        assert not must_fail, (name, which, kind)


@settings(max_examples=400, deadline=None)
@given(call=st.sampled_from(("forward", "extend", "propose")), which=st.sampled_from(("tokens", "where", "tables")), at=st.integers(0, 11),
       value=st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 70), page=st.sampled_from((16, 32, 48, 64, 2**62, 2**64 - 16)))  # fmt: skip
def test_any_token_place_and_table_is_computed_or_refused(
    call: str, which: str, at: int, value: int, page: int
) -> None:
    spoilt = PLACES[which].clone()
    if spoilt.dtype == torch.int32:
        value = value % 2**32 - 2**31
    spoilt.view(-1)[at % spoilt.numel()] = value
    places = PLACES | {which: spoilt, "page_size": page}
    try:
        function, arguments = CALLS[f"Stack.{call}"]
        function(**arguments | places)
    except ValueError as error:
        assert str(error).split(":")[0] in ("tokens", "where", "tables", "page_size")


def test_what_belongs_to_another_model_is_refused() -> None:
    """A cache with narrower rows, other layers or no keys, and a selection of rows that a smaller cache does not have."""
    narrow = tiny_config(kv_lora_rank=CONFIG.kv_lora_rank + 64)
    few = tiny_config(index_head_dim=CONFIG.index_head_dim // 2)
    for wrong in (cache(narrow), cache(few), cache(keys=False), cache(layers=2)):
        with pytest.raises(ValueError, match="cache"):
            STACK.forward(**PLACES, cache=wrong, h=torch.zeros(4, D))
        with pytest.raises(ValueError, match="cache"):
            STACK.extend(**CALLS["Stack.extend"][1] | {"cache": wrong})
    for unfit in (selection(128, page=6), selection(last=(0, 1, 3)), kernels.Selection()):
        with pytest.raises(ValueError, match="selection"):
            STACK.draft(**CALLS["Stack.draft"][1] | {"selection": unfit})
    for last in ([4], [-1], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="last"):
            STACK.propose(**CALLS["Stack.propose"][1] | {"last": torch.tensor(last)})
    with pytest.raises(ValueError, match="before the ends"):
        STACK.add_layer(LAYERS[0])


def test_every_binding_is_spoilt() -> None:
    """Reading properties apart, which take nothing."""
    taken: set[str] = set()
    for name in dir(kernels):
        member = getattr(kernels, name)
        if isinstance(member, type):
            taken |= {f"{name}.{n}" for n, m in vars(member).items() if callable(m) and not n.startswith("__")}
            taken |= {f"{name}.{n}" for n, m in vars(member).items() if getattr(m, "fset", None)}
            taken.add(name)
        elif callable(member):
            taken.add(name)
    covered = {name.split(" ")[0] for name in CALLS}
    assert taken - covered == {"isa", "isas", "Matrix", "Selection"}  # without arguments
    assert taken <= covered | {"isa", "isas", "Matrix", "Selection"}
