"""What happens when workers fail: a UserError ends the run, anything else starts the workers again and is told. A node
that was announced to go is no failure.

Ray Train has no public place for either. Left alone, it starts the workers again after any error, and says nothing of it
at the log level that this project gives it.
"""

import logging
from typing import Any

import pyarrow.fs
from ray.exceptions import RayActorError
from ray.train import Result, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import backend_setup
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution import controller
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.train.v2.api import data_parallel_trainer

from hrm_lm.cluster.preemption import Preempted
from hrm_lm.cluster.scaling import ScalingPolicy
from hrm_lm.cluster.start import say
from hrm_lm.errors import StorageError, UserError
from hrm_lm.filesystem import outlasting, shown
from hrm_lm.parsing import one_line


class Trainer(TorchTrainer):
    """A TorchTrainer with this project's failure policy, and with its scaling policy where `ray.num_workers` is a range."""

    def _initialize_and_run_controller(self, **options: Any) -> Result:
        options["failure_policy"] = FailurePolicy(self.run_config.failure_config)
        if self.scaling_config.elasticity_enabled:
            steps = self.train_loop_config["config"]["train"]["steps"]
            options["scaling_policy"] = ScalingPolicy(self.scaling_config, steps)
        data_parallel_trainer.TrainController = TrainController  # it cannot be handed over
        return super()._initialize_and_run_controller(**options)


class FailurePolicy(DefaultFailurePolicy):
    """Lives in Ray Train's controller, whose standard error Ray hands to the driver."""

    attempt = 1

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        failures = getattr(training_failed_error, "worker_failures", {})  # by rank
        told = user_error(training_failed_error)
        if told and not isinstance(told, StorageError):
            return FailureDecision.RAISE
        if any(isinstance(e, Preempted) for e in failures.values()):
            decision = FailureDecision.RETRY
        else:
            decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY:
            self.attempt += 1
            ranks: dict[str, list[str]] = {}  # by reason
            for rank, error in sorted(failures.items()):
                ranks.setdefault(_line(error), []).append(str(rank))
            what = "; ".join(f"worker {', '.join(some)}: {reason}" for reason, some in ranks.items())
            say(
                f"{what or _line(training_failed_error)}\n"
                f"attempt {self.attempt} starts the workers from the last checkpoint "
                f"(failures of workers so far: {self._worker_group_failures}, ray.max_failures: {self.failure_config.max_failures})"
            )
        return decision


class WorkerGroup(worker_group.WorkerGroup):
    """Starts the workers again where a worker dies just when its loop is to begin, as after any other death.

    Ray Train's own class takes that death for a failure of the controller. So it ends the run, and it keeps the resources of the
    workers that are left.
    """

    def _start(self) -> None:
        try:
            super()._start()
        except Exception as error:
            if self.has_started():
                self.shutdown()
            if isinstance(error, RayActorError):
                raise WorkerGroupStartupFailedError("a worker died when its loop was to begin") from error
            raise


class TrainController(controller.TrainController):
    """Reads a run's list of checkpoints when it starts, and then writes it in place; where that fails, Ray Train's own ends the
    run. Here storage that is away or full is waited for, and a kill leaves the list as it was.
    """

    worker_group_cls = WorkerGroup

    def __init__(self, *, train_run_context: TrainRunContext, **options: Any):
        CheckpointManager._write_state_to_storage = write_list
        logging.getLogger(autoscaling_coordinator_client.__name__).addFilter(without_traceback)
        run = train_run_context.run_config
        outlasting(
            f"{shown(run.storage_filesystem, f'{run.storage_path}/{run.name}')}: cannot be read or written",
            lambda: controller.TrainController.__init__(self, train_run_context=train_run_context, **options),
        )
        # After each failure it would log the traceback of what FailurePolicy tells in a line. Ray Train's own start resets levels.
        logging.getLogger(backend_setup.__name__).setLevel(logging.ERROR)


def without_traceback(record: logging.LogRecord) -> bool:
    """Puts the error of a warning into its line, in place of the traceback. The warning says that the cluster is busy, and that
    Ray Train asks again.
    """
    if record.exc_info and (error := record.exc_info[1]):
        record.msg, record.exc_info = f"{record.msg} ({one_line(error)})", None
    return True


def write_list(manager: CheckpointManager) -> None:
    storage, text = manager._storage_context, manager._save_state()
    fs, path = storage.storage_filesystem, storage.checkpoint_manager_snapshot_path
    local = isinstance(fs, pyarrow.fs.LocalFileSystem)  # an object in a bucket is replaced whole or not at all
    written = f"{path}.new" if local else path

    def attempt() -> None:
        with fs.open_output_stream(written, compression=None) as stream:
            stream.write(text.encode())
        if local:
            fs.move(written, path)

    outlasting(f"{shown(fs, path)}: cannot be written", attempt)


def user_error(error: BaseException) -> UserError | None:
    """The UserError that ended a worker, if any, with the worker's rank. A StorageError, which may heal, comes second.

    The other workers' errors follow from it: their collectives are cut off.
    """
    failures = sorted(getattr(error, "worker_failures", {}).items())
    told = [(rank, failure) for rank, failure in failures if isinstance(failure, UserError)]
    if not told:
        return None
    rank, failure = min(told, key=lambda pair: isinstance(pair[1], StorageError))
    return (StorageError if isinstance(failure, StorageError) else UserError)(f"worker {rank}: {failure}")


def _line(error: BaseException) -> str:
    # The texts of these wrappers begin with all that Ray knows of a worker.
    for wrapped in ("controller_failure", "health_check_failure"):
        error = getattr(error, wrapped, error)
    if isinstance(error, WorkerGroupStartupFailedError):
        error = error.__cause__ or error
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
