"""Text to token ids and back, from a folder's tokenizer.json; and a detokenizer for streams. No torch.

Byte-level BPE itself is the ``tokenizers`` library's. Special tokens become ids only where the caller says the text is
trusted: what a user typed never opens a turn.
"""

from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend

from glm52.errors import CheckpointError

_REPLACEMENT = "�"

# Byte-level BPE writes printable bytes as themselves and the others as characters from 256 on. Source: GPT-2's encoder.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


class Tokenizer:
    """A tokenizer.json in use. Ids are those of the checkpoint."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._plain: Backend | None = None

    @staticmethod
    def read(folder: Path) -> "Tokenizer":
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: expected a tokenizer.json, found none; copy it from the model's repository"
            )
        try:
            return Tokenizer(Backend.from_file(str(file)))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: not a tokenizer this library reads ({error})") from error

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        return tuple(str(t.content) for t in self._backend.get_added_tokens_decoder().values())

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size())

    def to_json(self) -> str:
        """The tokenizer.json, for libraries that read one."""
        return str(self._backend.to_str())

    def id(self, token: str) -> int | None:
        """The id of one token's exact string."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; with ``special`` False the strings of special tokens are ordinary text."""
        if special:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return [
            i for part in self._around_special(text) for i in self._backend.encode(part, add_special_tokens=False).ids
        ]

    def _around_special(self, text: str) -> list[str]:
        """The text cut inside every special-token string, so that no piece holds a whole one."""
        cuts = (
            sorted(
                start + 1
                for token in self.special_tokens
                for start in range(len(text))
                if text.startswith(token, start)
            )
            if any(token in text for token in self.special_tokens)
            else []
        )
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if a < b]

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=skip_special))

    @cached_property
    def piece(self) -> Callable[[int], str]:
        """The text of a token by itself; kept, for replies ask for the same few again and again."""
        return cache(lambda token: self.decode([token]))

    def to_bytes(self, token: int) -> bytes:
        """A token's own bytes, which may be a part of a character."""
        name = "" if token in self.special_ids else self._backend.id_to_token(token) or ""
        codes = [_BYTE_OF.get(c) for c in name]
        return self.piece(token).encode() if not codes or None in codes else bytes(codes)  # type: ignore[arg-type]

    def stream(self) -> "Detokenizer":
        return Detokenizer(self)


class Detokenizer:
    """Ids in, text out, never half a character: the pieces joined equal ``decode`` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def feed(self, ids: list[int]) -> str:
        out = []
        for token in ids:
            self._pending.append(token)
            text = self._tokenizer.piece(token) if len(self._pending) == 1 else self._tokenizer.decode(self._pending)
            # A byte-level token may end inside a character; four bytes later it is complete or never will be.
            if not text.endswith(_REPLACEMENT) or len(self._pending) > 8:
                out.append(text)
                self._pending.clear()
        return "".join(out)

    def close(self) -> str:
        text = self._tokenizer.decode(self._pending) if self._pending else ""
        self._pending.clear()
        return text
