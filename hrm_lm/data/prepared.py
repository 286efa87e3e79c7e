"""The prepared dataset: token ids on disk, opened and not loaded. `ray_jobs.prepare` writes it.

    meta.json           what is there: format version, counts, lengths, shards, each file's size and SHA-256; written last
    tokenizer.json
    train-00000.bin     token ids, sample after sample: prompt, BOS, response, EOS
    train-00000.idx     int64: where each prompt and each response ends in the .bin, after a leading 0
    val-00000.bin ...

The two arrays of a shard are memory-mapped, so a worker's memory does not grow with the corpus and the workers of a
node share one copy in the page cache. On remote storage every node fetches a file once, into `cache_folder()`.
"""

import fcntl
import hashlib
import json
import os
from functools import cached_property
from itertools import chain
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np
import pyarrow.fs

from hrm_lm.data.registry import Splits
from hrm_lm.data.tokenizer import Sample, Tokenizer, tokenizer_from_json
from hrm_lm.errors import UserError
from hrm_lm.filesystem import resolve, without_secrets

FORMAT_VERSION = 1
META, TOKENIZER = "meta.json", "tokenizer.json"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds the vocabulary, little-endian."""
    return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


class Shard(NamedTuple):
    """A shard's files, mapped: slicing these costs a fraction of slicing arrays. An `mmap` copies, best for few bytes."""

    tokens: memoryview
    ends: mmap


class PreparedSplit:
    """Samples of one split, read where they lie. `open_file` gives the local path of one of the dataset's files."""

    def __init__(self, meta: dict[str, Any], dtype: np.dtype, open_file: Callable[[str], Path]):
        self.meta, self.dtype, self.open_file = meta, dtype, open_file
        self.limits: tuple[int, int] | None = None
        """Longest prompt and response: what is longer is cut."""
        counts = [shard["samples"] for shard in meta["shards"]]
        self.starts = np.cumsum([0, *counts])  # of each shard, in samples

    @property
    def longest(self) -> tuple[int, int]:
        """Longest prompt and response, in tokens; known without opening a shard."""
        return self.meta["longest_prompt"], self.meta["longest_response"]

    @cached_property
    def shards(self) -> list[Shard]:
        """Opened when a sample is first asked for: a driver that only checks the dataset fetches none."""
        return [
            Shard(
                memoryview(_map(self.open_file(shard["name"] + ".bin"))), _map(self.open_file(shard["name"] + ".idx"))
            )
            for shard in self.meta["shards"]
        ]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Sample:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        ids, (prompt_len,), _ = self.ragged(np.array([i % len(self)]))
        return ids[:prompt_len], ids[prompt_len:-1], ids[prompt_len + 1 :]

    def ragged(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The samples at `indices` (B,), one after another, for `pad_ragged`.

        Returns the ids, each sample's prompt, BOS and response, and (B,) int64 the lengths of prompts and of responses.
        """
        homes, rows = self._locate(indices)
        size, homes, places = self.dtype.itemsize, homes.tolist(), (16 * rows).tolist()
        tokens, ends = zip(*self.shards)
        bounds = b"".join([ends[home][place : place + 24] for home, place in zip(homes, places)])
        bounds = np.frombuffer(bounds, "<i8").reshape(-1, 3)
        lengths = self._lengths(bounds.T)
        if self.limits is None:
            runs = zip(homes, (size * bounds).tolist())
            parts = [tokens[home][start:end] for home, (start, _, end) in runs]
        else:
            starts = bounds[:, :2]
            runs = zip(homes, (size * np.concatenate([starts, starts + lengths + [0, 1]], axis=1)).tolist())
            parts = [part for home, (a, c, b, d) in runs for part in (tokens[home][a:b], tokens[home][c:d])]
        return np.frombuffer(b"".join(parts), self.dtype), lengths[:, 0], lengths[:, 1]

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """(B, 2) int64: tokens of prompt and of response, EOS counted."""
        homes, rows = self._locate(indices)
        lengths = np.empty((len(indices), 2), dtype=np.int64)
        for home in np.unique(homes):
            here = homes == home
            ends = np.frombuffer(self.shards[home].ends, "<i8")
            lengths[here] = self._lengths([ends[2 * rows[here] + i] for i in range(3)])
        return lengths

    def _lengths(self, bounds: Sequence[np.ndarray]) -> np.ndarray:
        start, middle, end = bounds
        lengths = np.array([middle - start, end - middle - 1]).T
        return np.minimum(lengths, self.limits) if self.limits else lengths

    def truncated(self, longest_prompt: int, longest_response: int) -> "PreparedSplit":
        """The same samples, cut when they are read."""
        cut = PreparedSplit(self.meta, self.dtype, self.open_file)
        cut.limits = (longest_prompt, longest_response)
        return cut

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        homes = np.searchsorted(self.starts, indices, side="right") - 1
        return homes, indices - self.starts[homes]


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
        raw = _read(fs, f"{path}/{META}")
        meta = _parse(raw, f"{shown}/{META}")
        for name, (size, _) in meta["files"].items():
            if sizes.get(name) != size:
                there = f"has {sizes[name]} bytes" if name in sizes else "is missing"
                raise UserError(f"{shown}/{name}: {there}, {META} says {size} bytes: torn or changed; prepare it again")
        text = _read(fs, f"{path}/{TOKENIZER}")
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {' '.join(str(error).split())}") from None
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
    train, val = (PreparedSplit(meta["splits"][split], dtype, open_file) for split in ("train", "val"))
    return Splits(train, val, tokenizer, place=lambda split, i: f"{shown}: {split} sample {i + 1}")


class ShardWriter:
    """Writes a shard of a split as samples come: nothing but the file's checksums stays in memory."""

    def __init__(self, fs: pyarrow.fs.FileSystem, folder: str, name: str, tokenizer: Tokenizer):
        self.name, self.tokenizer, self.dtype = name, tokenizer, token_dtype(tokenizer.vocab_size)
        self.files = [_HashedFile(fs, f"{folder}/{name}{suffix}") for suffix in (".bin", ".idx")]
        self.files[1].write(np.zeros(1, "<i8"))
        self.samples, self.total, self.longest = 0, 0, np.zeros(2, dtype=np.int64)
        self.histogram = np.zeros((2, 64), dtype=np.int64)  # [side, i]: lengths in (2^(i-1), 2^i]

    def write(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Adds samples: token ids of prompt and response, without BOS or EOS."""
        bos, eos = [self.tokenizer.bos_id], [self.tokenizer.eos_id]
        parts = [part for prompt, response in pairs for part in (prompt, bos, response, eos)]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts)).reshape(-1, 4)
        ids = np.fromiter(chain.from_iterable(parts), self.dtype, int(lengths.sum()))
        sides = np.stack([lengths[:, 0], lengths[:, 2] + 1], axis=1)  # what the model reads: response with EOS
        ends = self.total + np.cumsum(np.stack([sides[:, 0], sides[:, 1] + 1], axis=1))
        self.files[0].write(ids)
        self.files[1].write(ends.astype("<i8"))
        self.samples, self.total = self.samples + len(pairs), self.total + len(ids)
        self.longest = np.maximum(self.longest, sides.max(axis=0, initial=0))
        for side in range(2):
            np.add.at(self.histogram[side], np.ceil(np.log2(sides[:, side])).astype(int), 1)

    def close(self) -> dict[str, Any]:
        """What meta.json needs to know of it."""
        return {
            "name": self.name,
            "samples": self.samples,
            "tokens": self.total,
            "longest": self.longest.tolist(),
            "histogram": self.histogram.tolist(),
            "files": {file.name: file.close() for file in self.files},
        }


class _HashedFile:
    def __init__(self, fs: pyarrow.fs.FileSystem, path: str):
        self.name, self.size, self.digest = path.rpartition("/")[2], 0, hashlib.sha256()
        self.stream = fs.open_output_stream(path)

    def write(self, array: np.ndarray) -> None:
        self.size += array.nbytes
        self.digest.update(array)
        self.stream.write(array.tobytes())

    def close(self) -> tuple[int, str]:
        self.stream.close()
        return self.size, self.digest.hexdigest()


def write_meta(
    fs: pyarrow.fs.FileSystem, folder: str, tokenizer: Tokenizer, shards: dict[str, list[dict[str, Any]]], **more: Any
) -> None:
    """Makes a prepared dataset of its shards: writes tokenizer.json and, last of all, meta.json.

    shards: what `ShardWriter.close` returned, by split; `more` goes into meta.json as it is.
    """
    text = tokenizer.to_json().encode()
    write_file(fs, f"{folder}/{TOKENIZER}", text)
    files = {TOKENIZER: (len(text), hashlib.sha256(text).hexdigest())}
    splits = {}
    for split, closed in shards.items():
        longest = np.max([shard["longest"] for shard in closed], axis=0, initial=0).tolist()
        histogram = np.sum([shard["histogram"] for shard in closed], axis=0)
        splits[split] = {
            "samples": sum(shard["samples"] for shard in closed),
            "tokens": sum(shard["tokens"] for shard in closed),
            "longest_prompt": longest[0],
            "longest_response": longest[1],
            "lengths_up_to": {
                side: {str(2**i): int(count) for i, count in enumerate(counts) if count}
                for side, counts in zip(("prompt", "response"), histogram)
            },
            "shards": [{"name": shard["name"], "samples": shard["samples"]} for shard in closed],
        }
        for shard in closed:
            files |= shard["files"]
    meta = {"format_version": FORMAT_VERSION, "dtype": token_dtype(tokenizer.vocab_size).str}
    meta |= {"vocab_size": tokenizer.vocab_size, **more, "splits": splits, "files": files}
    write_file(fs, f"{folder}/{META}", json.dumps(meta, indent=1).encode())


def write_file(fs: pyarrow.fs.FileSystem, path: str, content: bytes) -> None:
    """All or nothing: on object storage that is how files are, elsewhere it takes a rename."""
    renames = isinstance(fs, pyarrow.fs.LocalFileSystem)
    written = path + ".partial" if renames else path
    with fs.open_output_stream(written) as stream:
        stream.write(content)
    if renames:
        fs.move(written, path)


def _map(path: Path) -> mmap:
    with open(path, "rb") as file:
        return mmap(file.fileno(), 0, access=ACCESS_READ)


def _read(fs: pyarrow.fs.FileSystem, path: str) -> bytes:
    with fs.open_input_stream(path) as stream:
        return stream.read()


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


def cache_folder() -> Path:
    """Where a node keeps what it fetched: `HRM_LM_CACHE`, best a local disk, or ~/.cache/hrm_lm."""
    return Path(os.environ.get("HRM_LM_CACHE") or "~/.cache/hrm_lm").expanduser()


def fetch(fs: pyarrow.fs.FileSystem, source: str, target: Path, size: int, sha256: str) -> Path:
    """Copies a file to `target` unless it is there; of several processes that want it, one fetches and the rest wait.

    Raises UserError where what came is not what `sha256` says; then nothing is left at `target`.
    """
    if target.exists():  # it got its name when it was whole and checked
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        partial, digest = target.with_name(target.name + ".partial"), hashlib.sha256()
        try:
            with fs.open_input_stream(source) as stream, open(partial, "wb") as file:
                while block := stream.read(1 << 22):
                    digest.update(block)
                    file.write(block)
        except OSError as error:
            raise UserError(f"{source}: cannot be fetched to {target.parent}: {' '.join(str(error).split())}") from None
        if digest.hexdigest() != sha256:
            partial.unlink()
            raise UserError(
                f"{source}: is not what {META} says it is (SHA-256 differs): changed or damaged; prepare it again"
            )
        os.replace(partial, target)
    return target
