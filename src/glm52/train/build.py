"""``glm52 data``: a tokenizer and token shards from local packages and our own generators.

Natural text makes the buckets code, prose and multilingual; generated conversations make chat_code, chat_maths,
chat_general, for long contexts chat_long, for quoting the prompt chat_copy, for fields and calls chat_skills, for many
questions about one text chat_recall and, up to a thousand tokens, chat_mid. Random tokens make induction (repeated) and
pairs (looked up by key).
Each natural bucket has a held-out twin ``.test``. Everything is a function of the seed and of what is installed; the
manifest records both.
"""

import argparse
import json
import logging
import platform
import random
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from glm52 import tasks
from glm52.chat import ChatTemplate, Thinking
from glm52.errors import ConfigError
from glm52.hub import NANO, resolve
from glm52.options import integer, number, some_path
from glm52.shards import MANIFEST, read_manifest, write_bucket
from glm52.tasks.base import Bucket, Example
from glm52.tasks.recall import KeyValue, Needle
from glm52.tokenizer import Tokenizer
from glm52.train.corpus import SOURCES, Corpus

logger = logging.getLogger(__name__)

NATURAL = ("code", "prose", "multilingual")
# Of the tokens asked for; together more than all of them, because a stage may want much of one.
CHAT_SHARES = {"chat_code": 0.16, "chat_maths": 0.2, "chat_general": 0.18, "chat_long": 0.14, "chat_copy": 0.09,
               "chat_skills": 0.25, "chat_recall": 0.12, "chat_mid": 0.09}  # fmt: skip

# Names and order of GLM's special tokens; they stand at the end of the vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
    "<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>",
)  # fmt: skip
# GLM's pre-tokenizer with one change: numbers are split into single digits.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="write token shards")
    build.add_argument("--tokens", type=number(1, 1e12), default=22e6, help="tokens to aim at (default: 22e6)")
    build.add_argument("--model", help="folder with tokenizer.json and chat template, or hub name "
                       "(default: the small model that is shipped)")  # fmt: skip
    build.add_argument("--only", type=_buckets, default=None, help="comma-separated buckets to build again")
    train = actions.add_parser("tokenizer", help="train the byte-level BPE tokenizer")
    train.add_argument("--vocab-size", type=integer(256 + len(SPECIAL_TOKENS), 1 << 16), default=4096)
    for action in (build, train):
        action.add_argument("--out", type=some_path, required=True, help="folder to write")
        action.add_argument("--sources", type=some_path, action="append", default=[],
                            help="folder of unpacked packages")  # fmt: skip
        action.add_argument("--seed", type=int, default=0)


def _buckets(text: str) -> list[str]:
    names = text.split(",")
    known = (*NATURAL, "induction", "pairs", *CHAT_SHARES)
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {unknown!r}")
    return names


def run(args: argparse.Namespace) -> int:
    folder = _folder(args.model) if args.action == "build" else None
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(args.sources, args.seed)
    if folder is None:
        train_tokenizer(args.out, corpus, args.vocab_size, args.seed)
    else:
        build_shards(args.out, corpus, folder, int(args.tokens), args.only, args.seed)
    return 0


def _folder(model: str | None) -> Path:
    """A model by its name, or any folder: what ``glm52 data tokenizer`` writes has no config.json."""
    is_folder = model not in (None, "", "nano") and Path(str(model)).is_dir()
    return Path(str(model)) if is_folder else resolve(model, weights=False)


def train_tokenizer(out: Path, corpus: Corpus, vocab_size: int, seed: int, sample_chars: int = 16_000_000) -> None:
    """Write tokenizer.json: a third code, a fifth prose, a fifth other languages, the rest rendered conversations."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    template = ChatTemplate.read(NANO)
    backend = Backend(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()

    def texts() -> Iterator[str]:
        for bucket, share in (("code", 0.3), ("prose", 0.2), ("multilingual", 0.25)):
            room = int(share * sample_chars)
            documents = [d.text[:8000] for d in corpus.documents(bucket)]
            random.Random(seed).shuffle(documents)
            for text in documents:
                yield text
                room -= len(text)
                if room < 0:
                    break
        rng, room = random.Random(seed), int(0.25 * sample_chars)
        while room > 0:
            text = _plain(template, tasks.draw(rng, "train"))
            room -= len(text)
            yield text

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=16, show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts(), trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    if backend.get_vocab_size() != vocab_size:
        raise ConfigError(f"--vocab-size: expected {vocab_size} entries, found {backend.get_vocab_size()}; add sources")
    backend.save(str(out / "tokenizer.json"))


def _plain(template: ChatTemplate, example: Example) -> str:
    """A conversation as text with its special tokens turned to line breaks: what the merges should be learned from."""
    text = template.render(
        [*example.messages, *example.target], example.tools, example.thinking, add_generation_prompt=False
    )
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\n")
    return text


def build_shards(out: Path, corpus: Corpus, model: Path, tokens: int, only: list[str] | None, seed: int) -> None:
    """Write every bucket and the manifest; see ``CHAT_SHARES`` for the size of the generated ones."""
    tokenizer, template = Tokenizer.read(model), ChatTemplate.read(model)
    if tokenizer.vocab_size > 1 << 16:
        raise ConfigError(f"--model: expected a tokenizer of at most 65,536 tokens, since shards hold 16 bits of each; "
                          f"found {tokenizer.vocab_size:,} in {model}")  # fmt: skip
    path = out / MANIFEST
    manifest: dict[str, Any] = read_manifest(out) if path.exists() else {"buckets": {}}
    natural = [bucket for bucket in NATURAL if only is None or bucket in only]
    for bucket in natural:
        documents = list(corpus.documents(bucket))
        for name, is_test in ((bucket, False), (f"{bucket}.test", True)):
            texts = [d.text for d in documents if d.is_test == is_test]
            random.Random(seed).shuffle(texts)
            manifest["buckets"][name] = write_bucket(out, name, _tokenized(tokenizer, texts, bucket, seed))
    if only is None or "induction" in only:
        manifest["buckets"]["induction"] = write_bucket(out, "induction", repetitions(tokens // 16, seed))
    if only is None or "pairs" in only:
        manifest["buckets"]["pairs"] = write_bucket(out, "pairs", looked_up_pairs(tokens // 16, seed))
    for name, share in CHAT_SHARES.items():
        if only is None or name in only:
            room = int(tokens * share)
            manifest["buckets"][name] = write_bucket(out, name, conversations(tokenizer, template, name, room, seed))
    manifest |= {
        "seed": seed,
        "python": platform.python_version(),
        "versions": {s.module: version(s.module) for s in SOURCES if s.module and s.module != "stdlib"},
    }
    manifest["sources"] = [s for s in manifest.get("sources", ()) if s["bucket"] not in natural] + [
        {"name": s.name, "bucket": s.bucket, "licence": s.licence, "documents": corpus.counts[s.name],
         "characters": corpus.taken[s.name]} for s in SOURCES if s.bucket in natural
    ]  # fmt: skip
    path.write_text(json.dumps(manifest, indent=1))


def _tokenized(tokenizer: Tokenizer, texts: list[str], bucket: str, seed: int) -> Iterator[tuple[list[int], None]]:
    """Documents as ids, ended by <|endoftext|>; a fifth of the code with its middle moved to the end."""
    end = tokenizer.id("<|endoftext|>")
    assert end is not None
    rng = random.Random(f"{seed}:{bucket}")
    for text in tqdm(texts, desc=bucket, unit="doc"):
        ids = tokenizer.encode(text, special=False)
        if bucket == "code" and rng.random() < 0.2:
            a, b = sorted(rng.randrange(len(ids) + 1) for _ in range(2))
            prefix, middle, suffix = (tokenizer.id(f"<|code_{p}|>") for p in ("prefix", "middle", "suffix"))
            ids = [prefix, *ids[:a], suffix, *ids[b:], middle, *ids[a:b]]  # type: ignore[list-item]
        yield [*ids, end], None


def conversations(
    tokenizer: Tokenizer, template: ChatTemplate, name: str, tokens: int, seed: int
) -> Iterator[tuple[list[int], list[bool]]]:
    """Rendered training conversations of a bucket until ``tokens`` are reached; a third hold several turns."""
    rng = random.Random(f"{seed}:{name}")
    with tqdm(total=tokens, desc=name, unit="tok", unit_scale=True) as bar:
        while bar.n < tokens:
            messages, tools, thinking = _conversation(rng, name)
            ids, mask = template.render_training(tokenizer, messages, tools, thinking)
            bar.update(len(ids))
            yield ids, mask


def repetitions(tokens: int, seed: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Random tokens two to four times over: what induction heads are made of. The first time is not supervised."""
    rng, total = random.Random(f"{seed}:induction"), 0
    while total < tokens:
        part = [rng.randrange(4000) for _ in range(rng.randint(6, 60))]
        times = rng.randint(2, 4)
        total += times * len(part)
        yield part * times, [i >= len(part) for i in range(times * len(part))]


def looked_up_pairs(tokens: int, seed: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Keys with values, then the keys again in another order: many look-ups in every document, as text has few.

    Keys and values are one to three tokens from an alphabet that may be as small as ten, so that a key must be matched
    as a whole. Supervised: the second time a value appears. Source: Arora et al., Zoology (arXiv 2312.04927).
    """
    rng, total = random.Random(f"{seed}:pairs"), 0
    while total < tokens:
        alphabet = rng.sample(range(4000), rng.choice((10, 40, 1000)))
        size = rng.randint(2, 3) if len(alphabet) == 10 else rng.randint(1, 3)
        between, after = rng.sample(range(4000), 2)
        keys = {tuple(rng.choices(alphabet, k=size)) for _ in range(rng.randint(3, 30))}
        pairs = [(list(k), rng.choices(alphabet, k=rng.randint(1, 3))) for k in sorted(keys)]
        ids: list[int] = []
        mask: list[bool] = []
        for is_asked in (False, True):
            rng.shuffle(pairs)
            for key, value in pairs:
                ids += [*key, between, *value, after]
                mask += [False] * (len(key) + 1) + [is_asked] * (len(value) + 1)
        total += len(ids)
        yield ids, mask


# Task, level and most questions of the buckets that look things up.
_RECALL = {
    "chat_recall": (("key_value", 1, 4), ("key_value", 2, 8), ("key_value", 3, 10), ("needle", 0, 4), ("needle", 1, 6)),
    "chat_mid": (("key_value", 4, 16), ("needle", 2, 8), ("needle", 2, 8)),
    "chat_long": (("needle", 3, 10), ("needle", 4, 12), ("needle", 5, 14), ("needle", 5, 14)),
}


def _conversation(rng: random.Random, name: str) -> tuple[list[Any], list[Any] | None, Thinking]:
    if name in _RECALL:
        task, level, asks = rng.choice(_RECALL[name])
        example = (Needle() if task == "needle" else KeyValue()).generate(
            rng, split="train", level=level, asks=rng.randint(1, asks)
        )
    elif name == "chat_skills":
        task = rng.choices(("json", "tool_call", "passage", "table", "copy"), weights=(8, 8, 2, 1, 2))[0]
        example = tasks.TASKS[task].generate(rng, split="train")
    elif name == "chat_copy":
        task = rng.choices(("copy", "key_value", "reverse", "json", "passage"), weights=(8, 2, 2, 3, 2))[0]
        copied_level = rng.randrange(2) if task == "key_value" else None
        example = tasks.TASKS[task].generate(rng, split="train", level=copied_level)
    else:
        bucket = next(b for b in get_args(Bucket) if name == f"chat_{b}")
        example = tasks.draw(rng, "train", bucket)
    messages, thinking = [*example.messages, *example.target], example.thinking
    if rng.random() < 0.1:
        messages.insert(0, {"role": "system", "content": rng.choice(_SYSTEM)})
    if example.tools is None and name in ("chat_code", "chat_maths", "chat_general") and rng.random() < 0.33:
        thinking = Thinking(enabled=thinking.enabled, effort=thinking.effort, clear=False)
        for _ in range(rng.randint(1, 2)):
            more = tasks.draw(rng, "train", rng.choice(("maths", "general")))
            while more.tools is not None:
                more = tasks.draw(rng, "train", "maths")
            if more.thinking.enabled == thinking.enabled:
                messages += [*more.messages, *more.target]
    return messages, example.tools, thinking


_SYSTEM = (
    "You are a helpful assistant.", "Be brief.", "Answer the user.", "You are nano, a small demo model.",
    "You are a careful assistant. Answer with the result only.", "Help the user with short answers.",
)  # fmt: skip
