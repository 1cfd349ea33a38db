"""Training: its data are a function of the seed, a killed run resumes bit for bit, and what it writes can be loaded."""

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glm52 import cli, ops
from glm52.cache import Spans
from glm52.errors import ConfigError
from glm52.load import load
from glm52.model import GLM
from glm52.shards import Shards, write_bucket
from glm52.train.data import materialize, windows
from glm52.train.init import init_weights
from glm52.train.optim import Muon, orthogonalize, split_matrices, uses_muon
from glm52.train.trainer import Recipe, Stage, Trainer
from tests.fixtures import random_model, tiny_config


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Counting sequences (learnable) as text and as chat, in which the second half of a document is the reply."""
    folder, rng = tmp_path_factory.mktemp("shards"), random.Random(0)
    manifest = {}
    for name, chat in (("text", False), ("chat", True)):
        documents = []
        for _ in range(200):
            start, length = rng.randrange(60), rng.randint(3, 30)
            ids = [(start + i) % 60 for i in range(length)]
            documents.append((ids, [i >= length // 2 for i in range(length)] if chat else None))
        manifest[name] = write_bucket(folder, name, documents)
    (folder / "manifest.json").write_text(str({"buckets": manifest}).replace("'", '"'))
    return Shards(folder)


def recipe(**changes: object) -> Recipe:
    stages = (
        Stage(name="one", tokens=64 * 3, mixture={"text": 0.5, "chat": 0.5}, window=32, batch_tokens=64,
              micro_tokens=32, warmup_steps=1, distill_every=2),
        Stage(name="two", tokens=64 * 3, mixture={"chat": 1.0}, window=32, batch_tokens=64, micro_tokens=64,
              warmup_steps=1, index_topk=6, distill_every=2, decay_fraction=1.0),
    )  # fmt: skip
    return Recipe(name="test", config=tiny_config(), stages=stages, **changes)


def run(trainer: Trainer, steps: int | None = None) -> list[dict[str, object]]:
    out = []
    while not trainer.finished and (steps is None or len(out) < steps):
        metrics = trainer.step()
        del metrics["tokens_per_s"]
        out.append(metrics)
    return out


def test_a_stage_may_start_from_the_mean_of_earlier_ones(shards: Shards, tmp_path: Path) -> None:
    """Three parts of the first, one of the second; a run killed right there starts the same."""
    first, second = recipe().stages
    stages = (first, second, replace(second, name="three", start={"one": 3.0, "two": 1.0}))
    trainer = Trainer(replace(recipe(), stages=stages), shards, tmp_path, compiled=False)
    run(trainer, 6)
    one, two = (load(tmp_path / name, dtype=torch.float32).state_dict() for name in ("one", "two"))
    resumed = Trainer(replace(recipe(), stages=stages), shards, tmp_path, compiled=False)
    for model in (trainer.model, resumed.model):
        for key, value in model.state_dict().items():
            assert torch.allclose(value, 0.75 * one[key] + 0.25 * two[key], atol=1e-6), key
    assert run(trainer) == run(resumed)


def test_a_killed_run_resumes_bit_for_bit(shards: Shards, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = Trainer(recipe(), shards, tmp_path / "whole", compiled=False)
    expected = run(whole)
    assert len(expected) == 6 and expected[-1]["loss"] < expected[0]["loss"]
    killed = Trainer(recipe(save_every_s=0.0), shards, tmp_path / "killed", compiled=False)
    begun = run(killed, 4)
    resumed = Trainer(recipe(), shards, tmp_path / "killed", compiled=False)
    assert begun + run(resumed) == expected
    for name, p in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], p), name
    loaded = load(tmp_path / "whole" / "two")
    expected_bf16 = whole.model.lm_head.weight.detach().bfloat16()
    assert torch.equal(loaded.lm_head.weight, expected_bf16.to(loaded.dtype))


@pytest.mark.parametrize(
    "fields", [{"trainable": "indexer", "distill_every": 2}, {"trainable": "mtp", "mtp_weight": 0.0}]
)
def test_a_stage_that_could_train_nothing_is_named(shards: Shards, tmp_path: Path, fields: dict[str, Any]) -> None:
    stage = Stage(name="idle", tokens=64, mixture={"text": 1.0}, window=32, batch_tokens=64, micro_tokens=64, **fields)
    with pytest.raises(ConfigError, match="idle"):
        Trainer(Recipe(name="t", config=tiny_config(), stages=(stage,)), shards, tmp_path, compiled=False)


def test_the_indexer_stage_trains_nothing_else(shards: Shards, tmp_path: Path) -> None:
    stage = Stage(name="indexer", tokens=64 * 2, mixture={"text": 1.0}, window=32, batch_tokens=64, micro_tokens=64,
                  trainable="indexer", distill_every=1, warmup_steps=1)  # fmt: skip
    trainer = Trainer(Recipe(name="t", config=tiny_config(), stages=(stage,)), shards, tmp_path, compiled=False)
    before = {n: p.clone() for n, p in trainer.model.state_dict().items()}
    metrics = run(trainer)
    changed = {n for n, p in trainer.model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed and all(".indexer." in n for n in changed)
    assert metrics[1]["index_loss"] < metrics[0]["index_loss"]


def test_the_language_loss_never_reaches_the_indexer() -> None:
    model = random_model(tiny_config()).requires_grad_(True)
    spans = Spans.of_documents([20])
    model(torch.arange(20), spans).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "layers.7." not in n and "lm_head" not in n}
    assert all((g is None) == (".indexer." in n) for n, g in grads.items())
    model.zero_grad(set_to_none=True)
    model.forward_distill(torch.arange(20), spans)[1].backward()
    assert all((p.grad is not None) == (".indexer." in n and "layers.7." not in n) for n, p in model.named_parameters())


@pytest.mark.parametrize("top_k", [4, 64])
def test_the_steps_that_training_drafts_are_those_of_drafting(top_k: int) -> None:
    config = tiny_config(index_topk=top_k)
    model = random_model(config, dtype=torch.float64)
    lengths = (9, 14)
    spans = Spans.of_documents(lengths, window=23)
    ids = torch.randint(2, config.vocab_size, (26,), generator=torch.Generator().manual_seed(0))
    ahead = torch.stack([ids[a : a + 23] for a in (1, 2, 3)])
    with torch.inference_mode():
        h = model(ids[:23], spans)
        steps, _ = model.draft_steps(h, ahead, spans)
        begin = 0
        for length in lengths:
            for end in range(1, length + 1):
                cache = model.new_cache(64)
                one = slice(begin, begin + end)
                places, last = Spans.of_sequence(0, end), torch.tensor([end - 1])
                z, chosen = model.extend(h[one], ahead[0, one], places, cache, last)
                for a in range(3):
                    torch.testing.assert_close(z[0], steps[a][begin + end - 1])
                    if a < 2:
                        z = model.draft(z, ahead[a + 1 : a + 2, begin + end - 1], last + a + 1, cache, chosen)
            begin += length


def test_windows_are_a_function_of_the_seed_and_keep_their_shares(shards: Shards) -> None:
    mixture = {"text": 0.25, "chat": 0.75}
    first, again = (list(itertools.islice(windows(shards, mixture, 32, 5), 200)) for _ in range(2))
    assert first == again
    assert first != list(itertools.islice(windows(shards, mixture, 32, 6), 200))
    used = dict.fromkeys(mixture, 0)
    for window in first:
        assert 0 < sum(p.end - p.begin for p in window) <= 32
        for piece in window:
            used[piece.bucket] += piece.end - piece.begin
    # Text fills the rest of a window that the next conversation does not fit, so it is a little ahead.
    assert abs(used["chat"] / sum(used.values()) - 0.75) < 0.05


def test_targets_stay_inside_their_document(shards: Shards) -> None:
    batch = materialize(shards, list(itertools.islice(windows(shards, {"chat": 1.0}, 32, 0), 8)), 32, 7, 0.25, ahead=3)
    T = batch.spans.num_tokens
    for t in range(T):
        for a in range(3):
            if batch.weight_AT[a, t]:
                assert batch.targets_AT[a, t] == (batch.tokens_T[t] + a + 1) % 60
                assert batch.weight_AT[a, t] in (0.25, 1.0)
    last = [t for t in range(T - 1) if batch.spans.seq_T[t] != batch.spans.seq_T[t + 1]]
    assert not batch.weight_AT[:, last].any(), "the last token of a whole document has no target"


def test_stretched_documents_keep_their_order_and_their_start(shards: Shards) -> None:
    pieces = list(itertools.islice(windows(shards, {"chat": 1.0}, 32, 0), 8))
    plain, apart = (materialize(shards, pieces, 32, 7, 0.25, stretch=s).spans for s in (0, 500))
    skips = apart.positions_T - plain.positions_T
    assert skips.max() > 0 and apart.positions_T.max() < 500
    same = apart.seq_T[1:] == apart.seq_T[:-1]
    assert (apart.positions_T.diff()[same] >= 1).all()
    assert not apart.positions_T[1:][~same].any()
    assert (skips == 0).any(), "some documents are left as they are"


def test_muon_orthogonalizes_every_matrix_by_itself() -> None:
    m = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(m).float())
    assert values.min() > 0.6 and values.max() < 1.3
    config = tiny_config()
    for name, p in random_model(config).named_parameters():
        if uses_muon(name, p):
            assert sum(part.numel() for part in split_matrices(name, p, config)) == p.numel()
    names = {n for n, p in random_model(config).named_parameters() if not uses_muon(n, p)}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"} <= names


def test_muon_takes_a_step_of_the_stated_size() -> None:
    """A tall matrix moves by lr * sqrt(rows / columns) in every direction, a wide one by lr."""
    config = tiny_config()
    for shape, size in (((40, 10), 2.0), ((10, 40), 1.0)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([("model.layers.0.mlp.up_proj.weight", p)], config, lr=0.1).step()
        values = torch.linalg.svdvals(p.detach())
        assert 0.06 * size < values.min() and values.max() < 0.13 * size


def test_the_first_head_starts_by_looking_one_back() -> None:
    """Scores of head 0 of layer 0 against every distance: the hint of ``init_weights`` peaks at one."""
    config = tiny_config(hidden_size=256, qk_rope_head_dim=8, rope_theta=50.0)
    model = GLM(config)
    init_weights(model, torch.Generator().manual_seed(0))
    attention = model.model.layers[0].self_attn
    x = model.model.layers[0].input_layernorm(
        model.model.embed_tokens(torch.randperm(60, generator=torch.Generator().manual_seed(1))[:24])
    )
    table = ops.rope_table(torch.arange(24), 8, config.rope_theta)
    q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x))).unflatten(
        -1, (config.num_attention_heads, -1)
    )
    q = ops.rope(q[:, 0, config.qk_nope_head_dim :], table)
    k = ops.rope(attention.kv_a_proj_with_mqa(x)[:, config.kv_lora_rank :], table)
    best = (q @ k.T).tril().argmax(1)
    assert (best[1:] == torch.arange(23)).all()


def test_recipes_that_cannot_run_are_named(shards: Shards, tmp_path: Path) -> None:
    stage = Stage(name="odd", tokens=64, mixture={"text": 1.0}, window=24, batch_tokens=64)
    with pytest.raises(ConfigError, match="odd"):
        Trainer(Recipe(name="t", config=tiny_config(), stages=(stage,)), shards, tmp_path, compiled=False)
    with pytest.raises(ConfigError, match="chat, text"):
        shards.bucket("poems")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\ndef recipe(:\n", "SyntaxError: invalid syntax (odd.py, line 2)"),
        ("\ndef recipe():\n    return int('x\\ny')\n", "odd.py, line 3: ValueError: invalid literal"),
        ("def recipe():\n    return 3\n", "odd.py returned int"),
        ("import nothing_of_this_name\n", "odd.py, line 1: ModuleNotFoundError: No module"),
    ],
)
def test_recipes_that_are_none_are_one_line(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a recipe's own code raised was a traceback."""
    (tmp_path / "odd.py").write_text(text)
    assert cli.main(["train", str(tmp_path / "odd.py"), "--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("glm52 train: recipe: ") and expected in error and error.count("\n") == 1
