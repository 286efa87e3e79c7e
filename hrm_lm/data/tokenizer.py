"""What a tokenizer must offer, and the one of this project: characters."""

import json
from pathlib import Path
from typing import Iterable, Protocol, Sequence

from hrm_lm.errors import UserError


class Tokenizer(Protocol):
    pad_id: int
    bos_id: int
    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS or EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens leave none."""

    def to_json(self) -> str: ...


class SimpleTokenizer:
    """A token for each character that was in the text it was built from.

    An unknown character raises UserError, or becomes `unk_id` where `unknown="id"`.
    """

    pad_id, bos_id, eos_id, unk_id = range(4)
    SPECIAL = 4

    def __init__(self, characters: Iterable[str], unknown: str = "error"):
        if unknown not in ("error", "id"):
            raise ValueError(f"unknown must be 'error' or 'id', not {unknown!r}")
        self.characters = sorted(set(characters))
        self.unknown = unknown
        self.vocab_size = self.SPECIAL + len(self.characters)
        self._ids = {character: i for i, character in enumerate(self.characters, start=self.SPECIAL)}

    @classmethod
    def from_texts(cls, texts: Iterable[str], unknown: str = "error") -> "SimpleTokenizer":
        return cls(set().union(*texts), unknown)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            if self.unknown == "id":
                return [self._ids.get(character, self.unk_id) for character in text]
            raise UserError(f"character {error.args[0]!r} of {text[:60]!r} is not in the tokenizer's vocabulary") from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i - self.SPECIAL] for i in map(int, ids) if i >= self.SPECIAL)

    def to_json(self) -> str:
        fields = {"type": "characters", "characters": "".join(self.characters), "unknown": self.unknown}
        return json.dumps(fields, ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")


def tokenizer_from_json(text: str) -> Tokenizer:
    """Raises ValueError where the text is not a tokenizer's."""
    fields = json.loads(text)
    if not isinstance(fields, dict) or fields.get("type") != "characters":
        raise ValueError("not a tokenizer of a known type")
    return SimpleTokenizer(fields["characters"], fields["unknown"])


def load_tokenizer(path: str | Path) -> Tokenizer:
    try:
        return tokenizer_from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer: {error}") from None


def encode_pair(tokenizer: Tokenizer, prompt: str, response: str) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """A sample: prompt, BOS + response, response + EOS."""
    target = tokenizer.encode(response) + [tokenizer.eos_id]
    return tokenizer.encode(prompt), [tokenizer.bos_id, *target[:-1]], target
