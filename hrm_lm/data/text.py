"""Pairs of texts as a split: tokenized whole, at once, when a sample is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from hrm_lm.config import DataConfig
from hrm_lm.data.flat import FlatSplit, MemoryShard
from hrm_lm.data.splits import (
    Limits,
    Ragged,
    Sample,
    Split,
    Splits,
    Subset,
    refuse_empty,
    too_long,
)  # fmt: skip
from hrm_lm.data.tokenizer import CHARACTERS, SimpleTokenizer, Tokenizer, resolve_tokenizer
from hrm_lm.errors import UserError

Pair = tuple[str, str]
"""A prompt and its response."""
TOKENIZED_TOGETHER = 1024
CHECKED_WHOLE = 1 << 20
"""Bytes of a corpus that is tokenized to be checked. Of a larger corpus only the texts are
tokenized that could be too long."""


class TextSplit(Split):
    """A driver, which checks a data set and trains on none of it, tokenizes only what may be too long for the model."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: Tokenizer,
        places: Callable[[int], str] | None = None,
        verdict: Callable[[int, str], float] | None = None,
        limits: Limits | None = None,
        truncate: bool = False,
    ):
        """limits: a sample beyond these is cut where `truncate`, else it raises UserError once it is tokenized."""
        self.pairs, self.tokenizer, self.places, self.verdict = pairs, tokenizer, places, verdict
        self.limits, self.truncate = limits, truncate

    @cached_property
    def _flat(self) -> FlatSplit:
        dtype = np.dtype(np.min_scalar_type(self.tokenizer.vocab_size - 1))
        place = (0,)  # for BOS behind a prompt, and for EOS behind a response
        blocks, bounds, total = [np.zeros(0, dtype)], [np.zeros(1, np.int64)], 0
        for start in range(0, len(self.pairs), TOKENIZED_TOGETHER):
            pairs = self.pairs[start : start + TOKENIZED_TOGETHER]
            ids = self.tokenizer.encode_batch([text for pair in pairs for text in pair])
            lens = np.fromiter(map(len, ids), np.int64, len(ids))
            size = int(lens.sum()) + len(lens)
            blocks.append(np.fromiter(chain.from_iterable(run for side in ids for run in (side, place)), dtype, size))
            # A prompt ends before BOS, and a sample behind EOS.
            bounds.append(total + np.cumsum(lens + 1) - np.tile([1, 0], len(pairs)))
            total += size
        tokens, ends = np.concatenate(blocks), np.concatenate(bounds).astype("<i8")
        shard = MemoryShard(tokens.data.cast("B"), ends.data.cast("B"))
        flat = FlatSplit([len(self.pairs)], dtype, lambda _: shard, self.limits if self.truncate else None)
        if self.limits is not None:
            self._check(flat.lengths(np.arange(len(flat))), np.arange(len(flat)), self.limits)
        return flat

    def _check(self, lengths: np.ndarray, indices: np.ndarray, limits: Limits) -> None:
        """lengths: (N, 2), of the samples at `indices` (N,). Raises UserError where a sample does not fit the model."""
        refuse_empty(Subset(self, indices), lengths)
        if (over := (lengths > limits).any(axis=1)).any():
            first = int(over.argmax())
            raise too_long(f"{self.place(int(indices[first]))}: the", lengths[first].tolist(), limits)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> Sample:
        return self._flat[i]

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self._flat.lengths(indices)

    def ragged(self, indices: np.ndarray) -> Ragged:
        return self._flat.ragged(indices)

    def fitted(self, limits: Limits, truncate: bool) -> Split:
        fitted = TextSplit(self.pairs, self.tokenizer, self.places, self.verdict, limits, truncate)
        fitted.facets = self.facets
        sizes = (len(side.encode()) for pair in self.pairs for side in pair)
        sizes = np.fromiter(sizes, np.int64, 2 * len(self.pairs)).reshape(-1, 2)
        if sizes.sum() <= CHECKED_WHOLE:
            fitted._flat  # noqa: B018 (tokenizing checks every sample)
            return fitted
        # A text has no more tokens than bytes, but for what some tokenizers put in front. Tokenizing checks again.
        long = np.zeros(len(sizes), dtype=bool) if truncate else (sizes + [0, 1] > limits).any(axis=1)
        wanted = np.flatnonzero(long | (sizes[:, 0] == 0))
        borders = np.flatnonzero(np.diff(wanted // TOKENIZED_TOGETHER)) + 1
        for some in np.split(wanted, borders) if len(wanted) else ():
            start = some[0]
            pairs = self.pairs[start : some[-1] + 1]
            ids = self.tokenizer.encode_batch([text for i in some for text in pairs[i - start]])
            lengths = np.fromiter(map(len, ids), np.int64, len(ids)).reshape(-1, 2) + [0, 1]
            self._check(lengths, some, limits)
        return fitted


def text_splits(
    config: DataConfig,
    train: Iterable[Pair],
    val: Iterable[Pair],
    default: Callable[[], Tokenizer],
    place: Callable[[str, int], str] | None = None,
    score: Callable[[int, str], float] | None = None,
) -> Splits:
    """Splits of prompts and responses, read with the tokenizer that `config.tokenizer` names, else with `default`'s.

    place, score: as for `Splits`. Raises UserError where the named tokenizer cannot be had.
    """
    place = place or (lambda split, i: f"{split} sample {i + 1}")
    train, val = (as_pairs(side, name, place) for side, name in ((train, "train"), (val, "val")))
    tokenizer = named_tokenizer(config)
    if tokenizer is None and config.tokenizer == CHARACTERS:
        tokenizer = SimpleTokenizer.from_texts(text for pair in (*train, *val) for text in pair)
    return splits_of(train, val, tokenizer or default(), place, score)


def named_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that `config.tokenizer` names; None where it names none, or the characters of the texts."""
    return resolve_tokenizer(config.tokenizer) if config.tokenizer not in (None, "", CHARACTERS) else None


def splits_of(
    train: Sequence[Pair],
    val: Sequence[Pair],
    tokenizer: Tokenizer,
    place: Callable[[str, int], str],
    score: Callable[[int, str], float] | None = None,
) -> Splits:
    """Splits of pairs that may be far more than memory holds: they are read through, or some at a time."""
    return Splits(
        TextSplit(train, tokenizer, lambda i: place("train", i)),
        TextSplit(val, tokenizer, lambda i: place("val", i), score),
        tokenizer,
    )


def as_pairs(items: Iterable[Any], split: str, place: Callable[[str, int], str]) -> list[Pair]:
    """Pairs of texts, of pairs or of mappings with `prompt` and `response`. Raises UserError, with the place, for others."""
    pairs = []
    for i, item in enumerate(items):
        pair = (item.get("prompt"), item.get("response")) if isinstance(item, Mapping) else tuple(item)
        if len(pair) != 2 or isinstance(item, str) or not all(isinstance(side, str) for side in pair):
            raise UserError(f"{place(split, i)}: needs two texts, a prompt and a response, not {str(item)[:60]!r}")
        try:
            "".join(pair).encode()
        except UnicodeEncodeError:
            raise UserError(f"{place(split, i)}: has half a character (a lone surrogate)") from None
        pairs.append(pair)
    return pairs
