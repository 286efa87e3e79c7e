"""What a run does when workers fail; without Ray's processes."""

import logging
from types import SimpleNamespace

import pyarrow.fs
import pytest
from conftest import Remote, each_fails_once
from ray.exceptions import ActorDiedError, GetTimeoutError
from ray.train import (
    BackendConfig,
    ControllerError,
    DataConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)
from ray.train.v2._internal.callbacks import backend_setup
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2._internal.logging import LoggingManager

from hrm_lm.cluster.failures import FailurePolicy, TrainController, write_list
from hrm_lm.cluster.ray_private import check_storage
from hrm_lm.cluster.run import explain_failure
from hrm_lm.errors import StorageError, UserError
from hrm_lm.filesystem import storage_error

MISSING, CUT_OFF = UserError("train.jsonl: no such file"), RuntimeError("Connection closed by peer")
DEAD = WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: and much more", ActorDiedError())


@pytest.mark.parametrize("failures", [{0: MISSING}, {0: CUT_OFF, 1: MISSING}])
def test_what_a_user_must_mend_is_not_tried_again(failures, capsys):
    policy = FailurePolicy(FailureConfig(max_failures=-1))
    assert policy.make_decision(WorkerGroupError("", failures)) == FailureDecision.RAISE
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "failure, reason",
    [(DEAD, "The actor died"), (CUT_OFF, "closed by peer"), (StorageError("s3://b: cannot be read"), "s3://b: cannot")],
)
def test_what_may_heal_is_tried_again_and_each_attempt_is_told(failure, reason, capsys):
    policy, error = FailurePolicy(FailureConfig(max_failures=2)), WorkerGroupError("", {3: failure, 5: failure})
    for attempt in (2, 3):
        assert policy.make_decision(error) == FailureDecision.RETRY
        told = capsys.readouterr().err
        assert told.startswith("worker 3, 5: ") and reason in told and told.count("\n") == 2
        assert f"attempt {attempt} starts" in told and f"so far: {attempt - 1}, ray.max_failures: 2" in told
    assert policy.make_decision(error) == FailureDecision.RAISE
    assert capsys.readouterr().err == ""


def test_what_stopped_workers_that_were_starting_is_told(capsys):
    failed = WorkerGroupStartupFailedError("One of the worker actors failed to initialize due to error:\nTraceback")
    failed.__cause__ = ActorDiedError()
    assert FailurePolicy(FailureConfig()).make_decision(ControllerError(failed)) == FailureDecision.RETRY
    assert capsys.readouterr().err.startswith("ActorDiedError: The actor died unexpectedly")


def test_a_run_that_failed_says_what_to_do_next():
    told = explain_failure(ActorDiedError(), "r").splitlines()  # Ray Train's controller was killed
    assert told[0].startswith("training failed: The actor") and "--run_name r goes on from what was saved" in told[1]


def test_storage_that_is_away_may_heal_and_a_missing_file_does_not():
    assert type(storage_error("x: cannot be read", OSError("AWS Error NETWORK_CONNECTION"))) is StorageError
    assert type(storage_error("x: cannot be read", FileNotFoundError(2, ""))) is UserError


def test_the_list_of_checkpoints_outlasts_storage_that_is_away_and_a_kill_leaves_it_whole(tmp_path, waits):
    path = tmp_path / "list.json"

    def manager(fs, text):
        storage = SimpleNamespace(storage_filesystem=fs, checkpoint_manager_snapshot_path=str(path))
        return SimpleNamespace(_storage_context=storage, _save_state=lambda: text)

    write_list(manager(Remote(fails=each_fails_once()), "first"))
    assert path.read_text() == "first" and len(waits) == 2
    killed = path.with_name("list.json.new")
    killed.write_text("sec")  # a second list, cut
    assert path.read_text() == "first"
    write_list(manager(pyarrow.fs.LocalFileSystem(), "third"))
    assert path.read_text() == "third" and not killed.exists()


@pytest.fixture
def start_controller(tmp_path, monkeypatch):
    """`start_controller(fs)` makes a run's controller, up to what needs Ray's processes."""

    def configure(_):  # Ray Train's, which resets levels too, asks Ray for its worker's id
        logging.getLogger(backend_setup.__name__).setLevel(logging.NOTSET)

    monkeypatch.setattr(LoggingManager, "configure_controller_logger", configure)
    monkeypatch.setattr(TrainController, "_start", lambda self: None)

    def start(fs):
        config = RunConfig(name="r", storage_path=str(tmp_path), storage_filesystem=fs)
        run = TrainRunContext(config, {}, ScalingConfig(), BackendConfig(), DataConfig())
        TrainController(train_run_context=run, train_fn_ref=None, scaling_policy=None, failure_policy=None)

    return start


def test_a_run_that_starts_while_storage_is_away_waits_for_it(start_controller, tmp_path, waits, capsys):
    shutdown = logging.getLogger(backend_setup.__name__)
    start_controller(Remote(fails=each_fails_once()))
    assert len(waits) >= 4 and f"{tmp_path}/r: cannot be read or written: AWS" in capsys.readouterr().err
    assert not shutdown.isEnabledFor(logging.WARNING), "a traceback after each worker's death"


def test_on_a_busy_machine_ray_trains_warning_is_a_line_without_a_traceback(start_controller, monkeypatch, caplog):
    def too_slow(**request):
        raise GetTimeoutError("Get timed out: some object(s) not ready.")

    monkeypatch.setattr(
        TrainAutoscalingCoordinatorClient,
        "_autoscaling_coordinator",
        SimpleNamespace(request_resources=SimpleNamespace(remote=too_slow)),
    )
    monkeypatch.setattr(logging.getLogger("ray"), "propagate", True)
    start_controller(pyarrow.fs.LocalFileSystem())
    with caplog.at_level(logging.WARNING, "ray"):
        TrainAutoscalingCoordinatorClient("train-1").send_resource_request(ScalingConfig(), 1)
    (line,) = set(caplog.text.splitlines())  # more than one logger hands it to pytest
    assert "Failed to send resource request for train-1." in line and "Get timed out" in line


def test_a_worker_that_starts_while_storage_is_away_waits_for_it(tmp_path, waits):
    fails = each_fails_once()
    storage = SimpleNamespace(
        storage_filesystem=pyarrow.fs.LocalFileSystem(),
        experiment_fs_path=str(tmp_path),
        _check_validation_file=lambda: fails("look", "marker"),
    )
    check_storage(storage)
    assert len(waits) == 1


def test_a_worker_that_dies_when_its_loop_is_to_begin_is_a_failure_to_start_and_the_others_are_let_go(monkeypatch):
    from ray.exceptions import ActorUnavailableError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    from hrm_lm.cluster.failures import TrainController, WorkerGroup, worker_group

    calls = []

    def start(self):
        self._worker_group_state = "workers, and what they hold"
        raise ActorUnavailableError("gone", None)

    monkeypatch.setattr(worker_group.WorkerGroup, "_start", start)
    monkeypatch.setattr(worker_group.WorkerGroup, "shutdown", lambda self: calls.append(self._worker_group_state))
    group = WorkerGroup.__new__(WorkerGroup)
    with pytest.raises(WorkerGroupStartupFailedError) as raised:
        group._start()
    assert isinstance(raised.value.__cause__, ActorUnavailableError) and calls == ["workers, and what they hold"]
    assert TrainController.worker_group_cls is WorkerGroup
