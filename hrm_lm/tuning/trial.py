"""A trial: the same loop as a run's, reporting to Ray Tune.

A trial of one worker trains in its own process, so it starts in milliseconds once there is a process; one of several
launches a TorchTrainer and passes on what that reports, checkpoints included, so stopping, perturbing and resuming
work the same way for both.
"""

import logging
import shutil
import tempfile
import threading
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Iterator

import pyarrow.fs
import ray
import ray.train
import ray.tune
import torch
from ray.train._internal.session import get_session
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import LoggingConfig
from ray.util.queue import Empty, Queue

from hrm_lm.config import Config
from hrm_lm.errors import UserError
from hrm_lm.training.checkpoint import read_checkpoint
from hrm_lm.training.loop import train, train_loop_per_worker
from hrm_lm.training.session import enter, use_assigned_cpus
from hrm_lm.tuning.space import point

WORST_LOSS = 1e9
"""What a trial that diverged or was impossible reports: finite, so that schedulers can take quantiles."""


class TuneSession:
    """A trial of one worker, seen from the loop."""

    rank, world_size, display, event_folder = 0, 1, "none", None  # Tune writes the event files

    def __init__(self, config: Config):
        self.config, self.metrics = config, {}
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        use_assigned_cpus(self.device)

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        checkpoint = ray.tune.get_checkpoint() or orphan(self.config)
        with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
            yield Path(folder) if folder else None

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="checkpoint_"))

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        self.metrics = metrics
        try:
            ray.tune.report(metrics, checkpoint=ray.tune.Checkpoint.from_directory(checkpoint))
        finally:
            shutil.rmtree(checkpoint, ignore_errors=True)


class OutdatedRestore:
    """Mixed into the class that Tune makes of `run_trial`: what Tune last noted of a killed sweep's trial may be gone.

    A newer checkpoint took its place, and `orphan` finds that.
    """

    def restore(self, checkpoint) -> None:
        with suppress(ValueError):  # Tune's for a checkpoint that is not there
            super().restore(checkpoint)


class QueueCallback(ray.train.UserCallback):
    """In the controller of a trial's TorchTrainer: passes reports on to the trial."""

    def __init__(self, queue: Queue):
        self.queue = queue

    def after_report(self, run_context, metrics, checkpoint) -> None:
        self.queue.put((metrics[0], checkpoint))


def run_trial(params: dict[str, Any], setup: dict[str, Any]) -> None:
    """What Tune runs. params: dotted path -> value; setup: what `build_tuner` gives every trial."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # a line for each checkpoint is no news
    enter(setup["driver_folder"])
    try:
        config = point(setup["base"], params)
    except UserError as error:
        ray.tune.report(failed("invalid", 0, str(error), setup))
        return
    if setup["in_process"]:
        session = TuneSession(config)
        outcome, last = train(config, session), session.metrics
    else:
        outcome, last = train_with_workers(config, setup)
    if outcome["status"] == "diverged":
        ray.tune.report(failed("diverged", outcome["step"], outcome["error"], setup))
    elif last:
        ray.tune.report(last | {"status": outcome["status"]})


run_trial.__mixins__ = (OutdatedRestore,)


def failed(status: str, step: int, error: str, setup: dict[str, Any]) -> dict[str, Any]:
    worst = WORST_LOSS if setup["mode"] == "min" else -WORST_LOSS
    return {"step": step, "val_loss": WORST_LOSS, setup["metric"]: worst, "status": status, "error": error}


def train_with_workers(config: Config, setup: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs a TorchTrainer beside this thread, which hands its reports to Tune. Returns outcome and last metrics."""
    queue = Queue(maxsize=1, actor_options={"num_cpus": 0})  # so that no checkpoint is gone before Tune has its copy
    scratch = tempfile.mkdtemp(prefix="workers_", dir=ray.tune.get_context().get_trial_dir())
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "config": config.to_dict(),
            "driver_folder": setup["driver_folder"],
            "display": "none",
            "event_folder": None,
            "start_from": ray.tune.get_checkpoint() or orphan(config),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=setup["workers"],
            use_gpu="GPU" in setup["resources"],
            resources_per_worker=setup["resources"],
        ),
        run_config=ray.train.RunConfig(
            name="workers",
            storage_path=scratch,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=4),
            callbacks=[QueueCallback(queue)],
            logging_config=LoggingConfig(log_level="WARNING"),
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
                metrics, checkpoint = queue.get(timeout=0.2)
            except Empty:
                continue
            # As Tune's own class; Ray Train's is another, though it holds the same.
            ray.tune.report(metrics, checkpoint=ray.tune.Checkpoint(checkpoint.path, checkpoint.filesystem))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return ended[0], metrics


def orphan(config: Config) -> ray.tune.Checkpoint | None:
    """This trial's newest checkpoint in storage that Tune does not know of.

    Tune notes what it knows about once a second; what a killed sweep saved after its last note is found here.
    """
    storage = get_session().storage
    fs, folder = storage.storage_filesystem, storage.trial_fs_path
    infos = fs.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True))
    for path in sorted((i.path for i in infos if i.base_name.startswith("checkpoint_")), reverse=True):
        checkpoint = ray.tune.Checkpoint(path, fs)
        try:
            with checkpoint.as_directory() as local:
                theirs = read_checkpoint(local).config
        except UserError:  # torn: the upload was cut
            continue
        if theirs.model == config.model and theirs.optim == config.optim and theirs.train == config.train:
            return checkpoint
    return None
