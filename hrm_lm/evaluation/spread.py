"""The slices of an evaluation, done in this process or over a cluster. Both give the same scores, to rounding.

On a cluster each worker holds the model, and gets slice after slice. The slice of a worker that dies goes to another, and a
new worker takes its place. The model goes through Ray's object store, so workers need not be able to read the checkpoint.
"""

import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import Any

import torch
from tqdm import tqdm

from hrm_lm.cluster.capacity import cluster_nodes, workers_that_fit
from hrm_lm.cluster.start import say, started_ray
from hrm_lm.data.tokenizer import Tokenizer, tokenizer_from_json
from hrm_lm.errors import RunFailed, UserError
from hrm_lm.evaluation.scoring import Scores, Slice, score
from hrm_lm.models.contract import LanguageModel
from hrm_lm.parsing import one_line

ALL = 0
"""Instead of a number of workers: as many as the cluster has room for."""
SLICES_PER_WORKER = 4
"""So that workers end at about the same time."""
RETRIES = 3
"""How often a slice goes to another worker."""

Slices = Callable[[int], list[Slice]]
"""How many workers there are -> the slices."""


def scores_of(
    model: LanguageModel, tokenizer: Tokenizer, slices: Slices, workers: int | None
) -> list[tuple[Slice, Scores]]:
    """Every slice with its scores. workers: None for this process, ALL for as many as there is room for.

    Raises UserError where the workers do not fit the cluster or a batch does not fit a GPU, RunFailed where workers die.
    """
    if workers is None:
        pieces = slices(1)
        found: Any = ((number, score(model, tokenizer, piece)) for number, piece in enumerate(pieces))
        return gathered(pieces, found)
    # Ray prints what workers say on standard output, which is for results.
    with redirect_stdout(sys.stderr), started_ray():
        workers, kind = room_for(workers)
        pieces = slices(workers)
        workers = min(workers, len(pieces))
        say(f"{workers} worker(s) of 1 {kind}, {len(pieces)} slices")
        return gathered(pieces, over_cluster(model, tokenizer, pieces, workers, kind))


def gathered(pieces: list[Slice], found: Iterator[tuple[int, Scores]]) -> list[tuple[Slice, Scores]]:
    """All slices with their scores, which come in any order. A bar shows how far it is where standard error is a terminal."""
    total, done = sum(len(piece.indices) for piece in pieces), []
    with tqdm(desc="scoring", total=total, unit=" samples", disable=None) as bar:
        for number, scores in found:
            done.append((pieces[number], scores))
            bar.update(len(pieces[number].indices))
    return done


def room_for(workers: int) -> tuple[int, str]:
    """How many workers there will be, and what each takes: a GPU where the cluster has GPUs, else a CPU."""
    nodes, grown = cluster_nodes()
    kind = "GPU" if any(node.get("GPU", 0) for node in nodes + grown) else "CPU"
    room = workers_that_fit({kind: 1}, nodes, grown)
    if workers > room:
        raise UserError(f"--num_workers {workers}: the cluster has room for {room} workers of 1 {kind} each")
    return workers or max(room, 1), kind


def over_cluster(
    model: LanguageModel, tokenizer: Tokenizer, pieces: list[Slice], workers: int, kind: str
) -> Iterator[tuple[int, Scores]]:
    """The number of each slice with its scores, as they come."""
    import ray

    remote = ray.remote(num_cpus=int(kind == "CPU"), num_gpus=int(kind == "GPU"))(Worker)
    in_store, definition = ray.put(model.cpu()), tokenizer.to_json()
    pending: dict[Any, tuple[Any, int | None]] = {}
    """What each worker does: a slice by its number, or starting."""

    def start() -> None:
        worker = remote.remote([in_store], definition)
        pending[worker.ready.remote()] = worker, None

    for _ in range(workers):
        start()
    waiting, idle, deaths = deque(range(len(pieces))), deque[Any](), Counter[int | None]()
    while waiting or any(number is not None for _, number in pending.values()):
        (result, *_), _ = ray.wait(list(pending), num_returns=1)
        worker, number = pending.pop(result)
        try:
            scores = ray.get(result)
        except ray.exceptions.RayActorError as error:
            deaths[number] += 1
            if deaths[number] > RETRIES:
                what = "starting" if number is None else "scoring the same slice"
                raise RunFailed(f"{deaths[number]} workers died {what}: {one_line(error)[:500]}") from None
            say("a worker died; another takes its place")
            if number is not None:
                waiting.appendleft(number)
            start()
        else:
            idle.append(worker)
            if isinstance(scores, UserError):
                raise scores
            if number is None:
                deaths[None] = 0  # workers do start
            else:
                yield number, scores
        while waiting and idle:
            worker, number = idle.popleft(), waiting.popleft()
            pending[worker.score.remote(pieces[number])] = worker, number


class Worker:
    """A process of the cluster that holds the model."""

    def __init__(self, model: list[Any], tokenizer_json: str):
        """model: its reference in Ray's object store, in a list, since Ray would not keep it for another worker."""
        import ray

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.model = ray.get(model[0]).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.tokenizer = tokenizer_from_json(tokenizer_json)

    def ready(self) -> None:
        """Answered once the model is there."""

    def score(self, piece: Slice) -> Scores | UserError:
        """An error that the user can mend is returned: Ray would wrap it."""
        try:
            return score(self.model, self.tokenizer, piece)
        except UserError as error:
            return error
