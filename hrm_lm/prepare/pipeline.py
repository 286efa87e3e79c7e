"""A corpus to a prepared dataset, on the cluster: survey, deduplicate, tokenize.

    survey      each part is read: hashes of its pairs, its characters, what is wrong with it
    duplicates  each range of hashes is looked at over all parts: every pair but the first of its kind is one too many
    tokenize    each part is read again and its shard written

Every step of a part is a Ray Data row, and a pure function of the input that leaves a file in OUTPUT/.prepare when it
is done; a run that was killed does the rest. meta.json, which makes it a dataset, is written last. The input is read
twice so that a shard is written once: reading is cheap beside tokenizing, and duplicates are not tokenized.

A pair's side is a matter of its prompt's hash alone: adding files later moves no pair from one side to the other.
"""

import gc
import hashlib
import json
import logging
import os
import sys
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Callable, Iterable, Iterator

import numpy as np
import pyarrow.fs

from hrm_lm.data.prepared import META, TOKENIZER, ShardWriter, write_file, write_meta
from hrm_lm.data.tokenizer import (
    ByteTokenizer,
    PretrainedTokenizer,
    SimpleTokenizer,
    Tokenizer,
    pretrained_tokenizer,
    tokenizer_from_json,
)  # fmt: skip
from hrm_lm.errors import UserError
from hrm_lm.filesystem import resolve, without_secrets
from hrm_lm.prepare.reading import (
    Mapping,
    Pair,
    Piece,
    Problem,
    find_files,
    parse_mapping,
    plan_parts,
    read_piece,
)  # fmt: skip

WORK = ".prepare"
GROUPS = 256
"""Ranges of hashes, by their first byte."""
GROUPED_TOGETHER = 1 << 20
"""Pairs whose hashes one task of the second step holds, unless a single range has more."""
READ_TOGETHER = 64 << 20
"""Input that a task of the first step reads: a part of 16 MB takes no longer than Ray Data takes to start a task, 0.2 s."""
CHUNK = 256
"""Pairs that are tokenized together: some MB of encodings, which a core's cache holds; 1024 take 7 % longer."""
EXAMPLES = 10
TRAINING_CHARS = 1 << 26
"""Text that `train_tokenizer` learns from: so much, spread over the corpus."""


@dataclass(frozen=True)
class Settings:
    """What decides the result, beside the input. Field names are the command's flags."""

    tokenizer: str | None = None
    """`characters`, `bytes`, or the path of a Hugging Face tokenizer.json."""
    train_tokenizer: str | None = None
    """`bpe`: train one on the corpus instead."""
    vocab_size: int = 8192
    prompt_field: str = "prompt"
    response_field: str = "response"
    text_prompt_chars: int = 400
    text_response_chars: int = 100
    max_prompt_len: int | None = None
    max_response_len: int | None = None
    """In tokens, EOS counted; longer pairs are left out."""
    val_fraction: float = 0.01
    shard_mb: float | None = None
    """Input of a shard; None: 16 to 256, by the size of the corpus."""

    @property
    def mapping(self) -> Mapping:
        return Mapping(self.prompt_field, self.response_field, self.text_prompt_chars, self.text_response_chars)


@dataclass(frozen=True)
class Job:
    """What a task needs to know."""

    settings: Settings
    parts: list[list[Piece]]
    fs: pyarrow.fs.FileSystem
    output: str
    strict: bool
    characters: bool
    """Whether the survey collects them."""

    @property
    def folder(self) -> str:
        """What the steps leave, until all is done."""
        return f"{self.output}/{WORK}"

    def work(self, name: str) -> str:
        return f"{self.folder}/{name}"


# --- the tasks ---------------------------------------------------------------------------------------------------


class Drops:
    """Counts what is left out, by reason, with examples: (piece of the part, position, text)."""

    def __init__(self):
        self.reasons: dict[str, dict[str, Any]] = {}

    def add(self, piece: int, problem: Problem) -> None:
        there = self.reasons.setdefault(problem.reason, {"count": 0, "examples": []})
        there["count"] += problem.count
        if len(there["examples"]) < EXAMPLES:
            there["examples"].append([piece, problem.position, problem.text])


def read_part(
    job: Job, part: int, drops: Drops, lines: list[int] | None = None
) -> Iterator[tuple[int, Pair, bool, bytes]]:
    """The part's usable pairs, each with the number of its piece, whether it is for validation, and its prompt's hash."""
    held_out = int(job.settings.val_fraction * 2**64)
    for number, piece in enumerate(job.parts[part]):
        for item in read_piece(piece, job.settings.mapping):
            if isinstance(item, Pair):
                try:
                    prompt, _ = item.prompt.encode(), item.response.encode()
                except UnicodeEncodeError as error:  # JSON can say "\ud800"
                    item = Problem("not Unicode text", item.position, ascii(error.object)[:80])
                else:
                    prompt_hash = hashlib.blake2b(prompt, digest_size=8).digest()
                    is_val = int.from_bytes(prompt_hash, "big") < held_out
                    yield number, item, is_val, prompt_hash
                    continue
            if isinstance(item, Problem):
                if job.strict:
                    after = f" after byte {piece.start:,}" if piece.start and piece.format != "parquet" else ""
                    text = f" ({item.text})" if item.text else ""
                    raise UserError(f"{piece.path}:{item.position}{after}: {item.reason}{text}")
                drops.add(number, item)
            elif lines is not None:
                lines[number] = item.lines


def survey(job: Job, part: int) -> dict[str, Any]:
    """Leaves hashes-PART: (pairs, 3) uint64, the hash of each pair (2) and its number in the part."""
    drops, lines, hashes = Drops(), [0] * len(job.parts[part]), bytearray()
    num_val, characters = 0, set()
    for _, pair, is_val, prompt_hash in read_part(job, part, drops, lines):
        hashes += hashlib.blake2b(prompt_hash + pair.response.encode(), digest_size=16).digest()
        num_val += is_val
        if job.characters:
            characters.update(pair.prompt, pair.response)
    rows = np.frombuffer(hashes, "<u8").reshape(-1, 2)
    rows = np.concatenate([rows, np.arange(len(rows), dtype="<u8")[:, None]], axis=1)
    groups = write_groups(job, f"hashes-{part:05d}", rows, rows[:, 0] & 0xFF, GROUPS)
    characters = "".join(sorted(characters))
    return {"groups": groups, "num_val": num_val, "lines": lines, "drops": drops.reasons, "characters": characters}


def find_duplicates(job: Job, ranges: tuple[int, int], groups: np.ndarray) -> dict[str, Any]:
    """Leaves duplicates-FIRST: (n, 1) uint64, the numbers of pairs that were there before, by part.

    ranges: which of the GROUPS to look at, [first, last). groups: (parts, GROUPS), how many pairs there are in each.
    """
    first, last = ranges
    rows = [read_groups(job, f"hashes-{part:05d}", counts, first, last, 3) for part, counts in enumerate(groups)]
    parts = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    rows = np.concatenate(rows)
    order = np.lexsort((rows[:, 2], parts, rows[:, 1], rows[:, 0]))
    same = (rows[order[1:], :2] == rows[order[:-1], :2]).all(axis=1)
    again = order[1:][same]
    return {"parts": write_groups(job, f"duplicates-{first:03d}", rows[again, 2:], parts[again], len(groups))}


def write_shard(
    job: Job, part: int, tokenizer_json: str, duplicates: dict[int, np.ndarray], pairs: list[int]
) -> dict[str, Any]:
    """Leaves the part's shard. duplicates: by file, how many of each part are in it. pairs: how many each part has."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the other cores have parts of their own
    tokenizer = cached_tokenizer(tokenizer_json)
    again = {
        int(row)
        for first, counts in duplicates.items()
        for row in read_groups(job, f"duplicates-{first:03d}", counts, part, part + 1, 1)[:, 0]
    }
    drops, writers, done = Drops(), {}, 0
    found = read_part(job, part, Drops())
    while chunk := list(islice(found, CHUNK)):
        new = [item for number, item in enumerate(chunk, start=done) if number not in again]
        done += len(chunk)
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
                kept["val" if is_val else "train"].append((prompt, response))
        for split, some in kept.items():
            if split not in writers:
                writers[split] = ShardWriter(job.fs, job.output, f"{split}-{part:05d}", tokenizer)
            writers[split].write(some)
    if done != pairs[part]:
        names = ", ".join(dict.fromkeys(piece.path for piece in job.parts[part]))
        raise UserError(
            f"changed while it was read: one of {names[:500]}; give another --output, or delete what is there"
        )
    return {"shards": {split: writer.close() for split, writer in writers.items()}, "drops": drops.reasons}


@lru_cache(maxsize=1)  # of a process: some take a second to build
def cached_tokenizer(text: str) -> Tokenizer:
    return tokenizer_from_json(text)


def write_groups(job: Job, name: str, rows: np.ndarray, groups: np.ndarray, num_groups: int) -> list[int]:
    """Writes rows (N, k) of uint64 in order of their group. Returns how many rows each group has."""
    write_file(job.fs, job.work(name), rows[np.argsort(groups, kind="stable")].astype("<u8").tobytes())
    return np.bincount(groups.astype(np.int64), minlength=num_groups).tolist()


def read_groups(job: Job, name: str, counts: np.ndarray, first: int, last: int, width: int) -> np.ndarray:
    """Rows (n, width) of groups [first, last) of what `write_groups` wrote, where each group has `counts` rows."""
    start, stop = (int(np.sum(counts[:group])) * 8 * width for group in (first, last))
    if start == stop:
        return np.empty((0, width), dtype="<u8")
    with job.fs.open_input_file(job.work(name)) as file:
        return np.frombuffer(file.read_at(stop - start, start), "<u8").reshape(-1, width)


# --- the run -----------------------------------------------------------------------------------------------------


def prepare(settings: Settings, inputs: list[str], output: str, strict: bool = False) -> dict[str, Any]:
    """Prepares the files of `inputs` into the folder or URI `output`. Returns what report.json says.

    strict: the first fault of the input is an error. Given again, it finishes what a kill left. Raises UserError.
    """
    from hrm_lm.cluster.start import started_ray  # it needs PyTorch, which the tasks do without

    for flag in ("prompt_field", "response_field"):
        parse_mapping(f"--{flag}", getattr(settings, flag))
    fixed = fixed_tokenizer(settings)
    files = find_files(inputs)
    fs, path = resolve(output)
    sizes = [file.num_bytes for file, _ in files]
    shard_bytes = (
        int(settings.shard_mb * 2**20) if settings.shard_mb else min(max(sum(sizes) // 256, 16 << 20), 256 << 20)
    )
    parts = plan_parts([file for file, _ in files], shard_bytes)
    job = Job(settings, parts, fs, path, strict, fixed is None and settings.train_tokenizer is None)

    plan = {"settings": asdict(settings), "files": [[file.path, file.num_bytes, mtime] for file, mtime in files]}
    plan |= {"tokenizer": fixed and hashlib.sha256(fixed.to_json().encode()).hexdigest()}
    fingerprint = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    if finished(job, output, fingerprint):
        return read_json(job, "report.json")

    with started_ray():
        together = max(READ_TOGETHER // shard_bytes, 1)
        surveyed = run_step(job, "survey", "reading", range(len(parts)), survey, together)
        groups = np.array([part["groups"] for part in surveyed])
        reasons = merge_drops(job, surveyed, surveyed)
        if not groups.sum():
            raise UserError(f"--input: no usable pair in {len(files)} file(s): {describe(reasons) or 'they are empty'}")
        num_val = sum(part["num_val"] for part in surveyed)
        if not 0 < num_val < groups.sum():
            raise UserError(
                f"--val_fraction {settings.val_fraction}: of {groups.sum():,} pairs, {num_val:,} would be for validation; "
                "give another share"
            )
        tokenizer = fixed or corpus_tokenizer(job, surveyed)
        ranges = group_ranges(groups.sum(axis=0))
        found = run_step(job, "duplicates", "deduplicating", ranges, partial(find_duplicates, groups=groups))
        duplicates = {first: np.array(task["parts"]) for (first, _), task in zip(ranges, found) if any(task["parts"])}
        pairs = groups.sum(axis=1).tolist()
        write = partial(write_shard, tokenizer_json=tokenizer.to_json(), duplicates=duplicates, pairs=pairs)
        # Half as many: the last of these tasks may leave other cores waiting.
        written = run_step(job, "shard", "tokenizing", range(len(parts)), write, max(together // 2, 1))

    shards = {
        split: [part["shards"][split] for part in written if split in part["shards"]] for split in ("train", "val")
    }
    for split, closed in shards.items():
        if not closed:
            raise UserError(f"no {split} pair is left: {describe(merge_drops(job, surveyed, written))}")
    report = {
        "files": len(files),
        "bytes": sum(sizes),
        "pairs": int(groups.sum()),
        "duplicates": sum(int(counts.sum()) for counts in duplicates.values()),
        **{split: sum(shard["samples"] for shard in closed) for split, closed in shards.items()},
        "dropped": merge_drops(job, surveyed, [*surveyed, *written]),
    }
    write_file(fs, f"{path}/report.json", json.dumps(report, indent=1).encode())
    fields = {"prompt": settings.prompt_field, "response": settings.response_field}
    write_meta(fs, path, tokenizer, shards, fields=fields, duplicates=report["duplicates"], plan=fingerprint)
    fs.delete_dir(job.folder)
    return report


def finished(job: Job, output: str, fingerprint: str) -> bool:
    """Whether `output` holds the result already; begins it where there is nothing. Refuses anything else."""
    shown = without_secrets(output)
    try:
        there = {
            info.base_name for info in job.fs.get_file_info(pyarrow.fs.FileSelector(job.output, allow_not_found=True))
        }
        if META in there:
            same = False
            with suppress(ValueError, AttributeError):  # not a meta.json of ours
                same = read_json(job, META).get("plan") == fingerprint
            if not same:
                raise UserError(f"--output {shown}: holds a dataset of other input or settings; give another --output")
            if WORK in there:  # killed while it was deleted
                job.fs.delete_dir(job.folder)
            return True
        if WORK in there:
            with suppress(FileNotFoundError):  # killed before it was written
                if read_json(job, f"{WORK}/plan.json")["plan"] != fingerprint:
                    raise UserError(
                        f"--output {shown}: holds an unfinished dataset of other input or settings; finish that, delete it, "
                        "or give another --output"
                    )
                return False
        elif there:
            raise UserError(f"--output {shown}: is not empty; give another --output")
        job.fs.create_dir(job.folder, recursive=True)
        write_file(job.fs, job.work("plan.json"), json.dumps({"plan": fingerprint}).encode())
    except OSError as error:
        raise UserError(f"--output {shown}: cannot be used: {' '.join(str(error).split())}") from None
    return False


def run_step(
    job: Job, name: str, title: str, items: Iterable[Any], task: Callable[..., dict[str, Any]], together: int = 1
) -> list[dict[str, Any]]:
    """The results of a task for each item, from storage where an earlier run left them, else run by Ray Data.

    together: how many items one of its tasks takes.
    """
    import ray.data
    from tqdm import tqdm

    items = list(items)
    results: dict[int, dict[str, Any]] = {}
    done = job.fs.get_file_info(pyarrow.fs.FileSelector(job.folder))
    done = {info.base_name for info in done}
    for i in range(len(items)):
        if f"{name}-{i:05d}.json" in done:
            results[i] = read_json(job, f"{WORK}/{name}-{i:05d}.json")
    rows = [{"i": i} for i in range(len(items)) if i not in results]
    print(f"{title}: {len(rows)} of {len(items)} task(s) to do", file=sys.stderr, flush=True)
    if rows:
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would say that its progress bars are off
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # theirs counts tasks, ours bytes
        dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // together)).map(
            partial(run_task, job, name, items, task)
        )
        weights = (
            [sum(piece.num_bytes for piece in part) for part in job.parts]
            if len(items) == len(job.parts)
            else [1] * len(items)
        )
        with tqdm(desc=title, total=sum(weights), unit="B", unit_scale=True, disable=None) as bar:
            bar.update(sum(weights[i] for i in results))
            for row in dataset.iter_rows():
                if row["error"]:
                    raise UserError(row["error"])
                results[row["i"]] = json.loads(row["result"])
                bar.update(weights[row["i"]])
    return [results[i] for i in range(len(items))]


def run_task(
    job: Job, name: str, items: list[Any], task: Callable[..., dict[str, Any]], row: dict[str, int]
) -> dict[str, Any]:
    """One row of a step's dataset. What the user can mend is a result: Ray would wrap an error, and try again."""
    gc.freeze()  # Ray's and pyarrow's objects stay: the collector need not walk through them over and over
    try:
        result = json.dumps(task(job, items[row["i"]]))
        write_file(job.fs, job.work(f"{name}-{row['i']:05d}.json"), result.encode())
    except (UserError, OSError) as error:
        return row | {"result": "", "error": str(error)}
    return row | {"result": result, "error": ""}


def read_json(job: Job, name: str) -> Any:
    with job.fs.open_input_stream(f"{job.output}/{name}") as stream:
        return json.loads(stream.read())


def group_ranges(totals: np.ndarray) -> list[tuple[int, int]]:
    """Ranges [first, last) of groups with up to GROUPED_TOGETHER pairs."""
    ranges, first, size = [], 0, 0
    for group, total in enumerate(totals.tolist()):
        if size and size + total > GROUPED_TOGETHER:
            ranges.append((first, group))
            first, size = group, 0
        size += total
    return [*ranges, (first, len(totals))]


# --- tokenizers --------------------------------------------------------------------------------------------------


def fixed_tokenizer(settings: Settings) -> Tokenizer | None:
    """The tokenizer that the settings name; None where the corpus decides."""
    if (settings.tokenizer is None) == (settings.train_tokenizer is None):
        raise UserError(
            "give --tokenizer (characters, bytes or the path of a tokenizer.json), or --train_tokenizer bpe"
        )
    if settings.train_tokenizer:
        require_tokenizers()
        return None
    if settings.tokenizer == "bytes":
        return ByteTokenizer()
    return None if settings.tokenizer == "characters" else pretrained_tokenizer(settings.tokenizer)


def corpus_tokenizer(job: Job, surveyed: list[dict[str, Any]]) -> Tokenizer:
    """Made of the corpus, once: a run that goes on after a kill uses what the first one made."""
    with suppress(FileNotFoundError):
        return tokenizer_from_json(json.dumps(read_json(job, f"{WORK}/{TOKENIZER}")))
    if job.characters:
        tokenizer = SimpleTokenizer.from_texts(part["characters"] for part in surveyed)
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
    """Byte-level BPE on the beginning of every part, TRAINING_CHARS in all."""
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
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=byte_level.alphabet(),  # so that no text is unknown to it
        show_progress=False,
    )
    trained.train_from_iterator(texts(), trainer)
    return PretrainedTokenizer(json.loads(trained.to_str()), 0, 1, 2, trained.get_vocab_size())


# --- the report --------------------------------------------------------------------------------------------------


def merge_drops(job: Job, surveyed: list[dict[str, Any]], results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By reason: how many, and examples as {place, text}. results: of one step, or of several one after another."""
    lines_before = {}  # piece -> lines of its file before it
    last_path, before = None, 0
    for part, result in enumerate(surveyed):
        for number, (piece, lines) in enumerate(zip(job.parts[part], result["lines"])):
            before = before if piece.path == last_path else 0
            lines_before[part, number] = before
            last_path, before = piece.path, before + lines
    merged: dict[str, dict[str, Any]] = {}
    for i, result in enumerate(results):
        part = i % len(job.parts)
        for reason, drop in result["drops"].items():
            there = merged.setdefault(reason, {"count": 0, "examples": []})
            there["count"] += drop["count"]
            for number, position, text in drop["examples"][: EXAMPLES - len(there["examples"])]:
                place = f"{job.parts[part][number].path}:{lines_before[part, number] + position}"
                there["examples"].append({"place": place.removesuffix(":0"), "text": text})
    return merged


def describe(reasons: dict[str, dict[str, Any]]) -> str:
    """`not JSON 3 (a.jsonl:7), ...`"""
    parts = [f"{reason} {drop['count']:,} ({drop['examples'][0]['place']})" for reason, drop in reasons.items()]
    return ", ".join(parts)
