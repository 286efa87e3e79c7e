"""Answers in bulk, on the cluster: one task reads the input in chunks, and actors, each with the model, answer them.

An actor writes a chunk's answers as a file of the output, and then a file in OUTPUT/.predict that says so. A run that was
killed therefore repeats the chunks that were in the making, and no other, into the same files. An answer is a function of
its record and the settings: of the record's number where it is drawn.
"""

import hashlib
import json
import logging
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from hrm_lm.cluster.capacity import cluster_nodes, workers_that_fit
from hrm_lm.cluster.output import PLAN
from hrm_lm.cluster.start import say, started_ray
from hrm_lm.data.prepared.format import write_file
from hrm_lm.errors import UserError
from hrm_lm.filesystem import local_copy, shown
from hrm_lm.predict.chunks import parquet_schema, read_chunks
from hrm_lm.predict.tasks import REPORT, Job, answer_chunk
from hrm_lm.prepare.report import describe
from hrm_lm.prepare.tasks import EXAMPLES
from hrm_lm.training.checkpoint import Checkpoint, load_model

READ_TOGETHER = 32
"""Files of the work folder that are read at the same time: object storage takes its time for each."""


def predict(
    job: Job, location: str, checkpoint: Checkpoint, mtimes: list[int], num_workers: int | None
) -> dict[str, Any]:
    """Answers the records of `job.files` into `job.output`. Returns what REPORT says.

    location: the output as the user gave it. mtimes: of the files. num_workers: at most so many actors; None: as many as
    the cluster has CPUs or, where it has GPUs, GPUs. After a kill, the same call goes on.
    Raises UserError where the input, the output or the settings cannot be used, and where no record could be answered.
    """
    plan = {
        "settings": asdict(job.settings),
        "files": [[file.path, file.num_bytes, mtime] for file, mtime in zip(job.files, mtimes, strict=True)],
        # Checkpoints of earlier versions have no checksums.
        "checkpoint": checkpoint.files or [job.checkpoint, checkpoint.progress.step],
        "tokenizer": checkpoint.tokenizer.to_json(),
    }
    fingerprint = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    # A run that goes on keeps the chunks as they are, whatever its batches.
    first_size = max(job.batch_size // job.settings.n, 1)
    if not job.finished(location, fingerprint, first_size=first_size):
        with job.lock(location):
            if not job.finished(location, fingerprint, first_size=first_size):  # by the command that held the lock
                job = replace(job, first_size=job.read_json(f"{job.WORK}/{PLAN}")["first_size"])
                results = all_results(job, num_workers)
                write_report(job, results, fingerprint)
    job.remove_work(location)
    report = job.read_json(REPORT)
    if not report["answered"]:
        raise UserError(f"--input: no record could be answered: {describe(report['problems'])}")
    return report


def all_results(job: Job, num_workers: int | None) -> list[dict[str, Any]]:
    """What `answer_chunk` returned for each chunk; answers those that are left. Raises UserError for the first failure."""
    from tqdm import tqdm

    numbers = sorted(int(name[6:-5]) for name in job.list() if name.startswith("chunk-") and name.endswith(".json"))
    with ThreadPoolExecutor(READ_TOGETHER) as pool:
        found = pool.map(lambda number: job.read_json(f"{job.WORK}/chunk-{number:06d}.json"), numbers)
        results = dict(zip(numbers, found))
    if results:
        say(f"{sum(result['records'] for result in results.values()):,} records were answered before")
    if not is_whole(results):
        if job.settings.format == "parquet":
            job = replace(job, schema=parquet_schema(job.files))
        total = sum(file.num_bytes for file in job.files)
        with started_ray(), tqdm(desc="answering", total=total, unit="B", unit_scale=True, disable=None) as bar:
            tokens = 0
            for number, result, num_bytes in run_actors(job, set(results), num_workers):
                results[number] = result
                bar.update(num_bytes)
                tokens += result["tokens"]
                bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
        if not is_whole(results):
            raise RuntimeError(f"Ray Data left out a chunk of {len(results)}")
    return [results[number] for number in range(len(results))]


def is_whole(results: dict[int, dict[str, Any]]) -> bool:
    """Whether these are the results of all chunks."""
    return bool(results) and len(results) == max(results) + 1 and results[max(results)]["is_last"]


def run_actors(job: Job, done: set[int], num_workers: int | None) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yields number, result and bytes of each chunk that is not `done`, as it is answered. Raises UserError."""
    import ray.data

    most, resources = room(num_workers)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # Ray would say that its progress bars are off
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False  # Ray's bar counts tasks; ours counts bytes
    context.target_max_block_size = 1  # each chunk goes to an actor as soon as it is read
    with ray.data.DataContext.current(context):
        chunks = ray.data.from_items([{"number": 0}]).map_batches(
            partial(read, job, done), batch_size=1, batch_format="pyarrow", num_cpus=0
        )  # the actors may take all CPUs
        answered = chunks.map_batches(
            Answerer,
            fn_constructor_args=(job,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
        )
    for row in answered.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield row["number"], json.loads(row["result"]), row["num_bytes"]


def room(num_workers: int | None) -> tuple[int, dict[str, float]]:
    """The most actors, and what each takes. Raises UserError where the cluster has no room for so many."""
    nodes, grown = cluster_nodes()
    use_gpus = any(node.get("GPU", 0) >= 1 for node in nodes + grown)
    resources = {"CPU": 1.0, "GPU": 1.0} if use_gpus else {"CPU": 1.0}
    most = workers_that_fit(resources, nodes, grown)
    if most < (num_workers or 1):
        each = " and ".join(f"{amount} {kind}" for kind, amount in resources.items())
        raise UserError(
            f"--num_workers: {num_workers or 1} workers of {each} each do not fit the cluster: it has room for {most}"
        )
    return num_workers or most, resources


def read(job: Job, done: set[int], _: pa.Table) -> Iterator[pa.Table]:
    """The task that reads: a row for each chunk."""
    try:
        for chunk in read_chunks(job.files, job.first_size, job.schema, done):
            yield pa.table({"chunk": pa.array([pickle.dumps(chunk)], pa.large_binary()), "error": [""]})
    except UserError as error:  # Ray would wrap an exception, and run the task again
        yield pa.table({"chunk": pa.array([b""], pa.large_binary()), "error": [str(error)]})


class Answerer:
    """An actor: it has the model, and answers chunks."""

    def __init__(self, job: Job):
        self.job, self.error = job, ""
        try:
            job.read_json(f"{job.WORK}/{PLAN}")
            with local_copy(job.checkpoint, job.checkpoint_fs) as folder:
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                self.model, self.tokenizer, _ = load_model(folder, device)
        except FileNotFoundError:
            place = shown(job.fs, job.output)
            self.error = f"--output {place}: a node does not reach it; give a URI, or a folder that all nodes share"
        except UserError as error:
            self.error = str(error)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """An error that the user can mend is returned: Ray would wrap an exception."""
        ((chunk, error),) = zip(*(rows[name].to_pylist() for name in ("chunk", "error")))
        number, num_bytes, result = 0, 0, ""
        error = error or self.error
        if not error:
            try:
                chunk = pickle.loads(chunk)
                number, num_bytes = chunk.number, chunk.num_bytes
                result = json.dumps(answer_chunk(self.job, self.model, self.tokenizer, chunk))
                write_file(self.job.fs, self.job.work(f"chunk-{number:06d}.json"), result.encode())
            except UserError as failure:
                error = str(failure)
        return pa.table({"number": [number], "result": [result], "num_bytes": [num_bytes], "error": [error]})


def write_report(job: Job, results: list[dict[str, Any]], fingerprint: str) -> None:
    """Adds up the results and makes the output whole."""
    counts = ("records", "answered", "replaced", "prompt_tokens", "tokens", "seconds")
    report: dict[str, Any] = {name: sum(result[name] for result in results) for name in counts}
    problems: dict[str, dict[str, Any]] = {}
    for result in results:
        for reason, some in result["problems"].items():
            total = problems.setdefault(reason, {"count": 0, "examples": []})
            total["count"] += some["count"]
            total["examples"] += some["examples"][: EXAMPLES - len(total["examples"])]
    report |= {
        "tokens_per_s": report["tokens"] / max(report["seconds"], 1e-9),
        "files": len(results),
        "problems": problems,
        "settings": asdict(job.settings),
        "checkpoint": shown(job.checkpoint_fs, job.checkpoint),
        "plan": fingerprint,
    }
    write_file(job.fs, f"{job.output}/{REPORT}", json.dumps(report, indent=1).encode())
