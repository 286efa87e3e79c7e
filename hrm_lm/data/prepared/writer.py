"""Writing a prepared dataset: shards as their samples come, and the meta.json that makes them a dataset."""

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow.fs

from hrm_lm.data.prepared.format import FORMAT_VERSION, META, TOKENIZER, token_dtype, write_file
from hrm_lm.data.tokenizer import Tokenizer


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
        """The shard's entry for meta.json."""
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
        self.file = fs.open_output_stream(path)

    def write(self, array: np.ndarray) -> None:
        self.size += array.nbytes
        self.digest.update(array.data)
        self.file.write(array.tobytes())

    def close(self) -> tuple[int, str]:
        self.file.close()
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
