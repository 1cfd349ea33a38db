"""What a config.json says: geometry, layer schedule, and the arithmetic that follows from them. No torch.

``GLMConfig`` keeps the official keys under their official names and refuses to guess: a key whose absence would
silently change the model is an error, and of keys that contradict each other the explicit one wins.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from glm52.errors import ConfigError

FULL, SHARED = "full", "shared"
DENSE, SPARSE = "dense", "sparse"
CACHE_GROUP = 128  # values of an FP8 cache row that share a scale
DTYPES = ("float32", "bfloat16", "float16", "float64")
_LARGEST = (1 << 31) - 1  # of integers: kernels hold them in 32 bits
_MOST_LAYERS = 1000

# Keys that would change what is computed, and the one value that this package computes.
_ONLY = {
    "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "rope_scaling": None,
    "rope_interleave": True, "indexer_rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GLMConfig:
    """A ``glm_moe_dsa`` model. Fields are config.json's keys; see ``from_dict`` for how missing ones are derived."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    rope_theta: float
    indexer_types: tuple[str, ...]
    mlp_layer_types: tuple[str, ...]
    num_nextn_predict_layers: int = 0
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    latent_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    index_share_for_mtp_iteration: bool = True
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int = 0
    dtype: str = "bfloat16"
    quantization_config: Mapping[str, Any] | None = None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def row_width(self) -> int:
        """Values of one cache row: the latent, then the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def index_layers(self) -> tuple[int, ...]:
        """Layers that own an indexer; the MTP layer, numbered after the main stack, always does."""
        full = [i for i, kind in enumerate(self.indexer_types) if kind == FULL]
        return (*full, *range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers))

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts; the MTP layer's is."""
        return layer >= self.num_hidden_layers or self.mlp_layer_types[layer] == SPARSE

    @staticmethod
    def read(path: Path) -> "GLMConfig":
        """Read a folder's config.json, or the file itself."""
        file = path if path.is_file() else path / "config.json"
        if not file.is_file():
            raise ConfigError(f"{path}: expected a model folder with a config.json, found none")
        try:
            data = json.loads(file.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: not valid JSON ({error}); fetch the file again") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{file}: expected a JSON object, found {type(data).__name__}")
        try:
            return GLMConfig.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    @staticmethod
    def preset(name: str) -> "GLMConfig":
        """A published configuration by name; ConfigError lists the names."""
        folder = Path(__file__).parent / "presets"
        names = sorted(p.stem for p in folder.glob("*.json"))
        if name not in names:
            raise ConfigError(f"{name}: expected a folder or one of the presets {', '.join(names)}")
        return GLMConfig.read(folder / f"{name}.json")

    def weights(self) -> dict[str, int]:
        """Parameters by part. ``router biases`` are kept apart: they are buffers, not trained by gradients."""
        D, H, C = self.hidden_size, self.num_attention_heads, self.kv_lora_rank
        attention = D * self.q_lora_rank + self.q_lora_rank + self.q_lora_rank * H * self.qk_head_dim
        attention += (
            D * self.row_width + C + C * H * (self.qk_nope_head_dim + self.v_head_dim) + H * self.v_head_dim * D
        )
        X, I = self.index_n_heads, self.index_head_dim
        indexer = self.q_lora_rank * X * I + D * I + 2 * I + D * X
        expert = 3 * D * self.moe_intermediate_size
        moe = expert * (self.n_routed_experts + self.n_shared_experts) + self.n_routed_experts * D
        num_sparse = sum(self.is_sparse(i) for i in range(self.num_hidden_layers))
        num_full = self.indexer_types.count(FULL)
        mtp = attention + indexer + moe + 2 * D + 2 * D * D + 3 * D
        return {
            "embedding and head": 2 * self.vocab_size * D + D,
            "attention": self.num_hidden_layers * (attention + 2 * D),
            "indexers": num_full * indexer,
            "dense MLP": (self.num_hidden_layers - num_sparse) * 3 * D * self.intermediate_size,
            "experts and routers": num_sparse * moe,
            "MTP layer": self.num_nextn_predict_layers * mtp,
            "router biases": (num_sparse + self.num_nextn_predict_layers) * self.n_routed_experts,
        }

    def num_parameters(self) -> int:
        """All parameters with the MTP layer, without the routers' biases."""
        return sum(n for part, n in self.weights().items() if part != "router biases")

    def active_parameters(self) -> int:
        """Matrix weights one token passes: output head in, embedding, norms and the MTP layer out."""
        D, H, C = self.hidden_size, self.num_attention_heads, self.kv_lora_rank
        attention = D * self.q_lora_rank + self.q_lora_rank * H * self.qk_head_dim + D * self.row_width
        attention += C * H * (self.qk_nope_head_dim + self.v_head_dim) + H * self.v_head_dim * D
        indexer = self.q_lora_rank * self.index_n_heads * self.index_head_dim
        indexer += D * (self.index_head_dim + self.index_n_heads)
        experts = self.num_experts_per_tok + self.n_shared_experts
        sparse = 3 * D * self.moe_intermediate_size * experts + self.n_routed_experts * D
        num_sparse = sum(self.is_sparse(i) for i in range(self.num_hidden_layers))
        dense = (self.num_hidden_layers - num_sparse) * 3 * D * self.intermediate_size
        matrices = self.num_hidden_layers * attention + self.indexer_types.count(FULL) * indexer
        return matrices + num_sparse * sparse + dense + self.vocab_size * D

    def row_bytes(self, fmt: str) -> tuple[int, int]:
        """Cache bytes of one token in one layer: its row, and its index key where the layer owns an indexer.

        fmt ``f32``, ``bf16``, or ``fp8``: E4M3 latent with an fp32 scale per CACHE_GROUP values and bf16 rotated key;
        E4M3 index key with one fp32 scale. Source: the FlashMLA README.
        """
        if fmt in ("f32", "bf16"):
            size = 4 if fmt == "f32" else 2
            return size * self.row_width, size * self.index_head_dim
        if fmt == "fp8":
            scales = -(-self.kv_lora_rank // CACHE_GROUP)
            return self.kv_lora_rank + 4 * scales + 2 * self.qk_rope_head_dim, self.index_head_dim + 4
        raise ValueError(f"fmt: expected f32, bf16 or fp8, found {fmt!r}")

    def cache_bytes(self, fmt: str) -> int:
        """Cache bytes of one token over the main stack: rows of every layer, index keys of the full ones."""
        row, key = self.row_bytes(fmt)
        return self.num_hidden_layers * row + self.indexer_types.count(FULL) * key

    def scratch_bytes(self, threads: int, *, rounded_bytes: int = 2) -> int:
        """What the native body takes for each token of a step: activations, sorted by experts too, and candidates of
        the indexers' search once there are more rows than they select. rounded_bytes: of a value as products take it.

        To within a tenth (tests/unit/test_memory.py). Source: the buffers of csrc/stack.h.
        """
        D, H, C, Q, K = (self.hidden_size, self.num_attention_heads, self.kv_lora_rank, self.q_lora_rank,
                         self.num_experts_per_tok)  # fmt: skip
        X, I, G, mtp = self.index_n_heads, self.index_head_dim, self.index_topk, self.num_nextn_predict_layers
        of_values = H * self.v_head_dim
        of_experts = self.moe_intermediate_size * (K + self.n_shared_experts)
        floats = (5 + 2 * mtp) * D  # the stream, normed, for the router, by the next embedding, as a forward's result
        floats += 2 * Q + self.row_width + I + H * self.qk_head_dim + X * (I + 1) + self.qk_rope_head_dim
        floats += 2 * H * C + of_values  # absorbed queries, mixed latents, values
        floats += self.n_routed_experts + 4 * K + max(self.intermediate_size, of_experts)
        floats += G + 2 * (2 * G + 64)  # rows selected; twice as many candidates of eight bytes
        # What products take: of all tokens at once, of those of each expert, and of one head by each thread.
        taken = max((1 + mtp) * D, Q, of_values, self.intermediate_size)
        taken += (K + 1) * D + of_experts + threads * max(self.qk_nope_head_dim, C)
        return 4 * floats + rounded_bytes * taken

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "GLMConfig":
        """Understand an official config.json; ConfigError names the key, what was expected and what was found.

        ``head_dim`` is ignored: it has been published as 64 and as 192 for the same model. ``rope_theta`` is read from
        ``rope_parameters`` alone. The schedule is ``indexer_types`` if given, else ``index_topk_pattern`` (F/S), else
        layer i is full iff max(i - offset + 1, 0) % freq == 0 with the published defaults offset 2, freq 1.
        """
        if data.get("model_type") != "glm_moe_dsa":
            raise ConfigError(f"model_type: expected 'glm_moe_dsa', found {data.get('model_type')!r}; "
                              "this package runs GLM-5, 5.1 and 5.2 only")  # fmt: skip
        for name, only in _ONLY.items():
            if data.get(name, only) not in (only, None):
                raise ConfigError(f"{name}: expected {only!r}, which is what GLM-5 computes, found {data[name]!r}")
        merged = dict(data)
        merged.setdefault("n_routed_experts", data.get("num_experts"))
        merged["rope_theta"] = _rope_theta(data)
        merged["indexer_types"] = _indexer_types(data)
        merged["mlp_layer_types"] = _mlp_layer_types(data)
        merged["latent_norm_eps"] = data.get("latent_norm_eps", data.get("rms_norm_eps", 1e-5))
        merged["dtype"] = data.get("dtype", data.get("torch_dtype", "bfloat16"))
        eos = data.get("eos_token_id")
        merged["eos_token_id"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        values = {f.name: merged[f.name] for f in fields(GLMConfig) if merged.get(f.name) is not None}
        missing = [f.name for f in fields(GLMConfig) if f.default is MISSING and f.name not in values]
        if missing:
            raise ConfigError(f"{', '.join(missing)}: expected, found none; fetch config.json again")
        config = GLMConfig(**values)
        config._check()
        return config

    def _check(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int:
                _integer(f.name, value)
            elif f.type is float and (type(value) not in (int, float) or not 0 < value < 1e30):
                raise ConfigError(f"{f.name}: expected a number above 0 and below 1e30, found {value!r}")
            elif f.type is bool and not isinstance(value, bool):
                raise ConfigError(f"{f.name}: expected true or false, found {value!r}")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank",
                     "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size",
                     "moe_intermediate_size", "index_n_heads", "index_topk",
                     "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.qk_rope_head_dim % 2 or self.index_head_dim < self.qk_rope_head_dim:
            raise ConfigError(f"qk_rope_head_dim: expected an even number up to index_head_dim {self.index_head_dim}, "
                              f"found {self.qk_rope_head_dim}")  # fmt: skip
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ConfigError(f"num_experts_per_tok: expected 1 to n_routed_experts {self.n_routed_experts}, "
                              f"found {self.num_experts_per_tok}")  # fmt: skip
        if (self.n_group, self.topk_group) != (1, 1):
            raise ConfigError(f"n_group, topk_group: expected 1, 1 (GLM groups no experts), "
                              f"found {self.n_group}, {self.topk_group}")  # fmt: skip
        if self.num_nextn_predict_layers > 1:
            raise ConfigError(f"num_nextn_predict_layers: expected 0 or 1, found {self.num_nextn_predict_layers}")
        for token in self.eos_token_id:
            _integer("eos_token_id", token, most=self.vocab_size - 1)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: expected {', '.join(DTYPES)}, found {self.dtype!r}")

    def to_dict(self) -> dict[str, Any]:
        """The official config.json, with every key that other engines read."""
        data: dict[str, Any] = {"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa"}
        data |= {f.name: getattr(self, f.name) for f in fields(self)}
        del data["rope_theta"], data["latent_norm_eps"]
        if self.quantization_config is None:
            del data["quantization_config"]
        freq_offset = _freq_offset(self.indexer_types)
        return (
            data
            | {
                "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
                "rope_interleave": True,
                "indexer_rope_interleave": True,
                "indexer_types": list(self.indexer_types),
                "mlp_layer_types": list(self.mlp_layer_types),
                "first_k_dense_replace": self.mlp_layer_types.count(DENSE),
                "moe_layer_freq": 1,
                "eos_token_id": list(self.eos_token_id),
                "num_key_value_heads": self.num_attention_heads,
                "qk_head_dim": self.qk_head_dim,
                "head_dim": self.qk_rope_head_dim,
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "moe_router_dtype": "float32",
                "hidden_act": "silu",
                "attention_bias": False,
                "attention_dropout": 0.0,
                "use_cache": True,
                "index_topk_pattern": None,
            }
            | ({"index_topk_freq": freq_offset[0], "index_skip_topk_offset": freq_offset[1]} if freq_offset else {})
        )


def _rope_theta(data: Mapping[str, Any]) -> float:
    rope = data.get("rope_parameters")
    if not isinstance(rope, Mapping) or not isinstance(rope.get("rope_theta"), int | float):
        raise ConfigError("rope_parameters: expected an object with a number rope_theta, found "
                          f"{rope!r}; without it positions would silently use another base")  # fmt: skip
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_parameters.rope_type: expected 'default', found {rope['rope_type']!r}")
    theta: float = rope["rope_theta"]
    return theta


def _by_frequency(layers: int, freq: int, offset: int) -> tuple[str, ...]:
    return tuple(FULL if max(i - offset + 1, 0) % freq == 0 else SHARED for i in range(layers))


def _freq_offset(types: tuple[str, ...]) -> tuple[int, int] | None:
    """The (freq, offset) whose rule gives these types, if one does."""
    candidates = ((f, o) for f in range(1, len(types) + 1) for o in (3, 2, *range(4, len(types) + 2), 1))
    return next(((f, o) for f, o in candidates if _by_frequency(len(types), f, o) == types), None)


def _integer(name: str, value: Any, least: int = 0, most: int = _LARGEST) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{name}: expected an integer from {least} to {most}, found {value!r}")
    return value


def _names(data: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    found = data.get(key)
    if found is None:
        return None
    if not isinstance(found, Sequence) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"{key}: expected a list of strings, found {found!r}")
    return tuple(found)


def _layers(data: Mapping[str, Any]) -> int:
    return _integer("num_hidden_layers", data.get("num_hidden_layers"), 1, _MOST_LAYERS)


def _indexer_types(data: Mapping[str, Any]) -> tuple[str, ...]:
    layers = _layers(data)
    types, pattern = _names(data, "indexer_types"), _names(data, "index_topk_pattern")
    if types is None and pattern is not None:
        types = tuple({"F": FULL, "S": SHARED}.get(letter, letter) for letter in pattern)
    elif types is None:
        freq, offset = data.get("index_topk_freq"), data.get("index_skip_topk_offset")
        types = _by_frequency(
            layers,
            1 if freq is None else _integer("index_topk_freq", freq, 1),
            2 if offset is None else _integer("index_skip_topk_offset", offset),
        )
    if len(types) != layers or set(types) - {FULL, SHARED}:
        raise ConfigError(f"indexer_types: expected {layers} times 'full' or 'shared', found {len(types)} entries "
                          f"with values {sorted(set(map(str, types)))}")  # fmt: skip
    if types[0] != FULL:
        raise ConfigError("indexer_types: expected layer 0 to be 'full' (it has no layer to share with)")
    return types


def _mlp_layer_types(data: Mapping[str, Any]) -> tuple[str, ...]:
    layers = _layers(data)
    types = _names(data, "mlp_layer_types")
    if types is None:
        dense = data.get("first_k_dense_replace")
        dense = 0 if dense is None else _integer("first_k_dense_replace", dense)
        return tuple(DENSE if i < dense else SPARSE for i in range(layers))
    if len(types) != layers or set(types) - {DENSE, SPARSE}:
        raise ConfigError(f"mlp_layer_types: expected {layers} times 'dense' or 'sparse', found {len(types)} entries")
    return types
