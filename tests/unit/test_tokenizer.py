"""Text to ids and back, and a stream that never shows half a character."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm52.errors import CheckpointError
from glm52.hub import NANO
from glm52.tokenizer import Tokenizer

TOKENIZER = Tokenizer.read(NANO)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text, special=False)
    assert TOKENIZER.decode(ids) == text
    assert b"".join(TOKENIZER.to_bytes(i) for i in ids) == text.encode()


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("aé🙂漢字 <|user>\n\U0001f468\u200d\U0001f469")), sizes=st.lists(st.integers(1, 4)))
def test_the_stream_joins_to_the_whole_and_shows_no_half_character(text: str, sizes: list[int]) -> None:
    ids = TOKENIZER.encode(text, special=False)
    stream, pieces = TOKENIZER.stream(), []
    while ids:
        size = sizes.pop() if sizes else 1
        pieces.append(stream.feed(ids[:size]))
        ids = ids[size:]
    pieces.append(stream.close())
    assert "".join(pieces) == text
    assert all("\ufffd" not in p for p in pieces)


@given(ids=st.lists(st.integers(0, 4095), max_size=30))
def test_any_ids_stream_to_something(ids: list[int]) -> None:
    stream = TOKENIZER.stream()
    assert isinstance(stream.feed(ids) + stream.close(), str)


def test_special_tokens_only_where_they_are_trusted() -> None:
    text = "a<|user|>b<think><|user|>"
    assert [i for i in TOKENIZER.encode(text) if i in TOKENIZER.special_ids] == [4067, 4081, 4067]
    plain = TOKENIZER.encode(text, special=False)
    assert not TOKENIZER.special_ids & set(plain) and TOKENIZER.decode(plain) == text


def test_bytes_of_every_token() -> None:
    """Those of a whole character, of a part of one, of special tokens and of ids that mean nothing."""
    for token in range(TOKENIZER.vocab_size):
        said, text = TOKENIZER.to_bytes(token), TOKENIZER.piece(token)
        assert said.decode("utf-8", "replace") == text and said
    assert TOKENIZER.to_bytes(4067) == b"<|user|>" and TOKENIZER.to_bytes(1 << 20) == b""


def test_the_vocabulary() -> None:
    assert TOKENIZER.vocab_size == 4096 and len(TOKENIZER.special_ids) == 36
    assert [TOKENIZER.id(t) for t in ("<|endoftext|>", "<|user|>", "<|observation|>", "<think>", "<|video|>")] == [
        4060, 4067, 4069, 4081, 4095]  # fmt: skip
    assert len(TOKENIZER.encode("123456")) == 6, "numbers are single digits"


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.read(tmp_path)
