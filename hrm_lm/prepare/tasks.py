"""What the tasks of `prepare` do: survey a part, find duplicates, write a part's shard. No Ray in here.

Every task is a pure function of the input, of the settings and of what earlier steps left in the work folder.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow.fs

from hrm_lm.cluster.output import Output
from hrm_lm.data.chat import Chat
from hrm_lm.data.prepared.format import META, write_file
from hrm_lm.data.prepared.writer import ShardWriter
from hrm_lm.data.tokenizer import Tokenizer, tokenizer_from_json
from hrm_lm.errors import UserError
from hrm_lm.filesystem import outlasting, shown
from hrm_lm.prepare.reading import Mapping, Pair, Piece, Problem, read_piece

GROUPS = 256
"""Ranges of hashes, by their first byte."""
ENCODED_TOGETHER = 256
"""Pairs that are tokenized together: some MB of encodings, which a core's cache holds; 1024 take 7 % longer."""
EXAMPLES = 10
"""Examples that the report gives of each reason."""


@dataclass(frozen=True)
class Settings:
    """What decides the result, beside the input. Field names are the command's flags; their docstrings are its help."""

    tokenizer: str | None = None
    """`characters` (a token for each character that occurs), `bytes`, or a tokenizer.json, its folder, or a URI of
    either. The file is this project's (of a checkpoint, of a prepared dataset) or Hugging Face's."""
    train_tokenizer: str | None = None
    """`bpe` trains a byte-level BPE on the corpus instead."""
    vocab_size: int = 8192
    """Tokens of a trained tokenizer."""
    prompt_field: str = "prompt"
    """The prompt's field (question, data.question, turns.0.text), or a template of the prompt
    ('{question} Context: {context}'). A list of messages there is a conversation."""
    response_field: str = "response"
    """The response's field or template. Unless fields are named, a record without them may have its conversation in
    `messages`."""
    text_prompt_chars: int = 400
    """Characters of a prompt that is cut out of plain text."""
    text_response_chars: int = 100
    """Characters of the continuation of such a prompt."""
    max_prompt_len: int | None = None
    """Leave out pairs whose prompt has more tokens."""
    max_response_len: int | None = None
    """Leave out pairs whose response has more tokens; EOS is counted."""
    val_fraction: float = 0.01
    """Share of the prompts that is held out for validation. A prompt's hash decides on which side it is."""
    shard_mb: float | None = None
    """MiB of input of a shard. When it is left out, it is 16 to 256, by the size of the corpus."""

    def mapping(self, chat: Chat) -> Mapping:
        return Mapping(self.prompt_field, self.response_field, self.text_prompt_chars, self.text_response_chars, chat)


class Source(NamedTuple):
    """A part of the corpus that is read and counted in its own way."""

    name: str
    inputs: list[str]
    mapping: Mapping
    cap: int | None = None
    """How many pairs it has at most."""
    repeat: int = 1
    """How often each of its training pairs is written."""


@dataclass(frozen=True)
class Job(Output):
    """What a task needs to know."""

    WORK, RESULT, HOLDS = ".prepare", META, "a dataset"

    settings: Settings
    sources: list[Source]
    parts: list[list[Piece]]
    """The pieces of a part are of one source."""
    fs: pyarrow.fs.FileSystem
    output: str
    strict: bool
    """Whether the first fault of the input is an error."""
    characters: bool
    """Whether the survey collects the characters that occur."""

    def source(self, part: int) -> Source:
        return self.sources[self.parts[part][0].source]


class Drops:
    """Counts what is left out, by reason. An example is (number of the piece in its part, position, text)."""

    def __init__(self):
        self.reasons: dict[str, dict[str, Any]] = {}

    def add(self, piece: int, problem: Problem) -> None:
        drop = self.reasons.setdefault(problem.reason, {"count": 0, "examples": []})
        drop["count"] += problem.lost
        if len(drop["examples"]) < EXAMPLES:
            drop["examples"].append([piece, problem.position, problem.text])


def read_part(
    job: Job, part: int, drops: Drops, lines: list[int] | None = None
) -> Iterator[tuple[int, Pair, bool, bytes]]:
    """Yields (number of the piece, pair, whether it is for validation, hash of its prompt) for each usable pair. What its
    `origin` is decides on the side.

    drops: counts what is not usable. lines: gets the number of lines of each piece. Raises UserError where `job.strict`
    and something is not usable.
    """
    held_out = int(job.settings.val_fraction * 2**64)
    for number, piece in enumerate(job.parts[part]):
        for item in read_piece(piece, job.sources[piece.source].mapping):
            if isinstance(item, Pair):
                prompt_hash = origin = hashlib.blake2b(item.prompt.encode(), digest_size=8).digest()
                if item.origin != item.prompt:
                    origin = hashlib.blake2b(item.origin.encode(), digest_size=8).digest()
                yield number, item, int.from_bytes(origin, "big") < held_out, prompt_hash
            elif isinstance(item, Problem):
                if job.strict:
                    after = f" after byte {piece.start:,}" if piece.start and piece.format in ("jsonl", "text") else ""
                    text = f" ({item.text})" if item.text else ""
                    raise UserError(f"{piece.path}:{item.position}{after}: {item.reason}{text}")
                drops.add(number, item)
            elif lines is not None:
                lines[number] = item.lines


def survey(job: Job, part: int) -> dict[str, Any]:
    """Reads a part and leaves hashes-PART: (pairs, 3) uint64, the hash of each pair (2) and its number in the part.

    Returns how many pairs are in each of the GROUPS, how many are for validation, the lines of each piece, what was
    dropped, and the characters that occur.
    """
    drops, lines, hashes = Drops(), [0] * len(job.parts[part]), bytearray()
    num_val, characters = 0, set[str]()
    for _, pair, is_val, prompt_hash in read_part(job, part, drops, lines):
        hashes += pair_hash(prompt_hash, pair.response)
        num_val += is_val
        if job.characters:
            characters.update(pair.prompt, pair.response)
    rows = np.frombuffer(hashes, "<u8").reshape(-1, 2)
    rows = np.concatenate([rows, np.arange(len(rows), dtype="<u8")[:, None]], axis=1)
    groups = write_groups(job, f"hashes-{part:05d}", rows, rows[:, 0] & 0xFF, GROUPS)
    found = {"groups": groups, "num_val": num_val, "lines": lines, "drops": drops.reasons}
    return found | {"characters": "".join(sorted(characters))}


def pair_hash(prompt_hash: bytes, response: str) -> bytes:
    return hashlib.blake2b(prompt_hash + response.encode(), digest_size=16).digest()


def find_duplicates(job: Job, ranges: tuple[int, int], groups: np.ndarray) -> dict[str, Any]:
    """Leaves duplicates-FIRST: (n, 1) uint64, the numbers of pairs that occurred before, in order of their part.

    ranges: which of the GROUPS to look at, [first, last).
    groups: (parts, GROUPS), how many pairs of each part are in each group.
    Returns how many duplicates each part has.
    """
    first, last = ranges
    parts = np.repeat(np.arange(len(groups)), groups[:, first:last].sum(axis=1))  # of each row
    rows = np.concatenate(
        [read_groups(job, f"hashes-{part:05d}", counts, first, last, 3) for part, counts in enumerate(groups)]
    )
    order = np.lexsort((rows[:, 2], parts, rows[:, 1], rows[:, 0]))
    same = (rows[order[1:], :2] == rows[order[:-1], :2]).all(axis=1)
    again = order[1:][same]
    return {"parts": write_groups(job, f"duplicates-{first:03d}", rows[again, 2:], parts[again], len(groups))}


def last_kept(
    job: Job, source: int, ranges: list[tuple[int, int]], groups: np.ndarray, duplicates: dict[int, np.ndarray]
) -> tuple[int, ...] | None:
    """The place of the last pair that the cap of a source leaves, in the order of `place`. None where it leaves all.

    ranges: of groups, as `find_duplicates` took them. groups: (parts, GROUPS), how many pairs of each part are in each
    group. duplicates: by the first group of a range, how many of its duplicates are in each part.
    """
    parts = [number for number, part in enumerate(job.parts) if part[0].source == source]
    left = job.sources[source].cap
    if left is None:
        return None
    for first, last in ranges:
        again = duplicates.get(first, np.zeros(len(job.parts), dtype=np.int64))
        here = int(groups[parts, first:last].sum() - again[parts].sum())
        if here < left:
            left -= here
            continue
        places = []
        for part in parts:
            rows = read_groups(job, f"hashes-{part:05d}", groups[part], first, last, 3)
            if again[part]:
                gone = read_groups(job, f"duplicates-{first:03d}", again, part, part + 1, 1)
                rows = rows[~np.isin(rows[:, 2], gone)]
            places.append(np.stack([rows[:, 0] & 0xFF, rows[:, 1], rows[:, 0]]))
        kept = np.concatenate(places, axis=1)
        return tuple(kept[:, np.lexsort(kept[::-1])[left - 1]].tolist())
    return None


def place(pair_hash: bytes) -> tuple[int, ...]:
    """Where a pair comes when a source is capped: by its group, then by the rest of its hash."""
    low, high = (int.from_bytes(pair_hash[i : i + 8], "little") for i in (0, 8))
    return low & 0xFF, high, low


def write_shard(
    job: Job,
    part: int,
    tokenizer_json: str,
    duplicates: dict[int, np.ndarray],
    pairs: list[int],
    last: dict[str, tuple[int, ...] | None],
) -> dict[str, Any]:
    """Reads a part again and leaves its shard: a file pair for each split that has samples.

    duplicates: by the first group of a duplicates file, how many rows that file has of each part.
    pairs: how many usable pairs each part had when it was surveyed. last: what `last_kept` says of each source, by name.
    Returns what each shard's writer said, what was dropped, and how many pairs were over the source's cap. Raises
    UserError where the part has changed since.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the other cores have parts of their own
    tokenizer = cached_tokenizer(tokenizer_json)
    again = {
        int(row)
        for first, counts in duplicates.items()
        for row in read_groups(job, f"duplicates-{first:03d}", counts, part, part + 1, 1)[:, 0]
    }
    drops, writers, done, over_cap = Drops(), {}, 0, 0
    source = job.source(part)
    end = last[source.name]
    found = read_part(job, part, Drops())
    while some := list(islice(found, ENCODED_TOGETHER)):
        new = [item for number, item in enumerate(some, start=done) if number not in again]
        done += len(some)
        if end is not None:
            under = [item for item in new if place(pair_hash(item[3], item[1].response)) <= end]
            over_cap, new = over_cap + len(new) - len(under), under
        ids = tokenizer.encode_batch([text for _, pair, *_ in new for text in pair[:2]])
        kept = defaultdict(list)
        for (piece, pair, is_val, _), prompt, response in zip(new, ids[::2], ids[1::2]):
            if not prompt:
                drops.add(piece, Problem("the prompt has no tokens", pair.position, pair.prompt[:80]))
            elif len(prompt) > (job.settings.max_prompt_len or len(prompt)):
                drops.add(piece, Problem("the prompt has too many tokens", pair.position, f"{len(prompt)} tokens"))
            elif len(response) + 1 > (job.settings.max_response_len or len(response) + 1):
                drops.add(
                    piece, Problem("the response has too many tokens", pair.position, f"{len(response) + 1} tokens")
                )
            else:
                kept["val" if is_val else "train"] += [(prompt, response)] * (1 if is_val else source.repeat)
        for split, samples in kept.items():
            if split not in writers:
                writers[split] = ShardWriter(job.fs, job.output, f"{split}-{part:05d}", tokenizer)
            writers[split].write(samples)
    if done != pairs[part]:
        names = ", ".join(dict.fromkeys(piece.path for piece in job.parts[part]))
        raise UserError(
            f"changed while it was read: one of {names[:500]}; give another --output, or delete what is there"
        )
    shards = {split: writer.close() for split, writer in writers.items()}
    return {"shards": shards, "drops": drops.reasons, "over_cap": over_cap}


@lru_cache(maxsize=1)  # for each process: a large tokenizer takes a second to build
def cached_tokenizer(text: str) -> Tokenizer:
    return tokenizer_from_json(text)


def write_groups(job: Job, name: str, rows: np.ndarray, groups: np.ndarray, num_groups: int) -> list[int]:
    """Writes rows (N, k) of uint64 in order of their group. Returns how many rows each group has."""
    write_file(job.fs, job.work(name), rows[np.argsort(groups, kind="stable")].astype("<u8").tobytes())
    return np.bincount(groups.astype(np.int64), minlength=num_groups).tolist()


def read_groups(job: Job, name: str, counts: np.ndarray, first: int, last: int, width: int) -> np.ndarray:
    """Rows (n, width) of the groups [first, last) in a file of `write_groups`. counts: how many rows each group has."""
    start, stop = (int(np.sum(counts[:group])) * 8 * width for group in (first, last))
    if start == stop:
        return np.empty((0, width), dtype="<u8")

    def read() -> bytes:
        with job.fs.open_input_file(job.work(name)) as file:
            return file.read_at(stop - start, start)

    return np.frombuffer(outlasting(f"{shown(job.fs, job.work(name))}: cannot be read", read), "<u8").reshape(-1, width)
