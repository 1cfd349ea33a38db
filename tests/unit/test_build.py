"""Building shards again in part, and manifests that cannot be built on."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm52 import cli
from glm52.errors import ConfigError
from glm52.hub import NANO
from glm52.shards import Shards
from glm52.train.build import build_shards
from glm52.train.corpus import Corpus, Document


class Found(Corpus):
    """Two documents of every bucket, from one source each."""

    def documents(self, bucket: str) -> Iterator[Document]:
        name = {"code": "cpython", "prose": "sotu", "multilingual": "chinese-poetry"}[bucket]
        for is_test in (False, True):
            self.counts[name] += 1
            yield Document(name, f"words of {bucket}", is_test)


def test_what_is_not_built_again_stays_in_the_manifest(tmp_path: Path) -> None:
    """Sources of the other buckets were said to have given no document."""
    counted = []
    for only in (["code", "prose"], ["prose"], ["pairs"]):
        build_shards(tmp_path, Found([]), NANO, 1000, only, 0)
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        counted.append(Counter({s["bucket"]: s["documents"] for s in manifest["sources"] if s["documents"]}))
    assert counted == [{"code": 2, "prose": 2}] * 3
    assert set(manifest["buckets"]) == {"code", "code.test", "prose", "prose.test", "pairs"}


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"buckets": 5}', "[" * 100_000])
def test_damaged_manifests_are_named(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert cli.main(["data", "build", "--out", str(tmp_path), "--only", "pairs", "--tokens", "1000"]) == 2
    assert "manifest.json: " in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"manifest\.json: "):
        Shards(tmp_path)
