"""Pages that went to disk and came back: the same bits as computed ones, in every body and format."""

import errno
import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from glm52 import ops
from glm52.engine import Engine, SamplingParams, generate
from glm52.engine.store import Store
from glm52.errors import RequestError
from glm52.native import NativeGLM
from tests.fixtures import random_model, tiny_config

SIZE = 16
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
RNG = random.Random(0)
STEM = [RNG.randrange(1, 61) for _ in range(70)]
NATIVE = (("f32", "auto"), ("bf16", "auto"), ("f32", "fp8")) if ops.backend() != "reference" else ()


@pytest.fixture(scope="module", params=[("reference", "auto"), ("reference", "fp8"), *NATIVE], ids=" ".join)
def model(request: pytest.FixtureRequest) -> Any:
    """Weights and cache."""
    fmt, cache = request.param
    made = random_model(tiny_config())
    made.cache_format = cache
    return made if fmt == "reference" else NativeGLM(made, fmt, threads=1)


@pytest.fixture(scope="module")
def plain() -> Any:
    """The quickest there is."""
    made = random_model(tiny_config())
    return NativeGLM(made, "f32", threads=1) if NATIVE else made


def engine(model: Any, folder: Path | None, *, fingerprint: str = "x", max_bytes: int = 10**8) -> Engine:
    made = Engine(model, num_rows=240, page_size=SIZE, max_batch_tokens=24, max_seqs=4, num_drafts=2)
    if folder is not None:
        made.store = Store(folder, made.cache.pools(), SIZE, fingerprint=fingerprint, max_bytes=max_bytes)
    return made


def run(made: Engine, *prompts: list[int]) -> list[list[int]]:
    """Output of each prompt; what is to be kept is then on disk."""
    out = [seq.output for seq in generate(made, list(prompts), GREEDY)]
    made.check()
    if made.store is not None:
        made.store.close()
    return out


def page_bytes(made: Engine, tokens: list[int]) -> list[torch.Tensor]:
    """Of the full pages of a prefix, every pool's rows."""
    pages = made.pages.match(tokens)
    made.pages.release(pages)
    assert len(pages) == (len(tokens) - 1) // SIZE
    return [pool[p * SIZE : (p + 1) * SIZE].clone() for p in pages for pool in made.cache.pools()]


def test_restored_pages_equal_computed_ones(model: Any, tmp_path: Path) -> None:
    """Rows, index keys and the MTP layer's rows, bit for bit; and what follows from them."""
    first, fresh = engine(model, tmp_path), engine(model, None)
    expected = run(first, STEM)
    second = engine(model, tmp_path)
    seqs = generate(second, [STEM], GREEDY)
    assert seqs[0].output == expected[0] == run(fresh, STEM)[0]
    assert seqs[0].num_cached_tokens == len(STEM) // SIZE * SIZE and second.stats.prompt_tokens == len(STEM)
    restored = page_bytes(second, STEM)
    for other in (first, fresh):
        assert all(torch.equal(a, b) for a, b in zip(restored, page_bytes(other, STEM), strict=True))
    assert all(t.any() for t in restored), "no pool is empty"


def test_other_weights_tokens_or_formats_share_nothing(plain: Any, tmp_path: Path) -> None:
    run(engine(plain, tmp_path), STEM)
    half = random_model(tiny_config(), dtype=torch.bfloat16)
    half = NativeGLM(half, "bf16", threads=1) if NATIVE else half
    changed = [STEM[0] + 1, *STEM[1:]]
    for other, prompt in ((engine(plain, tmp_path, fingerprint="y"), STEM), (engine(half, tmp_path), STEM),
                          (engine(plain, tmp_path), changed)):  # fmt: skip
        assert generate(other, [prompt], GREEDY)[0].num_cached_tokens == 0


@pytest.mark.parametrize("fault", ["flipped", "truncated", "longer", "empty", "gone", "another page", "huge"])
def test_a_spoilt_file_is_ignored_with_one_warning(
    plain: Any, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(engine(plain, tmp_path), STEM)
    files = sorted(tmp_path.iterdir())
    whole = [f.read_bytes() for f in files]
    made = engine(plain, tmp_path)
    for i, (file, data) in enumerate(zip(files, whole, strict=True)):
        at = RNG.randrange(len(data))
        spoilt = {"flipped": data[:at] + bytes([data[at] ^ 1 << RNG.randrange(8)]) + data[at + 1 :], "empty": b"",
                  "truncated": data[:at], "longer": data + b"\0", "another page": whole[i - 1]}  # fmt: skip
        if fault == "gone":
            file.unlink()
        elif fault == "huge":
            os.truncate(file, 1 << 40)
        else:
            file.write_bytes(spoilt[fault])
    with caplog.at_level(logging.DEBUG, "glm52"):
        assert run(made, STEM) == expected
    assert len(caplog.records) == (fault != "gone"), caplog.text
    assert made.store is not None
    first = tmp_path / made.store.name(STEM, [])[0]
    assert first.read_bytes() == dict(zip(files, whole, strict=True))[first], "it is written anew"


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_no_page(plain: Any, tmp_path: Path, kind: str) -> None:
    """A folder that could not be thrown away like a file stopped the engine; a pipe held it up for ever."""
    expected = run(engine(plain, tmp_path), STEM)
    made = engine(plain, tmp_path)
    for path in list(tmp_path.iterdir()):
        path.unlink()
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    assert run(made, STEM) == expected


def test_the_folder_stays_within_its_bound(plain: Any, tmp_path: Path) -> None:
    """What was used longest ago goes first, and of a prefix its end; files of others are left alone."""
    (tmp_path / "notes.txt").write_text("mine")
    probe = engine(plain, tmp_path)
    run(probe, STEM)
    size = max(f.stat().st_size for f in tmp_path.iterdir())
    other = [token % 60 + 1 for token in STEM]
    run(engine(plain, tmp_path, max_bytes=7 * size), other)
    assert len(list(tmp_path.iterdir())) == 1 + 7
    for prompt, pages in ((other, 4), (STEM, 3)):
        made = engine(plain, None)
        made.store = Store(tmp_path, made.cache.pools(), SIZE, fingerprint="x", max_bytes=7 * size)
        assert generate(made, [prompt], SamplingParams(max_tokens=1))[0].num_cached_tokens == pages * SIZE
    run(engine(plain, tmp_path, max_bytes=3 * size, fingerprint="z"), STEM)
    made = engine(plain, tmp_path, fingerprint="z")
    assert generate(made, [STEM], GREEDY)[0].num_cached_tokens == 3 * SIZE, "a prefix keeps its beginning"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_step_restores_no_longer_than_it_may(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest comes in later steps, while others go on; many sequences in few pages still end."""
    expected = run(engine(plain, tmp_path), STEM)
    made, fresh = engine(plain, tmp_path), engine(plain, None)
    prompts = [STEM[:n] for n in (70, 33, 64, 50, 17, 69, 70)]
    monkeypatch.setattr("glm52.engine.engine._RESTORE_S", 0.0)
    assert run(made, *prompts) == run(fresh, *prompts)
    assert run(engine(plain, tmp_path), STEM) == expected
    monkeypatch.setattr("glm52.engine.engine._RESTORE_S", 1e-9)
    seqs = generate(engine(plain, tmp_path), [STEM], GREEDY)
    assert seqs[0].output == expected[0]


def test_a_full_disk_stops_the_writing_only(plain: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, fresh = engine(plain, tmp_path / "a"), engine(plain, None)
    (tmp_path / "a").rename(tmp_path / "b")
    with caplog.at_level(logging.WARNING, "glm52"):
        assert run(made, STEM) == run(fresh, STEM)
    assert "no more pages are written" in caplog.text


def test_a_smaller_bound_holds_from_the_start(plain: Any, tmp_path: Path) -> None:
    run(engine(plain, tmp_path), STEM)
    size = max(f.stat().st_size for f in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 4
    made = engine(plain, tmp_path, max_bytes=2 * size)
    assert len(list(tmp_path.iterdir())) == 2
    assert generate(made, [STEM], GREEDY)[0].num_cached_tokens == 2 * SIZE


def test_a_folder_in_the_way_of_a_page_stops_no_other(plain: Any, tmp_path: Path) -> None:
    """Neither where it should be written nor where it would be thrown away."""
    made = engine(plain, tmp_path)
    assert made.store is not None
    names = made.store.name(STEM, [])
    (tmp_path / names[0]).mkdir()
    run(made, STEM)
    size = (tmp_path / names[1]).stat().st_size
    assert {f.name for f in tmp_path.iterdir()} == set(names), "nor is anything left unfinished"
    run(engine(plain, tmp_path, max_bytes=3 * size), [token % 60 + 1 for token in STEM])
    assert len(list(tmp_path.iterdir())) == 1 + 3 and (tmp_path / names[0]).is_dir()


def test_on_a_full_disk_older_pages_make_room(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace = Path.replace

    def checked(self: Path, target: Path) -> Path:
        if len(list(tmp_path.iterdir())) > 5:  # with the one that is being written
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", checked)
    other = [token % 60 + 1 for token in STEM]
    for prompt in (STEM, other):
        made = engine(plain, tmp_path)
        run(made, prompt)
        assert len(list(tmp_path.iterdir())) <= 5
    assert "older pages make room" in caplog.text and "no more pages" not in caplog.text
    assert generate(engine(plain, tmp_path), [other], GREEDY)[0].num_cached_tokens == 4 * SIZE


def test_servers_that_share_a_folder_share_no_unfinished_file(plain: Any, tmp_path: Path) -> None:
    """In containers their process ids are the same."""
    pages = torch.zeros(SIZE, 4, dtype=torch.uint8)
    stores = [Store(tmp_path, [pages], SIZE, fingerprint="x", max_bytes=10**6) for _ in range(8)]
    for tokens in (STEM[i : i + SIZE] for i in range(40)):
        for store in stores:
            store.save(store.name(tokens, []), [0])
    for store in stores:
        store.close()
    assert not any(store._is_broken for store in stores) and len(list(tmp_path.iterdir())) == 40


def test_a_folder_that_cannot_be_used_is_refused(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="--prefix-cache: cannot use"):
        engine(plain, tmp_path / "file")
    with pytest.raises(RequestError, match="--prefix-cache-size: a page is"):
        engine(plain, tmp_path, max_bytes=100)
