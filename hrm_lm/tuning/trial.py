"""A trial: the same loop as a run's, reporting to Ray Tune.

A trial of a single worker trains in its own process, so it starts in milliseconds once there is a process. A trial of
several workers launches a TorchTrainer and passes on what the TorchTrainer reports, checkpoints included. So stopping,
perturbing and resuming work the same way for both.
"""

import logging
import os
import threading
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow.fs
import ray.train
import ray.tune
from ray.util.queue import Empty, Queue

from hrm_lm.cluster import ray_private
from hrm_lm.cluster.failures import Trainer, user_error
from hrm_lm.cluster.run_folder import without_placeholder
from hrm_lm.cluster.sessions import TuneSession, enter
from hrm_lm.cluster.start import say
from hrm_lm.cluster.watchdog import process_group
from hrm_lm.cluster.worker import train_loop_per_worker
from hrm_lm.config import Config
from hrm_lm.errors import DamagedCheckpoint, StorageError, UserError
from hrm_lm.training.checkpoint import Checkpoint, check_contents, obstacles, read_checkpoint
from hrm_lm.training.loop import train
from hrm_lm.tuning.results import whole_checkpoints
from hrm_lm.tuning.space import point

WORST_LOSS = 1e9
"""What a trial that diverged or was impossible reports: finite, so that schedulers can take quantiles."""


@dataclass(frozen=True, kw_only=True)
class TrialSetup:
    """What a sweep hands each of its trials."""

    base: dict[str, Any]
    """The fields that the trial's values are put into."""
    metric: str
    mode: Literal["min", "max"]
    driver_folder: str
    """Where the command was given: relative paths mean that folder."""
    in_process: bool
    """Whether the trial trains in Tune's own process; otherwise it launches a TorchTrainer."""
    workers: int
    resources: dict[str, float]
    """Of each worker."""


class QueueCallback(ray.train.UserCallback):
    """In the controller of a trial's TorchTrainer: passes reports on to the trial."""

    def __init__(self, queue: Queue):
        self.queue = queue

    def after_report(self, run_context, metrics, checkpoint) -> None:
        self.queue.put((metrics[0], checkpoint))


@ray_private.tolerates_outdated_restore
def run_trial(params: dict[str, Any], setup: TrialSetup) -> None:
    """What Tune runs. params: dotted path -> value."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # a line for each checkpoint is no news
    enter(setup.driver_folder)
    share_multiprocessors(setup.resources.get("GPU", 0))
    try:
        config = point(setup.base, params)
    except UserError as error:
        ray.tune.report(failed("invalid", 0, str(error), setup))
        return
    session = TuneSession(setup.metric)
    try:
        storage = ray_private.trial_folder()
        session.start_from = ray.tune.get_checkpoint()
        if session.start_from is None or whole(session.start_from) is None:
            session.start_from = newest_checkpoint(config, *storage)
        outcome = train(config, session) if setup.in_process else train_with_workers(config, setup, session, *storage)
    except StorageError:
        raise  # it may heal: Tune starts the trial again
    except UserError as error:
        outcome = {"status": "failed", "step": session.last_report.get("step", 0), "error": str(error)}
    if "error" in outcome:
        ray.tune.report(failed(outcome["status"], outcome["step"], outcome["error"], setup))
    elif session.last_report:
        ray.tune.report(session.last_report | {"status": outcome["status"]})


def share_multiprocessors(gpus: float) -> None:
    """Lets this process take at most twice its share of a GPU's multiprocessors, under NVIDIA's MPS. What the environment says
    already holds. Without MPS this changes nothing. It is due before the process first uses the GPU.

    gpus: the share.

    Eight processes that train the default config, on an H200, take 1,382 steps/s together with a quarter each, and 1,038
    where each may take all.
    """
    if 0 < gpus < 0.5:
        os.environ.setdefault("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", f"{200 * gpus:g}")


def failed(status: str, step: int, error: str, setup: TrialSetup) -> dict[str, Any]:
    worst = WORST_LOSS if setup.mode == "min" else -WORST_LOSS
    return {"step": step, "val_loss": WORST_LOSS, setup.metric: worst, "status": status, "error": error}


def train_with_workers(
    config: Config, setup: TrialSetup, session: TuneSession, fs: pyarrow.fs.FileSystem, folder: str
) -> dict[str, Any]:
    """Runs a TorchTrainer beside this thread, which hands the reports to Tune. Returns the loop's outcome.

    fs, folder: the trial's folder in storage. The workers write their checkpoints there, into a folder of this attempt,
    so every node reaches them and nothing is copied. Tune deletes the checkpoints that it does not keep.
    """
    # The workers go ahead of Tune, which may stop the trial, by few checkpoints.
    queue = Queue(maxsize=1, actor_options={"num_cpus": 0})
    trainer = Trainer(
        train_loop_per_worker,
        train_loop_config={
            "config": config.to_dict(),
            "driver_folder": setup.driver_folder,
            "display": "none",
            "start_from": session.start_from,
        },
        torch_config=process_group(config.ray.hang_timeout),
        scaling_config=ray.train.ScalingConfig(
            num_workers=setup.workers,
            use_gpu="GPU" in setup.resources,
            resources_per_worker=setup.resources,
        ),
        run_config=ray.train.RunConfig(
            name=f"workers_{session.attempt}",
            storage_path=folder,
            storage_filesystem=fs,
            callbacks=[QueueCallback(queue)],
            logging_config=ray_private.quiet_logging(),
        ),
    )
    ended: list[Any] = []

    def fit() -> None:
        try:
            ended.append(trainer.fit().return_value)
        except BaseException as error:
            ended.append(error)

    threading.Thread(target=fit, daemon=True).start()
    while not (ended and queue.empty()):
        try:
            reported, checkpoint = queue.get(timeout=0.2)
        except Empty:
            continue
        # Tune has a class of its own, though Ray Train's class holds the same.
        stored = ray.tune.Checkpoint(checkpoint.path, checkpoint.filesystem)
        session.report_stored(without_placeholder(reported), stored)
    if isinstance(ended[0], BaseException):
        raise user_error(ended[0]) or ended[0]
    return ended[0]


def whole(checkpoint: ray.tune.Checkpoint) -> Checkpoint | None:
    """What the checkpoint says of itself; None where it is damaged, which is told."""
    try:
        saved = read_checkpoint(checkpoint.path, checkpoint.filesystem, for_resume=True)
        check_contents(saved, checkpoint.filesystem)
    except DamagedCheckpoint as error:
        say(str(error))
        return None
    return saved


def newest_checkpoint(config: Config, fs: pyarrow.fs.FileSystem, folder: str) -> ray.tune.Checkpoint | None:
    """The newest whole checkpoint in a trial's folder that the trial can go on from. It is asked for where Tune knows of
    no checkpoint that is whole.

    Tune notes about once a second what it knows. A checkpoint that a killed sweep saved after Tune's last note is found
    here.
    """
    found = sorted(whole_checkpoints(fs, folder, for_resume=True), key=lambda item: item[1].progress.step, reverse=True)
    candidates = (ray.tune.Checkpoint(path, fs) for path, saved in found if not obstacles(saved.config, config))
    return next((checkpoint for checkpoint in candidates if whole(checkpoint)), None)
