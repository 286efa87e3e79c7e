"""A corpus to a prepared dataset, on the cluster, in three steps.

    survey      reads each part: the hashes of its pairs, the characters that occur, and what is wrong with it
    duplicates  looks at each range of hashes over all parts: a pair that occurred before is a duplicate
    tokenize    reads each part again and writes its shard, without what a source has over its cap

A step makes a Ray Data row of each of its tasks. A task is a pure function of the input, and leaves a file in
OUTPUT/.prepare when it is done. So a run that was killed does only the tasks that are left. meta.json makes the output
a dataset and is written last. The input is read twice so that each shard is written once: reading is cheap beside
tokenizing, and duplicates are not tokenized.

The hash of a pair's prompt alone decides on which side the pair is, so files that are added later move no pair from one
side to the other.
"""

import gc
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from hrm_lm.data.chat import Chat
from hrm_lm.data.prepared.format import write_file
from hrm_lm.data.prepared.writer import write_meta
from hrm_lm.data.records import Fields
from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.errors import UserError
from hrm_lm.filesystem import outlasting, resolve, shown, without_keys
from hrm_lm.prepare.reading import Piece, find_files, plan_parts
from hrm_lm.prepare.recipe import Recipe, sources_of
from hrm_lm.prepare.report import by_source, describe, merge_drops
from hrm_lm.prepare.tasks import Job, Settings, Source, find_duplicates, last_kept, survey, write_shard
from hrm_lm.prepare.tokenizer import corpus_tokenizer, fixed_tokenizer

GROUPED_TOGETHER = 1 << 20
"""Pairs whose hashes a task of the second step holds, unless a single range has more."""
READ_TOGETHER = 64 << 20
"""Input that a task of the first step reads. A part of 16 MB takes 0.2 s, as long as Ray Data takes to start a task."""


def prepare(
    settings: Settings, inputs: list[str], output: str, strict: bool = False, recipe: Recipe | None = None
) -> dict[str, Any]:
    """Prepares the files of `inputs`, or the sources of `recipe`, into the folder or URI `output`. Returns what report.json
    says.

    strict: the first fault of the input is an error. After a kill, the same call finishes what is left.
    Raises UserError where the input, the output or the settings cannot be used.
    """
    Fields.of(settings.prompt_field, settings.response_field, Chat(), "--")
    fixed = fixed_tokenizer(settings)
    chat = Chat.of(fixed)
    sources = sources_of(recipe, settings, chat) if recipe else [Source("", inputs, settings.mapping(chat))]
    files = []
    for number, source in enumerate(sources):
        flag = f"sources.{source.name}.input" if recipe else "--input"
        files += [(file._replace(source=number), mtime) for file, mtime in find_files(source.inputs, flag)]
    fs, path = resolve(output)
    sizes = [file.num_bytes for file, _ in files]
    shard_bytes = (
        max(int(settings.shard_mb * 2**20), 1)
        if settings.shard_mb
        else min(max(sum(sizes) // 256, 16 << 20), 256 << 20)
    )
    parts = plan_parts([file for file, _ in files], shard_bytes)
    job = Job(settings, sources, parts, fs, path, strict, fixed is None and settings.train_tokenizer is None)

    plan = {
        "settings": asdict(settings),
        "files": [[file.path, file.num_bytes, mtime] for file, mtime in files],
        "tokenizer": fixed and hashlib.sha256(fixed.to_json().encode()).hexdigest(),
    }
    plan |= {"recipe": without_keys(recipe.model_dump())} if recipe else {}
    fingerprint = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    if not job.finished(output, fingerprint):
        with job.lock(output):
            if not job.finished(output, fingerprint):  # by the command that held the lock
                together = max(READ_TOGETHER // shard_bytes, 1)
                write_dataset(job, files, fixed, fingerprint, together, recipe)
    job.remove_work(output)
    return job.read_json("report.json")


def write_dataset(
    job: Job,
    files: list[tuple[Piece, int]],
    fixed: Tokenizer | None,
    fingerprint: str,
    together: int,
    recipe: Recipe | None,
) -> None:
    """Runs the three steps and writes the dataset's description. Raises UserError as `prepare` does.

    files: the input with times of modification. fixed: the tokenizer that does not depend on the corpus.
    fingerprint: what `Output.finished` looks for. together: how many parts a task of Ray reads.
    """
    from hrm_lm.cluster.start import started_ray  # it needs PyTorch; the tasks, which import this file, do not

    settings, parts, fs, path = job.settings, job.parts, job.fs, job.output
    sizes = [file.num_bytes for file, _ in files]
    with started_ray():
        surveyed = run_step(job, "survey", "reading", range(len(parts)), survey, together)
        groups = np.array([result["groups"] for result in surveyed])
        reasons = merge_drops(job, surveyed, surveyed)
        if not groups.sum():
            raise UserError(
                f"{'--sources' if recipe else '--input'}: no usable pair in {len(files)} file(s): {describe(reasons) or 'they are empty'}"
            )
        num_val = sum(result["num_val"] for result in surveyed)
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
        last = {
            source.name: last_kept(job, number, ranges, groups, duplicates) for number, source in enumerate(job.sources)
        }
        write = partial(write_shard, tokenizer_json=tokenizer.to_json(), duplicates=duplicates, pairs=pairs, last=last)
        # Half as many parts a task as above: tokenizing takes longer, and cores wait while the last task runs.
        written = run_step(job, "shard", "tokenizing", range(len(parts)), write, max(together // 2, 1))

    shards = {
        split: [result["shards"][split] for result in written if split in result["shards"]]
        for split in ("train", "val")
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
    more: dict[str, Any] = {}
    if recipe:
        report["sources"] = by_source(job, groups, duplicates, written)
        more["recipe"] = without_keys(recipe.model_dump())
    write_file(fs, f"{path}/report.json", json.dumps(report, indent=1).encode())
    fields = {"prompt": settings.prompt_field, "response": settings.response_field}
    write_meta(fs, path, tokenizer, shards, fields=fields, duplicates=report["duplicates"], plan=fingerprint, **more)


def run_step(
    job: Job, name: str, title: str, items: Iterable[Any], task: Callable[..., dict[str, Any]], together: int = 1
) -> list[dict[str, Any]]:
    """The result of `task` for each item. Ray Data runs the tasks whose results no earlier run has left in storage.

    title: what the progress bar calls the step. together: how many items a task of Ray takes.
    Raises UserError for the first task that failed.
    """
    import ray.data
    from tqdm import tqdm

    items = list(items)
    results: dict[int, dict[str, Any]] = {}
    done = job.list()
    for i in range(len(items)):
        if f"{name}-{i:05d}.json" in done:
            results[i] = job.read_json(f"{job.WORK}/{name}-{i:05d}.json")
    rows = [{"i": i} for i in range(len(items)) if i not in results]
    print(f"{title}: {len(rows)} of {len(items)} task(s) to do", file=sys.stderr, flush=True)
    if rows:
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # Ray would say that its progress bars are off
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # Ray's bar counts tasks; the bar below counts bytes
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
    """Does the task of one row of a step's dataset.

    An error that the user can mend is returned: Ray would wrap an exception, and run the task again.
    """
    gc.freeze()  # Ray's and pyarrow's objects stay, so the collector need not walk through them over and over
    try:
        file = f"{name}-{row['i']:05d}.json"
        # A shard's stream does not go on after an error: the task is done again, from its beginning.
        result = json.dumps(outlasting(f"{shown(job.fs, job.work(file))}: failed", lambda: task(job, items[row["i"]])))
        write_file(job.fs, job.work(file), result.encode())
    except UserError as error:
        return row | {"result": "", "error": str(error)}
    return row | {"result": result, "error": ""}


def group_ranges(totals: np.ndarray) -> list[tuple[int, int]]:
    """Ranges [first, last) of groups that hold up to GROUPED_TOGETHER pairs. totals: the pairs of each group."""
    ranges, first, size = [], 0, 0
    for group, total in enumerate(totals.tolist()):
        if size and size + total > GROUPED_TOGETHER:
            ranges.append((first, group))
            first, size = group, 0
        size += total
    return [*ranges, (first, len(totals))]
