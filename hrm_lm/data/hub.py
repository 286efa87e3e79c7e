"""`hf:NAME_OR_PATH[,config=...][,split=...][,val_split=...][,revision=...]`: datasets of the `datasets` library.

NAME is a dataset of the Hugging Face Hub, PATH a local folder: of files that the library reads (Parquet, JSON, CSV), or one
that its `save_to_disk` wrote. No code of a dataset runs: the library has not run any since version 4.

The library keeps a dataset as Arrow tables on the disk, which are mapped. Its rows are read some at a time, each time that
they are asked for. What stays in memory is their token ids, as `TextSplit` has them, and some bytes for each row.
"""

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from hrm_lm.config import DataConfig
from hrm_lm.data.chat import Chat
from hrm_lm.data.records import Fields, Missing, Pair
from hrm_lm.data.splits import Splits
from hrm_lm.data.text import named_tokenizer, splits_of
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.errors import UserError
from hrm_lm.filesystem import storage_error
from hrm_lm.parsing import one_line

PREFIX = "hf:"
READ_TOGETHER = 1024
"""Rows that are read at a time."""
CORRUPT = (ValueError, OSError, SystemError, pyarrow.ArrowException)
"""What rows raise that are not what their table says, such as text that is not UTF-8."""


class HubDataset(NamedTuple):
    """What `hf:...` names."""

    path: str
    config: str | None = None
    split: str | None = None
    """When it is left out, it is `train`."""
    val_split: str | None = None
    revision: str | None = None
    """A branch, tag or commit on the Hub."""

    @classmethod
    def parse(cls, name: str, flag: str = "data.dataset") -> "HubDataset":
        """Raises UserError for an option that is not one of the fields, and for a URI."""
        path, *assignments = re.split(r",(?=\w+=)", name.removeprefix(PREFIX))
        options = dict(assignment.split("=", 1) for assignment in assignments)
        known = [field for field in cls._fields if field != "path"]
        for option in options.keys() - {*known}:
            raise UserError(f"{flag}: {name} has no option {option!r}; there are {', '.join(known)}")
        if not path or "://" in path:
            raise UserError(f"{flag}: {name}: hf: takes a dataset's name on the Hub, or a local folder")
        return cls(path, **options)

    def __str__(self) -> str:
        """The name again, that of a local folder from the root."""
        folder = Path(self.path).expanduser()
        path = str(folder.absolute()) if folder.is_dir() else self.path
        options = {field: value for field, value in self._asdict().items() if value is not None and field != "path"}
        return PREFIX + ",".join([path, *(f"{field}={value}" for field, value in options.items())])

    def load(self, split: str | None, flag: str = "data.dataset") -> Any:
        """A split as a `datasets.Dataset`; None for `train`. Raises UserError where it cannot be had."""
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"{flag}: {PREFIX}{self.path} needs the datasets library: pip install 'hrm-lm[hub]'"
            ) from None
        what = f"{flag}: {PREFIX}{self.path}: cannot be loaded"
        folder = Path(self.path).expanduser()
        verbosity = datasets.logging.get_verbosity()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it tells an error twice
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        try:
            if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
                saved = self._saved(datasets.load_from_disk(str(folder)), split, flag)
                saved.data.validate(full=True)  # a damaged table, which is mapped as it is, would crash this process
                return saved
            path = str(folder.absolute()) if folder.is_dir() else self.path  # which may be that of a format
            return datasets.load_dataset(path, self.config, split=split or "train", revision=self.revision)
        except FileNotFoundError as error:
            where = "" if folder.is_dir() else ", and there is no such folder"
            raise UserError(f"{what}: {one_line(error)}{where}") from None
        except OSError as error:
            raise storage_error(what, error) from None
        except UserError:
            raise
        except Exception as error:  # malformed files make the library raise whatever its parsers do
            cause = error.__cause__ or error
            kind = "" if isinstance(cause, ValueError | RuntimeError) else f"{type(cause).__name__}: "
            raise UserError(f"{what}: {kind}{one_line(cause)[:300]}") from None
        finally:
            datasets.logging.set_verbosity(verbosity)

    def _saved(self, saved: Any, split: str | None, flag: str) -> Any:
        """A split of what `save_to_disk` wrote: a single dataset, or several by name."""
        if not isinstance(saved, dict):
            if split in (None, str(saved.split)):
                return saved
            saved = {}
        elif (split or "train") in saved:
            return saved[split or "train"]
        there = f"there are {', '.join(saved)}" if saved else "it is a single split, which needs no name"
        raise UserError(f"{flag}: {PREFIX}{self.path}: has no split {split or 'train'!r}; {there}")


def records(table: Any, start: int, stop: int) -> list[dict[str, Any]]:
    """Rows `start` to `stop` of a `datasets.Dataset`. Raises one of CORRUPT where they cannot be read."""
    columns = table[start:stop]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class Rows(Sequence[Pair]):
    """The pairs of a table's rows, read each time they are asked for."""

    def __init__(self, table: Any, fields: Fields, shown: str, counts: np.ndarray, numbers: np.ndarray):
        """table: a `datasets.Dataset`. shown: its name, for messages. counts, numbers: (N,), of each row how many pairs it has,
        and its place in the split.
        """
        self.table, self.fields, self.shown, self.counts, self.numbers = table, fields, shown, counts, numbers
        self.starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self) -> Iterator[Pair]:
        for _, pairs in self.read(0, len(self.table)):
            yield from pairs

    def __getitem__(self, i: Any) -> Any:
        """A pair, or with a slice a list of pairs that follow one another."""
        if not isinstance(i, slice):
            return self[i : i + 1][0]
        start, stop, _ = i.indices(len(self))
        first = self._row(start)
        found = [pair for _, pairs in self.read(first, self._row(stop - 1) + 1) for pair in pairs]
        return found[start - int(self.starts[first]) :][: stop - start]

    def _row(self, i: int) -> int:
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def read(self, start: int, stop: int) -> Iterator[tuple[int, list[Pair]]]:
        """The number and the pairs of rows `start` to `stop`. Raises UserError for a row that has no pair."""
        for first in range(start, stop, READ_TOGETHER):
            end = min(first + READ_TOGETHER, stop)
            try:
                some = records(self.table, first, end)
            except CORRUPT as error:
                place = f"{self.shown}: rows {self.numbers[first] + 1} to {self.numbers[end - 1] + 1}"
                raise UserError(f"{place} cannot be read: {one_line(error)[:300]}") from None
            for row, record in enumerate(some, start=first):
                try:
                    yield row, self.fields.pairs(record)
                except Missing as missing:
                    raise UserError(f"{self.shown} row {self.numbers[row] + 1}: {missing}") from None

    def place(self, i: int) -> str:
        return f"{self.shown} row {self.numbers[self._row(i)] + 1}"

    def taken(self, mask: np.ndarray) -> "Rows":
        """The rows where `mask` (N,) is true."""
        table = self.table.select(np.flatnonzero(mask))
        return Rows(table, self.fields, self.shown, self.counts[mask], self.numbers[mask])


def surveyed(table: Any, fields: Fields, shown: str) -> tuple[Rows, np.ndarray]:
    """The pairs of all rows of a `datasets.Dataset`; and (N,) uint64, a hash of each row's first prompt.

    Raises UserError for a row without a pair, and Missing where a column lacks.
    """
    table = table.select_columns(fields.columns(table.features.arrow_schema))
    counts, hashes = np.ones(len(table), dtype=np.int64), np.zeros(len(table), dtype=np.uint64)
    numbers = np.arange(len(table))
    for row, pairs in Rows(table, fields, shown, counts, numbers).read(0, len(table)):
        counts[row] = len(pairs)
        hashes[row] = int.from_bytes(hashlib.blake2b(pairs[0][0].encode(), digest_size=8).digest(), "big")
    return Rows(table, fields, shown, counts, numbers), hashes


def build_hub_dataset(config: DataConfig, seed: int) -> Splits:
    """Validates on `val_split` where it is named, else on a share of the prompts. A conversation is held out as a whole.

    The tokenizer is the one `config.tokenizer` names, else one of characters, as for JSONL.
    """
    name = HubDataset.parse(config.dataset or "")
    tokenizer = named_tokenizer(config)
    fields = Fields.of(config.prompt_field, config.response_field, Chat.of(tokenizer), "data.")

    def survey(split: str | None) -> tuple[Rows, np.ndarray]:
        shown = f"{PREFIX}{name.path}: {split or 'train'}"
        try:
            return surveyed(name.load(split), fields, shown)
        except Missing as missing:
            hint = "data.prompt_field and data.response_field name the fields"
            raise UserError(f"data.dataset: {shown}: {missing} ({hint})") from None

    train, hashes = survey(name.split)
    if name.val_split is not None:
        val, _ = survey(name.val_split)
    else:
        prompts = np.unique(hashes)
        number = max(1, round(len(prompts) * config.val_fraction))
        chosen = np.random.default_rng(seed).permutation(len(prompts))[:number]
        held_out = np.isin(hashes, prompts[chosen])
        if held_out.all():
            raise UserError(f"data.dataset: {train.shown}: too few different prompts to hold some out for validation")
        train, val = train.taken(~held_out), train.taken(held_out)
    sides = {"train": train, "val": val}
    tokenizer = tokenizer or SimpleTokenizer.from_texts(text for side in (train, val) for pair in side for text in pair)
    return splits_of(train, val, tokenizer, lambda split, i: sides[split].place(i))
