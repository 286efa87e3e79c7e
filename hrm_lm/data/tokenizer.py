"""What a tokenizer must offer, this project's own (characters, bytes), and those of the `tokenizers` library."""

import json
import os
from pathlib import Path
from typing import Any, Iterable, Protocol, Sequence

from pyarrow.fs import LocalFileSystem

from hrm_lm.errors import UserError
from hrm_lm.filesystem import resolve, without_secrets

CHARACTERS = "characters"


class Tokenizer(Protocol):
    pad_id: int
    bos_id: int
    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS or EOS."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

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
            raise UserError(
                f"character {error.args[0]!r} of {text[:60]!r} is not in the tokenizer's vocabulary"
            ) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i - self.SPECIAL] for i in map(int, ids) if i >= self.SPECIAL)

    def to_json(self) -> str:
        fields = {"type": "characters", "characters": "".join(self.characters), "unknown": self.unknown}
        return json.dumps(fields, ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")


class ByteTokenizer:
    """A token for each byte of UTF-8: no text is unknown to it."""

    pad_id, bos_id, eos_id = range(3)
    SPECIAL = 3
    vocab_size = SPECIAL + 256

    def encode(self, text: str) -> list[int]:
        return [self.SPECIAL + byte for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - self.SPECIAL for i in map(int, ids) if i >= self.SPECIAL).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"type": "bytes"})


class PretrainedTokenizer:
    """One of the `tokenizers` library, which must be installed.

    definition: what its `tokenizer.json` holds, which does not say which tokens pad, begin and end a text.
    vocab_size: the model's; it may be larger than the tokenizer's, but not smaller.
    """

    def __init__(self, definition: dict[str, Any], pad_id: int, bos_id: int, eos_id: int, vocab_size: int):
        try:
            import tokenizers
        except ImportError:
            raise UserError("this tokenizer needs the tokenizers library: pip install 'hrm-lm[tokenizers]'") from None
        self.definition = definition
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"the tokenizers library cannot read it: {error}") from None
        if self.tokenizer.get_vocab_size() > vocab_size:
            raise ValueError(f"it has {self.tokenizer.get_vocab_size()} tokens, the model {vocab_size}")
        self.pad_id, self.bos_id, self.eos_id, self.vocab_size = pad_id, bos_id, eos_id, vocab_size

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(i) for i in ids])

    def to_json(self) -> str:
        fields = {name: getattr(self, name) for name in ("pad_id", "bos_id", "eos_id", "vocab_size", "definition")}
        return json.dumps({"type": "tokenizers", **fields}, ensure_ascii=False)


def tokenizer_from_json(text: str) -> Tokenizer:
    """Raises ValueError where the text is not a tokenizer's."""
    fields = json.loads(text)
    kind = fields.pop("type", None) if isinstance(fields, dict) else None
    if kind == "characters":
        return SimpleTokenizer(**fields)
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "tokenizers":
        return PretrainedTokenizer(**fields)
    raise ValueError("not a tokenizer of a known type")


def load_tokenizer(path: str | Path) -> Tokenizer:
    try:
        return tokenizer_from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer: {error}") from None


def resolve_tokenizer(name: str) -> Tokenizer:
    """What `data.tokenizer` names: `bytes`, or a tokenizer.json, this project's (a path or URI) or a Hugging Face one."""
    if name == "bytes":
        return ByteTokenizer()
    fs, path = resolve(name)
    try:
        with fs.open_input_stream(path) as stream:
            text = stream.read().decode()
        if isinstance(fs, LocalFileSystem) and "type" not in json.loads(text):
            return pretrained_tokenizer(path)
        return tokenizer_from_json(text)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        raise UserError(f"data.tokenizer: {without_secrets(name)} cannot be read: {reason}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.tokenizer: {without_secrets(name)} is not a tokenizer: {error}") from None


SPECIAL_TOKENS = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
}


def pretrained_tokenizer(path: str | Path) -> PretrainedTokenizer:
    """A Hugging Face `tokenizer.json`; a `tokenizer_config.json` beside it, else their usual names, tell its special tokens.

    A tokenizer without BOS or padding gets EOS for those, as is usual. Raises UserError where it cannot be used.
    """
    path = Path(path)
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        config_file = path.with_name("tokenizer_config.json")
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
        ids = {token["content"]: token["id"] for token in definition["added_tokens"]}
        vocabulary = definition["model"].get("vocab")
        ids = (vocabulary if isinstance(vocabulary, dict) else {}) | ids
        special = {}
        for role, usual in SPECIAL_TOKENS.items():
            named = config.get(f"{role}_token")
            named = named["content"] if isinstance(named, dict) else named
            special[role] = next((ids[name] for name in (named, *usual) if name in ids), None)
        if special["eos"] is None:
            raise UserError(
                f"{path}: has no end-of-text token: none of {', '.join(SPECIAL_TOKENS['eos'])}, nor one named in {config_file.name}"
            )
        special = {f"{role}_id": special["eos"] if i is None else i for role, i in special.items()}
        size = max(max(ids.values()) + 1, len(vocabulary or ()))  # a Unigram vocabulary is a list
        return PretrainedTokenizer(definition, **special, vocab_size=size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a Hugging Face tokenizer.json: {error!r}") from None


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    return a.to_json() == b.to_json()
