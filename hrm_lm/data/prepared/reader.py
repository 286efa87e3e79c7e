"""Reading a prepared dataset: shards are memory-mapped, so a worker's memory does not grow with the corpus, and the workers
of a node share a copy in the page cache. On remote storage each node fetches a file once, into `cache_folder()`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import torch

from hrm_lm.data.flat import FlatSplit, Shard
from hrm_lm.data.prepared.cache import cache_folder, fetch
from hrm_lm.data.prepared.format import FORMAT_VERSION, META, TOKENIZER
from hrm_lm.data.splits import Limits, Prompt, Split, Splits, too_long
from hrm_lm.data.tokenizer import tokenizer_from_json
from hrm_lm.errors import UserError
from hrm_lm.filesystem import read_bytes, resolve, storage_error, without_secrets


class PreparedSplit(FlatSplit):
    """A split of a prepared dataset. `open_file` gives the local path of a file of the dataset."""

    def __init__(
        self,
        meta: dict[str, Any],
        dtype: np.dtype,
        open_file: Callable[[str], Path],
        shown: str,
        limits: Limits | None = None,
    ):
        """meta: the split's part of meta.json. shown: the split's name for messages. limits: what is longer is cut."""
        self.meta, self.open_file, self.shown = meta, open_file, shown
        self.places = lambda i: f"{shown} sample {i + 1}"
        super().__init__([shard["samples"] for shard in meta["shards"]], dtype, self._map, limits)

    def _map(self, home: int) -> Shard:
        name = self.meta["shards"][home]["name"]
        return Shard(map_file(self.open_file(f"{name}.bin")), map_file(self.open_file(f"{name}.idx")))

    def fitted(self, limits: Limits, truncate: bool) -> Split:
        """Knows from meta.json how long the longest sample is, and opens no shard. A prepared prompt is never empty."""
        longest = (self.meta["longest_prompt"], self.meta["longest_response"])
        if longest[0] <= limits.prompt and longest[1] <= limits.response:
            return self
        if not truncate:
            raise too_long(f"{self.shown}: the longest", longest, limits)
        return PreparedSplit(self.meta, self.dtype, self.open_file, self.shown, limits)

    def prompts(self) -> Set[Prompt]:
        """No prompt: a prepared dataset is taken as it is, and not looked through."""
        return frozenset()

    def without(self, prompts: Set[Prompt]) -> Split:
        return self


def map_file(path: Path) -> memoryview:
    """The file's bytes, mapped. PyTorch's mapping keeps no file descriptor, as Python's `mmap` does."""
    size = os.path.getsize(path)
    return memoryview(torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()) if size else memoryview(b"")


def is_prepared(location: str) -> bool:
    return "://" in location or os.path.isfile(f"{location}/{META}")


def load_prepared(location: str) -> Splits:
    """A folder or URI as train and validation split. Raises UserError, naming file and reason, where it is not whole."""
    fs, path = resolve(location)
    shown = without_secrets(location)
    try:
        found = fs.get_file_info(pyarrow.fs.FileSelector(path))
        sizes = {info.base_name: info.size for info in found}
        if META not in sizes:
            raise UserError(
                f"{shown}: no {META} there: not a prepared dataset, or ray_jobs.prepare has not finished it"
            )
        raw = read_bytes(fs, f"{path}/{META}")
        meta = _parse(raw, f"{shown}/{META}")
        for name, (size, _) in meta["files"].items():
            if sizes.get(name) != size:
                there = f"has {sizes[name]} bytes" if name in sizes else "is missing"
                raise UserError(f"{shown}/{name}: {there}, {META} says {size} bytes: torn or changed; prepare it again")
        text = read_bytes(fs, f"{path}/{TOKENIZER}")
    except OSError as error:
        raise storage_error(f"{shown}: cannot be read", error) from None
    if hashlib.sha256(text).hexdigest() != meta["files"][TOKENIZER][1]:
        raise UserError(f"{shown}/{TOKENIZER}: is not the one that {META} was written with; prepare it again")
    try:
        tokenizer = tokenizer_from_json(text.decode())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown}/{TOKENIZER}: not a tokenizer: {error}") from None

    local = isinstance(fs, pyarrow.fs.LocalFileSystem)
    cache = cache_folder() / hashlib.sha256(raw).hexdigest()[:32]

    def open_file(name: str) -> Path:
        return Path(path) / name if local else fetch(fs, f"{path}/{name}", cache / name, *meta["files"][name])

    dtype = np.dtype(meta["dtype"])
    train, val = (
        PreparedSplit(meta["splits"][split], dtype, open_file, f"{shown}: {split}") for split in ("train", "val")
    )
    return Splits(train, val, tokenizer)


def _parse(raw: bytes, place: str) -> dict[str, Any]:
    try:
        meta = json.loads(raw)
        version = meta["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{place}: format version {version}, this program reads {FORMAT_VERSION}")
        np.dtype(meta["dtype"]), meta["files"][TOKENIZER]
        for split in ("train", "val"):
            there = meta["splits"][split]
            there["longest_prompt"], there["longest_response"], [shard["samples"] for shard in there["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place}: torn or foreign: {error!r}") from None
    return meta
