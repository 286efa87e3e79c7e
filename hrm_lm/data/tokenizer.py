"""What a tokenizer must offer, this project's own (characters, bytes), and those of the `tokenizers` library.

`resolve_tokenizer` is the one way from a name that a user gave to a tokenizer. A model's vocabulary may be larger than
its tokenizer's, as published models' often are: `model_vocab_size` says how many rows the model has, and `same_tokens`
compares two tokenizers by how they read text.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import pyarrow.fs

from hrm_lm.config import MOST_TOKENS, ModelConfig
from hrm_lm.errors import UserError
from hrm_lm.filesystem import read_text, resolve, storage_error, without_secrets
from hrm_lm.parsing import one_line, parse_json, short

BYTES, CHARACTERS = "bytes", "characters"
"""Names of tokenizers that need no file. CHARACTERS is made of a corpus: the characters that occur in it."""


class Tokenizer(Protocol):
    pad_id: int
    bos_id: int
    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS or EOS."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Special tokens leave no text, nor do ids beyond the vocabulary, which a larger `model.vocab_size`
        allows."""

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
        characters: set[str] = set()
        for text in texts:  # there may be many
            characters.update(text)
        return cls(characters, unknown)

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
        ids = (i - self.SPECIAL for i in map(int, ids))
        return "".join(self.characters[i] for i in ids if 0 <= i < len(self.characters))

    def to_json(self) -> str:
        fields = {"type": "characters", "characters": "".join(self.characters), "unknown": self.unknown}
        return json.dumps(fields, ensure_ascii=False)


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
        ids = (i - self.SPECIAL for i in map(int, ids))
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"type": "bytes"})


class PretrainedTokenizer:
    """A tokenizer of the `tokenizers` library, which must be installed.

    definition: what its `tokenizer.json` holds. The definition does not say which tokens pad, begin and end a text.
    Truncation and padding that it stores are taken out: they would cut texts and put padding into samples.
    chat_template: how conversations are written, in Jinja (`hrm_lm.data.chat`); None for the plain form.
    vocab_size: more than every id. Checkpoints imported by older versions have the model's here, which is larger than
    the tokenizer needs. Raises ValueError where the definition cannot be read or has ids beyond `vocab_size`.
    """

    def __init__(
        self,
        definition: dict[str, Any],
        pad_id: int,
        bos_id: int,
        eos_id: int,
        vocab_size: int,
        chat_template: str | None = None,
    ):
        try:
            import tokenizers
        except ImportError:
            raise UserError("this tokenizer needs the tokenizers library: pip install 'hrm-lm[tokenizers]'") from None
        self.definition = definition | {key: None for key in ("truncation", "padding") if key in definition}
        with _library_errors("the tokenizers library cannot read it", ValueError):
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self.definition))
        if not isinstance(chat_template, str | None):
            raise ValueError(f"its chat_template is {type(chat_template).__name__}, not a text")
        numbers = {"vocab_size": vocab_size, "pad_id": pad_id, "bos_id": bos_id, "eos_id": eos_id}
        if strange := [name for name, number in numbers.items() if type(number) is not int or number < 0]:
            raise ValueError(f"its {strange[0]} is {short(numbers[strange[0]])}")
        largest = max(pad_id, bos_id, eos_id, *self.tokenizer.get_vocab().values())
        if not largest < vocab_size <= MOST_TOKENS:
            raise ValueError(f"it has ids up to {largest}, its vocab_size says {vocab_size} (at most {MOST_TOKENS:,})")
        self.pad_id, self.bos_id, self.eos_id, self.vocab_size = pad_id, bos_id, eos_id, vocab_size
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        with _library_errors(f"the tokenizer cannot read {text[:60]!r}"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            with _library_errors("the tokenizer cannot read one of the texts"):
                return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except UserError:
            for text in texts:
                self.encode(text)  # tells which it is
            raise

    def decode(self, ids: Iterable[int]) -> str:
        with _library_errors("the tokenizer cannot make a text of its tokens"):
            return self.tokenizer.decode([int(i) for i in ids])

    def to_json(self) -> str:
        fields = {name: getattr(self, name) for name in ("pad_id", "bos_id", "eos_id", "vocab_size", "definition")}
        if self.chat_template is not None:  # earlier versions read a file without it
            fields["chat_template"] = self.chat_template
        return json.dumps({"type": "tokenizers", **fields}, ensure_ascii=False)


@contextmanager
def _library_errors(what: str, kind: type[Exception] = UserError) -> Iterator[None]:
    """What the `tokenizers` library raises becomes an error of this kind. A text without an unknown token is an Exception
    there, and a definition that it does not expect may be a panic, which is none.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {one_line(error)}") from None


def tokenizer_from_json(text: str) -> Tokenizer:
    """Raises ValueError where the text is not a tokenizer's."""
    fields = parse_json(text)
    kind = fields.pop("type", None) if isinstance(fields, dict) else None
    if kind == "bytes":
        return ByteTokenizer()
    try:
        if kind == "characters":
            fields["characters"].encode()  # a text, and no half characters in it
            return SimpleTokenizer(**fields)
        if kind == "tokenizers":
            return PretrainedTokenizer(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(one_line(error)) from None
    raise ValueError("not a tokenizer of a known type")


SPECIAL_TOKENS = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
}
"""The usual names of special tokens, by role."""


def resolve_tokenizer(name: str, flag: str = "data.tokenizer", special_ids: Mapping[str, int] = {}) -> Tokenizer:
    """The tokenizer that a user named: `bytes`, or a file, a folder that holds tokenizer.json, or a URI of either.

    The file is this project's (a checkpoint and a prepared dataset hold it) or Hugging Face's. A Hugging Face file may
    have a tokenizer_config.json beside it, which names its special tokens, and its chat template there or in
    chat_template.jinja.
    flag: the option that `name` was given for; messages begin with it.
    special_ids: ids that the caller knows of a Hugging Face tokenizer's special tokens, by role ("pad", "bos", "eos").
    Raises UserError where nothing usable is there, and for `characters`, which only a caller with a corpus can make.
    """
    if name == BYTES:
        return ByteTokenizer()
    if name == CHARACTERS:
        raise UserError(f"{flag}: {CHARACTERS} needs a text to take them from; here, give {BYTES} or a tokenizer.json")
    shown = without_secrets(name)
    try:
        fs, path = resolve(name)
        if fs.get_file_info(path).type == pyarrow.fs.FileType.Directory:
            path, shown = f"{path}/tokenizer.json", f"{shown.rstrip('/')}/tokenizer.json"
        text = read_text(fs, path)
        fields = parse_json(text)
        if not isinstance(fields, dict) or "type" in fields:
            return tokenizer_from_json(text)
        beside = {}
        for name in ("tokenizer_config.json", "chat_template.jinja"):
            with suppress(FileNotFoundError):
                beside[name] = read_text(fs, f"{path.rpartition('/')[0]}/{name}")
        names = parse_json(beside.get("tokenizer_config.json", "{}"))
        template = beside.get("chat_template.jinja", names.get("chat_template"))
        if isinstance(template, list):  # several, by name
            template = next((each["template"] for each in template if each["name"] == "default"), None)
        return hugging_face_tokenizer(fields, names, special_ids, template)
    except UserError as error:
        raise type(error)(f"{flag}: {error}") from None
    except OSError as error:
        raise storage_error(f"{flag}: {shown} cannot be read", error) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{flag}: {shown} is not a usable tokenizer: {one_line(error)}") from None


def hugging_face_tokenizer(
    definition: dict[str, Any],
    names: dict[str, Any],
    special_ids: Mapping[str, int],
    chat_template: str | None = None,
) -> PretrainedTokenizer:
    """The tokenizer that a Hugging Face tokenizer.json defines.

    A special token is the token that `special_ids` has, else the token that `names` (what tokenizer_config.json holds)
    names, else the token with a usual name. A tokenizer without BOS or padding gets EOS in their place, as is usual.
    Raises ValueError where there is no EOS; ValueError, KeyError, TypeError or AttributeError where it is another file.
    """
    if not isinstance(definition.get("model"), dict):
        raise ValueError("neither this project's tokenizer.json nor a Hugging Face one")
    vocabulary = definition["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: each token with its score, in the order of their ids
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    ids = vocabulary | {token["content"]: token["id"] for token in definition.get("added_tokens", [])}
    special: dict[str, int] = {}
    for role, usual in SPECIAL_TOKENS.items():
        named = names.get(f"{role}_token")
        named = named["content"] if isinstance(named, dict) else named
        known = [special_ids[role]] if role in special_ids else [ids[t] for t in (named, *usual) if t in ids]
        special |= {role: known[0]} if known else {}
    if "eos" not in special:
        raise ValueError(
            f"it has no end-of-text token: tokenizer_config.json names no token that it has, "
            f"and {', '.join(SPECIAL_TOKENS['eos'])} are not in it"
        )
    size = max(*ids.values(), *special.values()) + 1
    pad, bos, eos = (special.get(role, special["eos"]) for role in ("pad", "bos", "eos"))
    return PretrainedTokenizer(definition, pad, bos, eos, size, chat_template)


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether a model that was trained with one tokenizer may be used with the other: both give a sample the same ids.

    What may differ is `vocab_size`, which may be the model's, the padding token, which is always masked, and the chat
    template, which makes texts of conversations before they are tokenized.
    """
    if isinstance(a, PretrainedTokenizer) and isinstance(b, PretrainedTokenizer):
        one, other = ((t.bos_id, t.eos_id, t.tokenizer.to_str()) for t in (a, b))
        return one == other
    return a.to_json() == b.to_json()


def model_vocab_size(model: ModelConfig, tokenizer: Tokenizer) -> int:
    """Tokens that the model's embedding and head hold: `model.vocab_size`, or where that is None, the tokenizer's.

    Raises UserError where the tokenizer has more tokens than the model.
    """
    if model.vocab_size is None:
        return tokenizer.vocab_size
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"model.vocab_size: {model.vocab_size} is less than the {tokenizer.vocab_size} tokens of the tokenizer"
        )
    return model.vocab_size
