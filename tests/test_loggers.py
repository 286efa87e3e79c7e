"""MLflow's local store and W&B offline, as `train.loggers` fills them."""

import json
import os
import threading

import pytest
from conftest import KEYS, small_config, wait_until

from hrm_lm.cluster import loggers
from hrm_lm.cluster.loggers import check_loggers, followed
from hrm_lm.cluster.run import run
from hrm_lm.cluster.run_folder import RunFolder
from hrm_lm.errors import UserError
from hrm_lm.report.events import scalars
from hrm_lm.training.metrics import MetricsLog

RESULT = {"status": "finished", "step": 4, "val_loss": 0.5, "best_checkpoint": "/runs/r/checkpoint_00000004"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder for MLflow's local store, whose tables take seconds to make."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture
def mlflow(store, in_folder, monkeypatch):
    """MLflow's client on the local store, where the test has an experiment of its own."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", in_folder.name)
    monkeypatch.setattr(loggers, "PERIOD", 0.02)
    return MlflowClient()


@pytest.fixture
def folder(in_folder):
    folder = RunFolder("runs", "r")
    folder.write("config.yaml", small_config().to_yaml())
    return folder


def runs_of(client):
    experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
    return client.search_runs([experiment.experiment_id])


def history(client, id, name):
    return [(metric.step, metric.value) for metric in client.get_metric_history(id, name)]


def attempt(folder, name, first, numbers):
    """What a worker writes. name: of the event file, since files of one second have one name."""
    log = MetricsLog(folder / "new", "none", first, 10)
    log.text(first, "environment", {"device": "CPU", "torch": "2.13.0"})
    for step, number in numbers.items():
        log.record(step, {"loss": number, "val_loss/sums": number})
    log.close()
    (file,) = (folder / "new").iterdir()
    file.rename(folder / f"{file.name}.{name}")


def test_a_run_and_its_continuation_are_one_run_of_mlflow(mlflow, store, folder, in_folder, monkeypatch):
    sent, log = [], loggers.MLflow.log
    monkeypatch.setattr(loggers.MLflow, "log", lambda self, events: sent.extend(events) or log(self, events))
    config = small_config(data__dataset=f"s3://{KEYS}@bucket/x?region=us-east-1", train__loggers=["mlflow"])
    place = in_folder / "runs/r"
    with pytest.raises(KeyboardInterrupt):
        with followed(config, folder):
            attempt(place, "a", 0, {1: 3.0, 2: 2.0})
            wait_until(lambda: (runs := runs_of(mlflow)) and len(history(mlflow, runs[0].info.run_id, "loss")) == 2)
            raise KeyboardInterrupt
    (begun,) = runs_of(mlflow)
    id = begun.info.run_id
    assert begun.info.status == "KILLED" and begun.info.run_name == "r"
    assert (
        begun.data.params["model.d_model"] == "16"
        and begun.data.params["data.dataset"] == "s3://bucket/x?region=us-east-1"
    )
    attempt(place, "b", 2, {3: 1.5})  # its driver was killed before the logger had it

    with followed(small_config(optim__lr=0.5, train__loggers=["mlflow"]), folder) as ended:
        assert mlflow.get_run(id).info.status == "RUNNING"
        attempt(place, "c", 3, {4: 1.0})
        ended |= RESULT
    (whole,) = runs_of(mlflow)
    assert whole.info.run_id == id and whole.info.status == "FINISHED"
    assert [event.step for event in sent if "loss" in scalars(event)] == [1, 2, 3, 4], "each once"
    assert (
        history(mlflow, id, "loss") == [(1, 3.0), (2, 2.0), (3, 1.5), (4, 1.0)] == history(mlflow, id, "val_loss/sums")
    )
    tags = whole.data.tags
    assert tags["changed.optim.lr"] == "0.5" and whole.data.params["optim.lr"] == "0.002"
    assert tags["environment.torch"] == "2.13.0" and tags["best_checkpoint"] == RESULT["best_checkpoint"]
    assert {file.path for file in mlflow.list_artifacts(id)} == {"report.html", "result.json"}
    for file in [*in_folder.rglob("*"), *store.rglob("*")]:
        assert file.is_dir() or b"topsecret" not in file.read_bytes(), file


def test_a_logger_that_fails_in_mid_run_is_told_once_and_gets_later_what_it_missed(
    mlflow, folder, in_folder, monkeypatch, capsys
):
    is_away, tries, log = threading.Event(), [], loggers.MLflow.log

    def flaky(self, events):
        if is_away.is_set():
            tries.append(events)
            raise ConnectionError("https://user:secret@host is away")
        log(self, events)

    monkeypatch.setattr(loggers.MLflow, "log", flaky)
    with followed(small_config(train__loggers=["mlflow"]), folder) as ended:
        is_away.set()
        attempt(in_folder / "runs/r", "a", 0, {1: 3.0})
        wait_until(lambda: len(tries) > 2)
        is_away.clear()
        ended |= RESULT
    told = [line for line in capsys.readouterr().err.splitlines() if "train.loggers" in line]
    assert len(told) == 2 and "mlflow: https://host is away; the run goes on without it" in told[0], told
    assert "has what it missed" in told[1]
    (kept,) = runs_of(mlflow)
    assert history(mlflow, kept.info.run_id, "loss") == [(1, 3.0)]


def test_a_run_that_fails_is_failed_in_mlflow_and_has_a_page(mlflow, folder, in_folder):
    with pytest.raises(UserError, match="the file is not on this node"):
        with followed(small_config(train__loggers=["mlflow"]), folder):
            raise UserError("worker 0: the file is not on this node")
    (failed,) = runs_of(mlflow)
    assert failed.info.status == "FAILED"
    assert "worker 0: the file is not on this node" in (in_folder / "runs/r/report.html").read_text()


def test_a_run_that_mlflow_does_not_have_is_told_with_what_to_do(mlflow, folder):
    folder.write(".mlflow.json", json.dumps({"id": "0" * 32, "read": {}}))
    with pytest.raises(UserError, match=r"train.loggers: mlflow: .*without .*/runs/r/.mlflow.json it starts anew"):
        with followed(small_config(train__loggers=["mlflow"]), folder):
            pytest.fail("it was followed")


def test_a_logger_that_is_not_installed_is_told_before_ray_starts(in_folder, monkeypatch):
    (in_folder / "wandb").mkdir()  # W&B's own, which looks like a package
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("hrm_lm.cluster.run.started_ray", lambda: pytest.fail("Ray was started"))
    for kind in ("mlflow", "wandb"):
        with pytest.raises(UserError, match=rf"{kind} is not installed; pip install 'hrm-lm\[{kind}\]'"):
            run(small_config(train__loggers=[kind]))
    assert not (in_folder / "runs").exists()


def test_wandb_offline_has_the_run_and_its_continuation_under_one_id(folder, in_folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = small_config(train__loggers=["wandb"])
    check_loggers(config)
    for name, first in (("a", 0), ("b", 3)):
        with followed(config, folder) as ended:
            attempt(in_folder / "runs/r", name, first, {first + 1: 3.25})
            ended |= RESULT
    first, second = sorted((in_folder / "wandb").glob("offline-run-*/run-*.wandb"), key=os.path.getmtime)
    assert first.name == second.name
    for file in (first, second):
        data = file.read_bytes()
        for expected in (b"val_loss/sums", b"3.25", b"model.d_model", b"result/best_checkpoint", b"2.13.0"):
            assert expected in data, expected


def test_wandb_without_a_key_is_told_instead_of_asked_for(in_folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(in_folder / "netrc"))
    with pytest.raises(UserError, match="wandb has no key; give `wandb login`, or set WANDB_MODE=offline"):
        check_loggers(small_config(train__loggers=["wandb"]))


def test_a_run_under_ray_is_in_mlflow_with_its_curves_and_its_page(cluster, mlflow, in_folder):
    config = small_config(train__val_every=6, ray__run_name="r", train__loggers=["mlflow"])
    result = run(config)
    (kept,) = runs_of(mlflow)
    assert kept.info.status == "FINISHED"
    assert [step for step, _ in history(mlflow, kept.info.run_id, "loss")] == list(range(1, 13))
    assert min(value for _, value in history(mlflow, kept.info.run_id, "val_loss")) == pytest.approx(result["val_loss"])
    assert "report.html" in {file.path for file in mlflow.list_artifacts(kept.info.run_id)}
    assert (in_folder / "runs/r/report.html").exists()
    assert run(config) == result, "nothing is to be done, and MLflow's run stays as it is"
    assert mlflow.get_run(kept.info.run_id).info.status == "FINISHED"
