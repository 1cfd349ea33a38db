"""``glm52 inspect``: what a configuration or checkpoint is, weighs and costs. Reads headers only, fetches no weights
and imports no torch."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from glm52.config import GLMConfig
from glm52.contents import Contents, account
from glm52.errors import CheckpointError
from glm52.headers import INDEX, TensorInfo, read_headers, read_index
from glm52.hub import resolve
from glm52.memory import suited_tokens
from glm52.options import integer
from glm52.schemes import Quantization

_MIB, _GIB = 1 << 20, 1 << 30
_FLOP = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="folder, hub name or preset (default: the small model that is shipped)"
    )
    parser.add_argument("--context", type=integer(1), help="context length for costs (default: the model's longest)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    folder = _folder(args.model)
    config = GLMConfig.read(folder) if folder else GLMConfig.preset(args.model)
    longest = config.max_position_embeddings
    if args.context is not None and args.context > longest:
        print(f"glm52 inspect: --context: the model's longest is {longest:,}; the figures hold, its replies would not",
              file=sys.stderr)  # fmt: skip
    report = describe(config, args.context or longest)
    if folder and any(folder.glob("*.safetensors")):
        report["checkpoint"] = describe_checkpoint(folder, config)
    elif folder and (folder / INDEX).exists():
        report["index"] = {"tensors": len(shards := read_index(folder)), "shards": len(set(shards.values()))}
    print(json.dumps(report, indent=1) if args.json else render(args.model or "nano", report))
    return int("does_not_load" in report.get("checkpoint", {}))


def _folder(model: str | None) -> Path | None:
    """The model's folder, or None if the name is a preset's."""
    is_name = model is not None and "/" not in model and model != "nano" and not Path(model).exists()
    return None if is_name else resolve(model, weights=False)


def describe(config: GLMConfig, context: int) -> dict[str, Any]:
    """Everything that follows from the configuration. Bytes are exact, but those of a step; FLOPs count two per
    multiply-add. step: where memory does not bound it, computed by one thread."""
    tokens = suited_tokens(config.n_routed_experts / config.num_experts_per_tok)
    mtp = config.num_nextn_predict_layers
    full = [i for i in config.index_layers if i < config.num_hidden_layers]
    return {
        "layers": {
            "main": config.num_hidden_layers,
            "dense": config.mlp_layer_types.count("dense"),
            "sparse": config.mlp_layer_types.count("sparse"),
            "mtp": mtp,
            "indexers": list(config.index_layers),
        },
        "parameters": {
            "total": config.num_parameters(),
            "router_biases": config.weights()["router biases"],
            "active": config.active_parameters(),
            "parts": config.weights(),
        },
        "weight_bytes": weight_bytes(config),
        "cache_bytes_per_token": {
            fmt: {
                "rows": config.num_hidden_layers * config.row_bytes(fmt)[0],
                "index_keys": len(full) * config.row_bytes(fmt)[1],
                "total": config.cache_bytes(fmt),
                "mtp_layer": mtp * sum(config.row_bytes(fmt)),
            }
            for fmt in ("bf16", "fp8")
        },
        "step": {"tokens": tokens, "scratch_bytes": tokens * config.scratch_bytes(threads=1)},
        "flops_per_token": flops_per_token(config, context),
        "context": context,
    }


def weight_bytes(config: GLMConfig) -> dict[str, int]:
    """Payload of a checkpoint. FP8: block-128 scales; embedding, head, norms, router, eh_proj, weights_proj stay BF16.
    INT4: the same matrices in 4 bits with an fp16 scale per 128 values."""
    total, biases = config.num_parameters(), config.weights()["router biases"]
    matrices = _quantized_matrices(config)
    quantized = sum(n * rows * columns for n, rows, columns in matrices)
    scales = sum(n * -(-rows // 128) * -(-columns // 128) for n, rows, columns in matrices)
    groups = sum(n * rows * -(-columns // 128) for n, rows, columns in matrices)
    rest = 2 * (total - quantized) + 4 * biases
    return {
        "bf16": 2 * total + 4 * biases,
        "fp8": quantized + 4 * scales + rest,
        "int4": quantized // 2 + 2 * groups + rest,
    }


def _quantized_matrices(config: GLMConfig) -> list[tuple[int, int, int]]:
    """(how many, rows, columns) of the matrices that the FP8 checkpoint quantises."""
    D, H, C, Q = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.q_lora_rank
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    sparse = sum(config.is_sparse(i) for i in range(layers))
    experts = sparse * config.n_routed_experts
    F, shared = config.moe_intermediate_size, config.moe_intermediate_size * config.n_shared_experts
    indexers = len(config.index_layers)
    return [
        (layers, Q, D), (layers, H * config.qk_head_dim, Q), (layers, config.row_width, D),
        (layers, H * (config.qk_nope_head_dim + config.v_head_dim), C), (layers, D, H * config.v_head_dim),
        (indexers, config.index_n_heads * config.index_head_dim, Q), (indexers, config.index_head_dim, D),
        (2 * experts, F, D), (experts, D, F), (2 * sparse, shared, D), (sparse, D, shared),
        (2 * (layers - sparse), config.intermediate_size, D), (layers - sparse, D, config.intermediate_size),
    ]  # fmt: skip


def flops_per_token(config: GLMConfig, context: int) -> dict[str, float]:
    """FLOPs of one decoded token at a context length, main stack.

    matrices: two per active weight. scoring: the indexers' dot products, as shared and as if every layer had its own.
    attention: the absorbed core over the selected rows. The saving compares matrices plus scoring.
    """
    per_indexer = 2.0 * context * config.index_n_heads * config.index_head_dim
    selected = min(context, config.index_topk)
    core = 2.0 * selected * config.num_attention_heads * (config.row_width + config.kv_lora_rank)
    matrices = 2.0 * config.active_parameters()
    scoring = config.indexer_types.count("full") * per_indexer
    unshared = config.num_hidden_layers * per_indexer
    return {
        "matrices": matrices,
        "scoring": scoring,
        "scoring_without_sharing": unshared,
        "attention": config.num_hidden_layers * core,
        "index_share_saving": (matrices + unshared) / (matrices + scoring),
    }


def describe_checkpoint(folder: Path, config: GLMConfig) -> dict[str, Any]:
    """Counts and bytes by dtype and of what is quantised, from the headers; or why the folder does not load."""
    report: dict[str, Any] = {"folder": str(folder)}
    try:
        tensors = read_headers(folder)
        report |= _totals(tensors)
        report["quantized"] = _quantized(account(folder, tensors, config))
    except CheckpointError as error:
        report["does_not_load"] = str(error)
    return report


def _totals(tensors: dict[str, TensorInfo]) -> dict[str, Any]:
    by_dtype: Counter[str] = Counter()
    for info in tensors.values():
        by_dtype[info.dtype] += info.num_bytes
    shards = {info.shard for info in tensors.values()}
    return {
        "tensors": len(tensors), "shards": len(shards), "bytes": sum(by_dtype.values()),
        "bytes_by_dtype": dict(by_dtype), "bytes_on_disk": sum(s.stat().st_size for s in shards),
    }  # fmt: skip


def _quantized(contents: Contents) -> dict[str, Any]:
    """Matrices of each kind, and their bytes with scales and zeros."""
    if not contents.quantized:
        return {}
    modules = {name.removesuffix(".weight") for name in contents.quantized}
    return {
        "method": Quantization.parse(contents.config.quantization_config).method,
        "kinds": dict(Counter(scheme.kind for scheme in contents.quantized.values())),
        "bytes": sum(t.num_bytes for name, t in contents.tensors.items() if name.rpartition(".")[0] in modules),
    }


def render(name: str, report: dict[str, Any]) -> str:
    """The report for people: aligned, bytes exact and in GiB or MiB."""
    layers, parameters, flops = report["layers"], report["parameters"], report["flops_per_token"]
    cache, context = report["cache_bytes_per_token"], report["context"]
    lines = [
        f"{name}: {layers['main']} layers ({layers['dense']} dense, {layers['sparse']} sparse), {layers['mtp']} MTP",
        f"indexers on layers {', '.join(map(str, layers['indexers']))}",
        "",
        f"{'parameters':<26}{parameters['total']:>24,}   (+{parameters['router_biases']:,} router biases)",
        *(f"  {part:<24}{n:>24,}" for part, n in parameters["parts"].items() if part != "router biases"),
        f"{'active per token':<26}{parameters['active']:>24,}   (with the output head, without embedding and MTP)",
        "",
        *(f"{'weights in ' + f.upper():<26}{_bytes(n)}" for f, n in report["weight_bytes"].items()),
        "",
    ]
    for fmt, parts in cache.items():
        lines += [
            f"{'cache per token, ' + fmt.upper():<26}{parts['total']:>24,}   = {parts['rows']:,} rows + "
            f"{parts['index_keys']:,} index keys  (+{parts['mtp_layer']:,} for the MTP layer)",
            f"{f'  at {context:,} tokens':<26}{_bytes(parts['total'] * context)}",
        ]
    tokens, scratch = report["step"]["tokens"], report["step"]["scratch_bytes"]
    lines.append(f"{f'a step of {tokens:,} tokens':<26}{_bytes(scratch)}   (fewer where memory is short)")
    unit, size = next(((u, s) for u, s in _FLOP if flops["matrices"] >= s), _FLOP[-1])
    lines += [
        "",
        f"FLOPs per token at a context of {context:,}",
        f"{'  matrices':<26}{flops['matrices'] / size:>24,.1f}   {unit}",
        f"{'  index scoring':<26}{flops['scoring'] / size:>24,.1f}   {unit}   "
        f"({flops['scoring_without_sharing'] / size:,.1f} if every layer scored)",
        f"{'  sparse attention':<26}{flops['attention'] / size:>24,.1f}   {unit}",
        f"{'  saved by IndexShare':<26}{flops['index_share_saving']:>23,.2f}x   (matrices + scoring)",
    ]
    if "checkpoint" in report:
        lines += ["", *_render_checkpoint(report["checkpoint"])]
    if "index" in report:
        lines += ["", "{tensors} tensors in {shards} file(s), says the index; the weights are not here"
                  .format(**report["index"])]  # fmt: skip
    return "\n".join(lines)


def _render_checkpoint(c: dict[str, Any]) -> list[str]:
    lines = []
    if "tensors" in c:
        kinds = ", ".join(f"{k} {n:,}" for k, n in c["bytes_by_dtype"].items())
        checked = "" if "does_not_load" in c else ", headers checked"
        lines.append(f"{c['tensors']} tensors in {c['shards']} file(s), {c['bytes']:,} bytes ({kinds}){checked}")
    if "does_not_load" in c:
        lines.append(f"does not load: {c['does_not_load']}")
    elif quantized := c["quantized"]:
        kinds = ", ".join(f"{n} matrices of {kind}" for kind, n in quantized["kinds"].items())
        lines.append(f"quantised ({quantized['method']}): {kinds}, {quantized['bytes']:,} bytes with their scales")
    return lines


def _bytes(n: int) -> str:
    return f"{n:>24,}   bytes = " + (f"{n / _GIB:,.2f} GiB" if n >= _GIB else f"{n / _MIB:,.2f} MiB")
