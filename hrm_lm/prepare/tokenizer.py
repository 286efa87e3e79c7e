"""The tokenizer of a preparation: the tokenizer that the user names, or a new one that is made of the corpus."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hrm_lm.data.prepared.format import TOKENIZER, write_file
from hrm_lm.data.tokenizer import (
    CHARACTERS,
    PretrainedTokenizer,
    SimpleTokenizer,
    Tokenizer,
    resolve_tokenizer,
    tokenizer_from_json,
)  # fmt: skip
from hrm_lm.errors import UserError
from hrm_lm.prepare.recipe import special_texts
from hrm_lm.prepare.tasks import Drops, Job, Settings, read_part

TRAINING_CHARS = 1 << 26
"""Characters of text that `train_bpe` learns from, spread over the corpus."""


def fixed_tokenizer(settings: Settings) -> Tokenizer | None:
    """The tokenizer that the settings name; None where it is made of the corpus.

    Raises UserError where the settings name no tokenizer or two, or where the tokenizer cannot be had.
    """
    if (settings.tokenizer is None) == (settings.train_tokenizer is None):
        raise UserError(
            "give --tokenizer (characters, bytes, or a tokenizer.json or its folder), or --train_tokenizer bpe"
        )
    if settings.tokenizer is None:
        require_tokenizers()
        return None
    return None if settings.tokenizer == CHARACTERS else resolve_tokenizer(settings.tokenizer, "--tokenizer")


def corpus_tokenizer(job: Job, surveyed: list[dict[str, Any]]) -> Tokenizer:
    """The tokenizer that is made of the corpus. After a kill, it is the tokenizer that the first run made."""
    with suppress(FileNotFoundError):
        return tokenizer_from_json(json.dumps(job.read_json(f"{job.WORK}/{TOKENIZER}")))
    tokenizer: Tokenizer
    if job.characters:
        tokenizer = SimpleTokenizer.from_texts(result["characters"] for result in surveyed)
    else:
        tokenizer = train_bpe(job)
    write_file(job.fs, job.work(TOKENIZER), tokenizer.to_json().encode())
    return tokenizer


def require_tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise UserError("--train_tokenizer needs the tokenizers library: pip install 'hrm-lm[tokenizers]'") from None
    return tokenizers


def train_bpe(job: Job) -> Tokenizer:
    """Trains a byte-level BPE on the beginning of every part, on TRAINING_CHARS in all."""
    tokenizers = require_tokenizers()
    each = max(TRAINING_CHARS // len(job.parts), 1)

    def texts() -> Iterator[str]:
        for part in range(len(job.parts)):
            chars = 0
            for _, pair, _, _ in read_part(job, part, Drops()):
                yield from pair[:2]
                chars += len(pair.prompt) + len(pair.response)
                if chars > each:
                    break

    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer, trained.decoder = byte_level, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=job.settings.vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>", *special_texts(job.sources)],
        initial_alphabet=byte_level.alphabet(),  # so that no text is unknown to it
        show_progress=False,
    )
    trained.train_from_iterator(texts(), trainer)
    return PretrainedTokenizer(json.loads(trained.to_str()), 0, 1, 2, trained.get_vocab_size())
