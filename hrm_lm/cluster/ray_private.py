"""All that this project uses of Ray without Ray's promise to keep it, but for `failures` and `scaling`, which cannot do
without importing Ray. Look at these three first when Ray is updated.
"""

import logging
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partialmethod
from pathlib import Path
from typing import Any

import pyarrow.fs

from hrm_lm.errors import UserError
from hrm_lm.filesystem import outlasting, shown

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of a run's checkpoints. Looking for the file tells whether there are any without loading Ray."""


@contextmanager
def agent_on_any_port() -> Iterator[None]:
    """The agent of a Ray that is started meanwhile listens on a free port: `ray start` has an option for that, `ray.init` not.

    Otherwise it is a fixed port, for which a second Ray of a machine waits for seconds and then does without.
    """
    from ray._private.parameter import RayParams

    usual = RayParams.__init__
    RayParams.__init__ = partialmethod(usual, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        RayParams.__init__ = usual


def started_by_this_process() -> bool:
    """Whether `ray.init` has started a Ray here, and has not joined a cluster."""
    from ray._private import worker

    return worker._global_node is not None and worker._global_node.is_head()


FALSE_ALARM = "'PreemptionWatcher' and ID: "
"""Part of an error that Ray's core logs when a run starts: Ray could not start that actor again if it lost what the actor was
made with. Ray Train makes the actor anew with each group of workers."""


def silence_false_alarm() -> None:
    """Keeps lines with FALSE_ALARM from this process's terminal, where Ray shows what other processes log. Ray must run."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    def silenced(handle):
        return lambda data: handle(data | {"lines": [line for line in data["lines"] if FALSE_ALARM not in line]})

    dispatcher.handlers = [
        (name, silenced(handle) if name == "ray_print_logs" else handle) for name, handle in dispatcher.handlers
    ]


def publish(board: str, name: str, text: str) -> None:
    """Puts a text where all processes of the cluster may read it (`published`), in place of the last one of this name."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(f"{board}:{name}", f"{time.time()} {text}", namespace=board.encode())


def published(board: str, fresh: float) -> list[str]:
    """The texts of a board that have been there for less than `fresh` seconds. Others' processes have ended."""
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list

    texts, space = [], board.encode()
    for key in sorted(_internal_kv_list(f"{board}:", namespace=space)):
        then, _, text = (_internal_kv_get(key, namespace=space) or b"0 ").decode().partition(" ")
        if time.time() - float(then) < fresh:
            texts.append(text)
        else:
            _internal_kv_del(key, namespace=space)
    return texts


def quiet_logging():
    """Ray Train's LoggingConfig that shows warnings only: this class has no public place to import it from."""
    from ray.train.v2.api.config import LoggingConfig

    return LoggingConfig(log_level="WARNING")


def quiet_reports() -> None:
    """Silences a worker's line for each report. Ray 2.60 names that logger by its file, so LoggingConfig misses it."""
    from ray.train.v2._internal.execution import context

    logging.getLogger(context.__file__).setLevel(logging.WARNING)


class PreemptionSignal:
    """Whether Ray Train has told this worker that a node of the run is about to go.

    The public `ray.train.get_preemption_info` is a round trip between all workers besides.
    """

    def __init__(self) -> None:
        from ray.train.v2._internal.execution.context import get_train_context

        self._context = None
        with suppress(RuntimeError):  # without Ray Train's processes nobody tells
            self._context = get_train_context().preemption_context

    def is_set(self) -> bool:
        return self._context is not None and self._context.preemption_info is not None


def fail_worker(error: Exception) -> None:
    """Ray Train takes `error` for this worker's. Its training thread does not raise it: that thread may never end, and Ray
    would log a traceback.
    """
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
    from ray.train.v2._internal.execution.context import get_train_context

    raised = UserExceptionWithTraceback(error, traceback_str=str(error))
    get_train_context().execution_context.training_thread_runner.get_exception_queue().put(raised)


@contextmanager
def files_without_keys(fs: pyarrow.fs.FileSystem) -> Iterator[None]:
    """What this process pickles meanwhile holds no file system of the class of `fs`, unless Ray pickles it for another
    process.

    Tune pickles its storage, keys included, into several files. When it restores them, it takes the storage that
    `Tuner.restore` gets.
    """
    from ray._private.worker import global_worker
    from ray.cloudpickle import CloudPickler

    def reduced(fs: pyarrow.fs.FileSystem) -> Any:
        sent = global_worker.get_serialization_context().is_in_band_serialization()
        return fs.__reduce__() if sent else (pyarrow.fs.LocalFileSystem, ())

    CloudPickler.dispatch_table[type(fs)] = reduced  # copyreg's table would count for `copy.deepcopy`, too
    try:
        yield
    finally:
        del CloudPickler.dispatch_table[type(fs)]


@contextmanager
def whole_files() -> Iterator[None]:
    """What Tune copies to a local folder meanwhile takes its place whole. Tune writes a sweep's state over the last one
    every second, and without that state a sweep that was killed in mid-copy cannot be resumed.
    """
    from ray.train._internal import storage

    usual = storage._pyarrow_fs_copy_files

    def copy(source, destination, source_filesystem=None, destination_filesystem=None, **options):
        filesystems = {"source_filesystem": source_filesystem, "destination_filesystem": destination_filesystem}
        if not isinstance(destination_filesystem, pyarrow.fs.LocalFileSystem):  # a bucket's objects are replaced whole
            return usual(source, destination, **filesystems, **options)
        with tempfile.TemporaryDirectory(prefix=".new_", dir=Path(destination).parent) as new:
            usual(source, f"{new}/copy", **filesystems, **options)
            for file in [path for path in Path(new).rglob("*") if path.is_file()]:
                place = Path(destination, file.relative_to(f"{new}/copy"))
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)

    storage._pyarrow_fs_copy_files = copy
    try:
        yield
    finally:
        storage._pyarrow_fs_copy_files = usual


def progress_bar(steps: int) -> Any:
    """A progress bar that the driver draws, wherever the worker is: no public API does that."""
    from ray.experimental.tqdm_ray import tqdm

    return tqdm(desc="training", total=steps, unit="step")


def trial_folder() -> tuple[pyarrow.fs.FileSystem, str]:
    """File system and path of this trial's folder in storage: Tune's public context knows the local folder only.

    Raises UserError where this node does not reach the folder.
    """
    from ray.train._internal.session import get_session

    storage = get_session().storage
    check_storage(storage)
    return storage.storage_filesystem, storage.trial_fs_path


def check_storage(storage) -> None:
    """Raises UserError where this node does not find what the driver has written into `storage`, a StorageContext of Ray.

    Ray itself looks when the first checkpoint is saved, which may be hours later. Storage that is away is waited for.
    """
    name = shown(storage.storage_filesystem, storage.experiment_fs_path)
    try:
        outlasting(f"{name}: cannot be read", storage._check_validation_file)
    except RuntimeError:
        raise UserError(
            f"{name}: this folder of the driver is not on node {socket.gethostname()}\n"
            "several nodes need storage that all of them reach: give --save_dir a URI or a shared folder"
        ) from None


def report_to_tune(metrics: dict[str, Any], checkpoint) -> None:
    """`ray.tune.report` of a checkpoint that is in the trial's folder already.

    `ray.tune.report` would copy it within the folder, to a name that counts from 0 whenever a process takes the trial
    over. So what a killed process has left there is mixed with the new files, and Tune, which finds two checkpoints of
    one name, may delete the better one's files together with the worse one's. Ray itself reports what is in storage this
    way.
    """
    from ray.train._internal.session import _TrainingResult, get_session

    session = get_session()
    session._report_training_result(_TrainingResult(checkpoint, session._auto_fill_metrics(metrics)))


def has_trials(fs: pyarrow.fs.FileSystem, path: str) -> bool:
    """Whether Tune has noted trials in its folder.

    `Tuner.can_restore` already says yes to a Tuner that has no trials yet. Resuming that logs a traceback.
    """
    files = fs.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    return any(file.base_name.startswith("experiment_state-") for file in files)


class OutdatedRestore:
    """Lets a trial start whose checkpoint is gone.

    What Tune last noted of a killed sweep's trial may be gone, because a newer checkpoint took its place. Tune would
    fail the trial; `hrm_lm.tuning.trial.newest_checkpoint` finds the newer checkpoint.
    """

    def restore(self, checkpoint) -> None:
        with suppress(ValueError):  # Tune's error for a checkpoint that is not there
            super().restore(checkpoint)  # type: ignore[misc]  # a mixin: Tune's class has it


def tolerates_outdated_restore(function):
    """Marks a trial's function: Tune has no other way into the class that it makes of a function."""
    function.__mixins__ = (OutdatedRestore,)
    return function
