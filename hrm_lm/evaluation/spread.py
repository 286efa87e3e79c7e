"""The slices of an evaluation, done in this process or over a cluster. Both give the same scores, to rounding.

On a cluster Ray Data has a pool of workers, each with the model. A worker that dies is started again, and Ray Data has the
slice that it held done again. The model goes through Ray's object store, so the checkpoint need not be where workers could
read it.
"""

import logging
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from hrm_lm.cluster.capacity import cluster_nodes, workers_that_fit
from hrm_lm.cluster.start import say, started_ray
from hrm_lm.data.tokenizer import Tokenizer, tokenizer_from_json
from hrm_lm.errors import RunFailed, UserError
from hrm_lm.evaluation.scoring import Scores, Slice, score
from hrm_lm.models.contract import LanguageModel

ALL = 0
"""Instead of a number of workers: as many as the cluster has room for."""
SLICES_PER_WORKER = 4
"""So that workers end at about the same time."""

Slices = Callable[[int], list[Slice]]
"""How many workers there are -> the slices."""


def scores_of(
    model: LanguageModel, tokenizer: Tokenizer, slices: Slices, workers: int | None
) -> list[tuple[Slice, Scores]]:
    """Every slice with its scores. workers: None for this process.

    Raises UserError where the workers do not fit the cluster or a batch does not fit a GPU, RunFailed where workers fail.
    """
    if workers is None:
        pieces = slices(1)
        with bar(pieces) as shown:
            return [(piece, score(model, tokenizer, piece)) for piece in counted(pieces, shown)]
    with started_ray():
        workers, resources = room_for(workers)
        pieces = slices(workers)
        workers = min(workers, len(pieces))
        say(f"{workers} worker(s) of {resources}, {len(pieces)} slices")
        with bar(pieces) as shown:
            found = {}
            for number, scores in over_cluster(model, tokenizer, pieces, workers, resources):
                found[number] = scores
                shown.update(len(pieces[number].indices))
    return [(piece, found[number]) for number, piece in enumerate(pieces)]


def bar(pieces: list[Slice]) -> tqdm:
    """A progress bar, where standard error is a terminal."""
    return tqdm(desc="scoring", total=sum(len(piece.indices) for piece in pieces), unit=" samples", disable=None)


def counted(pieces: list[Slice], shown: tqdm) -> Iterator[Slice]:
    for piece in pieces:
        yield piece
        shown.update(len(piece.indices))


def room_for(workers: int) -> tuple[int, dict[str, float]]:
    """How many workers there will be, and what each takes: a GPU where the cluster has GPUs, else a CPU."""
    nodes, grown = cluster_nodes()
    kind = "GPU" if any(node.get("GPU", 0) for node in nodes + grown) else "CPU"
    room = workers_that_fit({kind: 1}, nodes, grown)
    if workers > room:
        raise UserError(f"--num_workers {workers}: the cluster has room for {room} workers of 1 {kind} each")
    return workers or max(room, 1), {kind: 1}


def over_cluster(
    model: LanguageModel, tokenizer: Tokenizer, pieces: list[Slice], workers: int, resources: dict[str, float]
) -> Iterator[tuple[int, Scores]]:
    """The number of each slice with its scores, as they come."""
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # Ray would say that its progress bars are off
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"number": number, "slice": pickle.dumps(piece)} for number, piece in enumerate(pieces)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Worker,
        fn_constructor_args=[ray.put(model.cpu()), tokenizer.to_json()],
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=resources.get("CPU"),
        num_gpus=resources.get("GPU"),
    )
    try:
        for row in dataset.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield row["number"], pickle.loads(row["scores"])  # what a worker of this command wrote
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RunFailed(f"evaluation failed: {reason}") from error


class Worker:
    """What Ray Data starts in each process of its pool, and calls for each row."""

    def __init__(self, model: LanguageModel, tokenizer_json: str):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()
        self.tokenizer = tokenizer_from_json(tokenizer_json)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """An error that the user can mend is returned: Ray would wrap it, and try again."""
        try:
            scores = score(self.model, self.tokenizer, pickle.loads(row["slice"]))
        except UserError as error:
            return {"number": row["number"], "scores": b"", "error": str(error)}
        return {"number": row["number"], "scores": pickle.dumps(scores), "error": ""}
