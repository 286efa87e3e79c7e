"""Reading a prepared dataset: shards are memory-mapped, so a worker's memory does not grow with the corpus, and the workers
of a node share a copy in the page cache. On remote storage each node fetches a file once, when it is due or ahead of that
(`hrm_lm.data.prepared.cache`). Of a dataset that is larger than `data.cache_gb` a node holds some blocks of shards at a time:
the last, the present and the next, and samples come in an order by blocks (`hrm_lm.data.order.Blocks`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Set
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow.fs
import torch
from pydantic import BaseModel, Field

from hrm_lm.config import Count
from hrm_lm.data.flat import FlatSplit, Promise
from hrm_lm.data.order import Blocks, Seed
from hrm_lm.data.prepared.cache import RemoteFiles, cache_folder
from hrm_lm.data.prepared.format import FORMAT_VERSION, META, TOKENIZER
from hrm_lm.data.splits import Limits, Prompt, Split, Splits, too_long
from hrm_lm.data.tokenizer import tokenizer_from_json
from hrm_lm.errors import UserError
from hrm_lm.filesystem import outlasting, read_bytes, resolve, without_secrets
from hrm_lm.parsing import one_line, parse_json, short


class MappedShard:
    """A shard's files, each mapped when it is first read. path: that of the files, less their endings."""

    def __init__(self, path: str):
        self.path = path

    @cached_property
    def tokens(self) -> memoryview:
        return map_file(f"{self.path}.bin")

    @cached_property
    def ends(self) -> memoryview:
        return map_file(f"{self.path}.idx")

    def is_there(self) -> bool:
        """Whether no file of it that is mapped has been removed since."""
        files = {"tokens": ".bin", "ends": ".idx"}
        return all(os.path.exists(self.path + files[part]) for part in files.keys() & vars(self).keys())


class PreparedSplit(FlatSplit):
    """A split of a prepared dataset, in a local folder or from `remote`."""

    _shards: dict[int, MappedShard]  # type: ignore[assignment]
    blocks: Blocks | None = None
    """The order of a dataset that is larger than the cache."""
    validation: tuple[str, ...] = ()
    """The files of the validation split, which are fetched beside those of the training split."""

    def __init__(
        self,
        meta: dict[str, Any],
        dtype: np.dtype,
        vocab_size: int,
        folder: str,
        shown: str,
        remote: RemoteFiles | None = None,
        limits: Limits | None = None,
    ):
        """meta: the split's part of meta.json. vocab_size: of its tokenizer. folder: where its files are, or come to be.
        shown: the split's name for messages. limits: what is longer is cut.
        """
        self.meta, self.folder, self.shown, self.remote = meta, folder, shown, remote
        self.places = lambda i: f"{shown} sample {i + 1}"
        self._expected: list[tuple[int, int]] | None = None
        promise = Promise(vocab_size, Limits(meta["longest_prompt"], meta["longest_response"]))
        super().__init__([shard["samples"] for shard in meta["shards"]], dtype, self._map, limits, promise)

    def _map(self, home: int) -> MappedShard:
        return MappedShard(f"{self.folder}/{self.meta['shards'][home]['name']}")

    def files(self, homes: Iterable[int] | None = None) -> list[str]:
        """The files of some shards, or of all: first those that lengths are read from."""
        names = [shard["name"] for shard in self.meta["shards"]]
        names = names if homes is None else [names[home] for home in homes]
        return [f"{name}{suffix}" for suffix in (".idx", ".bin") for name in names]

    def fetch_shards(self, homes: Iterable[int], tokens: bool = True) -> None:
        if self.remote is None:
            return
        parts = {"ends": ".idx"} | ({"tokens": ".bin"} if tokens else {})
        wanted = set(homes)
        closed = [(home, part) for home in wanted for part in parts if part not in vars(self._shard(home))]
        if closed:  # a file that is mapped takes room when it is removed, too; but what is wanted now stays mapped
            self._shards = {home: shard for home, shard in self._shards.items() if home in wanted or shard.is_there()}
        while closed:
            self.remote.fetch(f"{self.meta['shards'][home]['name']}{parts[part]}" for home, part in closed)
            still = []
            for home, part in closed:
                try:
                    getattr(self._shard(home), part)
                except FileNotFoundError:  # another process needed its room
                    still.append((home, part))
            closed = still

    def order(self, start: int, stop: int, seed: Seed) -> np.ndarray:
        return self.blocks.order(start, stop, seed) if self.blocks else super().order(start, stop, seed)

    def expect(self, start: int, stop: int, seed: Seed) -> None:
        if self.remote is None:
            return
        if self.blocks is None:
            if self._expected is None:
                self.remote.keep(self.files() + [*self.validation])
                self.remote.fetch_ahead(self.files() + [*self.validation])
                self._expected = []
            return
        now = self.blocks.around(start, stop, seed)
        if now == self._expected:
            return
        first, last = self.blocks.span(now[0], seed)[0], self.blocks.span(now[-1], seed)[1]
        (coming,) = self.blocks.around(last, last + 1, seed)
        # Processes that make batches may still read the block before. Where a window is in two blocks, the first is that.
        gone = self.blocks.around(first - 1, first, seed) if first and len(now) == 1 else []
        files = {block: self.files(self.blocks.shards(block, seed)) for block in (*gone, *now, coming)}
        present = [name for block in now for name in files[block]]
        # Of the first block on, there are two at a time, and later three.
        soon = 0 if gone else sum(self.remote.files[name][0] for name in files[coming])
        self.remote.keep([name for names in files.values() for name in names] + [*self.validation], soon)
        self._expected = now
        self.remote.fetch_ahead(dict.fromkeys([*present, *self.validation, *files[coming]]))

    def fitted(self, limits: Limits, truncate: bool) -> Split:
        """Knows from meta.json how long the longest sample is, and opens no shard. A prepared prompt is never empty."""
        assert self.promise is not None
        vocab_size, longest = self.promise
        if longest.prompt <= limits.prompt and longest.response <= limits.response:
            return self
        if not truncate:
            raise too_long(f"{self.shown}: the longest", longest, limits)
        cut = PreparedSplit(self.meta, self.dtype, vocab_size, self.folder, self.shown, self.remote, limits)
        cut.blocks, cut.validation = self.blocks, self.validation
        return cut

    def prompts(self) -> Set[Prompt]:
        """No prompt: a prepared dataset is taken as it is, and not looked through."""
        return frozenset()

    def without(self, prompts: Set[Prompt]) -> Split:
        return self


def map_file(path: str) -> memoryview:
    """The file's bytes, mapped. PyTorch's mapping keeps no file descriptor, as Python's `mmap` does."""
    size = os.path.getsize(path)
    try:
        return memoryview(torch.from_file(path, size=size, dtype=torch.uint8).numpy()) if size else memoryview(b"")
    except RuntimeError:
        if os.path.exists(path):
            raise
        raise FileNotFoundError(path) from None


def is_prepared(location: str) -> bool:
    return "://" in location or os.path.isfile(f"{location}/{META}")


def load_prepared(location: str, cache_gb: float | None = None, sharing: int = 1) -> Splits:
    """A folder or URI as train and validation split. No shard is read.

    cache_gb: what a node's copies of remote datasets may take. sharing: how many remote datasets of the run share that.
    Raises UserError, naming file and reason, where the dataset is not whole.
    """
    fs, path = resolve(location)
    shown = without_secrets(location)

    def read() -> tuple[dict[str, int], bytes]:
        sizes = {info.base_name: info.size for info in fs.get_file_info(pyarrow.fs.FileSelector(path))}
        if META not in sizes:
            raise UserError(
                f"{shown}: no {META} there: not a prepared dataset, or ray_jobs.prepare has not finished it"
            )
        return sizes, read_bytes(fs, f"{path}/{META}")

    what = f"{shown}: cannot be read"
    sizes, raw = outlasting(what, read)
    meta = _parse(raw, f"{shown}/{META}")
    for name, (size, _) in meta["files"].items():
        if sizes.get(name) != size:
            there = f"has {sizes[name]} bytes" if name in sizes else "is missing"
            raise UserError(f"{shown}/{name}: {there}, {META} says {size} bytes: torn or changed; prepare it again")
    text = outlasting(what, lambda: read_bytes(fs, f"{path}/{TOKENIZER}"))
    if hashlib.sha256(text).hexdigest() != meta["files"][TOKENIZER][1]:
        raise UserError(f"{shown}/{TOKENIZER}: is not the one that {META} was written with; prepare it again")
    try:
        tokenizer = tokenizer_from_json(text.decode())
    except ValueError as error:
        raise UserError(f"{shown}/{TOKENIZER}: not a tokenizer: {one_line(error)}") from None

    remote = None
    if not isinstance(fs, pyarrow.fs.LocalFileSystem):
        folder, limit = cache_folder() / hashlib.sha256(raw).hexdigest()[:32], cache_gb and cache_gb * 1e9
        remote = RemoteFiles(fs, path, meta["files"], folder, limit)
        path = str(folder)
    train, val = (
        PreparedSplit(part, np.dtype(meta["dtype"]), tokenizer.vocab_size, path, f"{shown}: {split}", remote)
        for split, part in ((split, meta["splits"][split]) for split in ("train", "val"))
    )
    if remote:
        train.validation = tuple(val.files())
    if remote and cache_gb:
        train.blocks = _blocks(train, meta["files"], cache_gb * 1e9 / sharing)
    return Splits(train, val, tokenizer)


def _blocks(train: PreparedSplit, files: dict[str, tuple[int, str]], share: float) -> Blocks | None:
    """The order by blocks of a training split that does not fit `share` bytes together with its validation split.

    Four blocks fit. Three are there at a time, and the room of the fourth is for workers that are not quite as far.
    """
    names = [shard["name"] for shard in train.meta["shards"]]
    sizes = np.array([files[f"{name}.idx"][0] + files[f"{name}.bin"][0] for name in names])
    room = share - sum(files[name][0] for name in train.validation)
    if sizes.sum() <= room:
        return None
    if 4 * sizes.max() > room:
        least = (share - room + 4 * sizes.max()) / 1e9
        raise UserError(
            f"{train.shown}: its part of data.cache_gb is {share / 1e9:.3g} GB; it needs {least:.3g} GB for the "
            " validation split and four shards: raise that, or prepare it with a lower --shard_mb"
        )
    return Blocks(np.diff(train.starts), sizes, room / 4)


class ShardMeta(BaseModel):
    name: Annotated[str, Field(pattern=r"^\w[\w-]*$")]
    samples: Count


class SplitMeta(BaseModel):
    longest_prompt: Count
    longest_response: Count
    shards: list[ShardMeta]


class Meta(BaseModel):
    """What is read of meta.json."""

    dtype: Literal["|u1", "<u2", "<u4", "<u8"]
    files: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], tuple[Count, str]]
    splits: dict[Literal["train", "val"], SplitMeta]


def _parse(raw: bytes, place: str) -> dict[str, Any]:
    """What meta.json says. Raises UserError where it does not fit together; the files are held against it later."""
    try:
        meta = parse_json(raw)
        version = meta["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{place}: format version {short(version)}, this program reads {FORMAT_VERSION}")
        Meta.model_validate_json(raw, strict=True)
        files, width = meta["files"], np.dtype(meta["dtype"]).itemsize
        meta["splits"]["train"], meta["splits"]["val"], files[TOKENIZER]
        for shard in (shard for split in ("train", "val") for shard in meta["splits"][split]["shards"]):
            index, tokens = (files[f"{shard['name']}{suffix}"][0] for suffix in (".idx", ".bin"))
            if index != 8 * (2 * shard["samples"] + 1) or tokens % width:
                raise ValueError(f"the files of {shard['name']} are not as long as its {shard['samples']} samples")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place}: torn or foreign: {one_line(error)}") from None
    return meta
