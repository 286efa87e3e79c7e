"""A trial: the same loop as a run's, reporting to Ray Tune.

A trial of a single worker trains in its own process, so it starts in milliseconds once there is a process. A trial of
several workers launches a TorchTrainer and passes on what the TorchTrainer reports, checkpoints included. So stopping,
perturbing and resuming work the same way for both.
"""

import logging
import shutil
import tempfile
import threading
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow.fs
import ray.train
import ray.tune
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from hrm_lm.cluster import ray_private
from hrm_lm.cluster.run_folder import without_placeholder
from hrm_lm.cluster.sessions import TuneSession, enter, scored
from hrm_lm.cluster.start import say
from hrm_lm.cluster.worker import train_loop_per_worker
from hrm_lm.config import Config
from hrm_lm.errors import DamagedCheckpoint, UserError
from hrm_lm.training.checkpoint import Checkpoint, check_contents, obstacles, read_checkpoint
from hrm_lm.training.loop import train
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
    try:
        config = point(setup.base, params)
    except UserError as error:
        ray.tune.report(failed("invalid", 0, str(error), setup))
        return
    start_from = ray.tune.get_checkpoint()
    if start_from is None or whole(start_from) is None:
        start_from = orphan(config)
    if setup.in_process:
        session = TuneSession(setup.metric, start_from)
        outcome, last = train(config, session), session.last_report
    else:
        outcome, last = train_with_workers(config, setup, start_from)
    if "error" in outcome:
        ray.tune.report(failed(outcome["status"], outcome["step"], outcome["error"], setup))
    elif last:
        ray.tune.report(last | {"status": outcome["status"]})


def failed(status: str, step: int, error: str, setup: TrialSetup) -> dict[str, Any]:
    worst = WORST_LOSS if setup.mode == "min" else -WORST_LOSS
    return {"step": step, "val_loss": WORST_LOSS, setup.metric: worst, "status": status, "error": error}


def train_with_workers(
    config: Config, setup: TrialSetup, start_from: ray.tune.Checkpoint | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs a TorchTrainer beside this thread, which hands the reports to Tune. Returns outcome and last metrics."""
    queue = Queue(maxsize=1, actor_options={"num_cpus": 0})  # no checkpoint goes before Tune has its copy
    scratch = tempfile.mkdtemp(prefix="workers_", dir=ray.tune.get_context().get_trial_dir())
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "config": config.to_dict(),
            "driver_folder": setup.driver_folder,
            "display": "none",
            "start_from": start_from,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=setup.workers,
            use_gpu="GPU" in setup.resources,
            resources_per_worker=setup.resources,
        ),
        run_config=ray.train.RunConfig(
            name="workers",
            storage_path=scratch,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=4),
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
    metrics: dict[str, Any] = {}
    try:
        while not (ended and queue.empty()):
            try:
                reported, checkpoint = queue.get(timeout=0.2)
            except Empty:
                continue
            metrics = scored(without_placeholder(reported), setup.metric)
            # Tune has a class of its own, though Ray Train's class holds the same.
            ray.tune.report(metrics, checkpoint=ray.tune.Checkpoint(checkpoint.path, checkpoint.filesystem))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return ended[0], metrics


def whole(checkpoint: ray.tune.Checkpoint) -> Checkpoint | None:
    """What the checkpoint says of itself; None where it is damaged, which is told."""
    try:
        saved = read_checkpoint(checkpoint.path, checkpoint.filesystem, for_resume=True)
        check_contents(saved, checkpoint.filesystem)
    except DamagedCheckpoint as error:
        say(str(error))
        return None
    return saved


def orphan(config: Config) -> ray.tune.Checkpoint | None:
    """This trial's newest whole checkpoint in storage that it can go on from. It is asked for where Tune knows of none
    that is whole.

    Tune notes about once a second what it knows. A checkpoint that a killed sweep saved after Tune's last note is found
    here.
    """
    fs, folder = ray_private.trial_folder()
    infos = fs.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True))
    for path in sorted((i.path for i in infos if i.base_name.startswith("checkpoint_")), reverse=True):
        checkpoint = ray.tune.Checkpoint(path, fs)
        saved = whole(checkpoint)  # not where the upload was cut
        if saved and not obstacles(saved.config, config):
            return checkpoint
    return None
