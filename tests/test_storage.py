"""Run folders: names for users, locks, what a submitted job's folders become, object storage."""

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import pyarrow.fs
import pytest
from conftest import Remote, each_fails_once, small_config, wait_until

from hrm_lm.cluster import lock, ray_private, run_folder, start
from hrm_lm.cluster.run import checked_dataset, run
from hrm_lm.cluster.run_folder import RunFolder, outliving
from hrm_lm.config import load_config
from hrm_lm.errors import RunFailed, UserError
from hrm_lm.filesystem import local_copy, without_keys, without_secrets
from hrm_lm.training.checkpoint import obstacles
from hrm_lm.tuning.space import Sweep


@pytest.fixture
def job(in_folder, monkeypatch):
    """As in a submitted job, with its default storage in a folder of the test's; returns that folder."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setattr(run_folder, "JOB_STORAGE", in_folder / "home/hrm_lm_runs")
    return in_folder / "home/hrm_lm_runs"


def test_a_relative_folder_of_a_job_goes_where_it_outlives_the_job(job, capsys):
    assert outliving("mine/runs", "--save_dir") == str(job / "mine/runs")
    assert (
        f"--save_dir mine/runs would vanish with this job's temporary working directory; writing to {job}/mine/runs"
        in (capsys.readouterr().err)
    )
    for location in ("/data/runs", "s3://bucket/runs", "~/runs"):
        assert outliving(location, "--save_dir") == location
    assert capsys.readouterr().err == ""


def test_outside_a_job_a_relative_folder_stays(in_folder, capsys):
    assert outliving("runs", "--output") == "runs" and capsys.readouterr().err == ""


def test_a_run_in_a_job_is_written_where_it_outlives_the_job(job, capsys, monkeypatch):
    def started_ray():
        raise RunFailed("no Ray in this test")

    monkeypatch.setattr("hrm_lm.cluster.run.started_ray", started_ray)
    with pytest.raises(RunFailed, match="no Ray in this test"):
        run(small_config(ray__storage_path="runs", ray__run_name="r"))
    assert f"run 'r' in {job}/runs/r" in capsys.readouterr().err


def test_a_dataset_that_did_not_come_with_a_job_is_told_with_the_cause(job):
    with pytest.raises(
        UserError, match=r"data/sums.jsonl did not come with the job: .* \.gitignore names, such as data/"
    ):
        checked_dataset(small_config(data__dataset="data/sums.jsonl"))
    with pytest.raises(UserError) as error:
        checked_dataset(small_config(data__dataset="no_such_module:build"))
    assert "no_such_module" in str(error.value) and ".gitignore" not in str(error.value)


def test_outside_a_job_a_missing_dataset_is_just_missing(in_folder):
    with pytest.raises(UserError) as error:
        checked_dataset(small_config(data__dataset="data/sums.jsonl"))
    assert "data/sums.jsonl" in str(error.value) and ".gitignore" not in str(error.value)


def test_a_lock_that_another_process_holds_names_that_process(in_folder):
    with RunFolder("runs", "r").lock():
        with pytest.raises(UserError, match=f"run 'r' is being trained by process {os.getpid()}"):
            with RunFolder("runs", "r").lock():
                pass


def test_a_folder_that_cannot_be_locked_is_told_as_such(in_folder, monkeypatch):
    def without_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with pytest.raises(
        UserError, match=rf"{in_folder}/runs/r: .* cannot be locked .*No locks available\ngive --save_dir"
    ):
        with RunFolder("runs", "r").lock():
            pass


def test_in_object_storage_a_second_run_is_refused_as_soon_as_the_first_renews_its_lease(bucket, monkeypatch, capsys):
    monkeypatch.setattr(lock, "RENEW_S", 0.1)
    with RunFolder(bucket("renewed"), "r").lock():
        with pytest.raises(
            UserError, match=f"run 'r' is being trained by process {os.getpid()} on host .*; wait for it"
        ):
            with RunFolder(bucket("renewed"), "r").lock():
                pytest.fail("two runs of a name")
    assert f"waiting up to 30 s for the lease of process {os.getpid()} on host" in capsys.readouterr().err
    assert not RunFolder(bucket("renewed"), "r").exists(".lock"), "the end of a run releases its name at once"


def test_a_lease_in_object_storage_that_a_killed_run_left_is_taken_over(bucket, monkeypatch, capsys):
    monkeypatch.setattr(lock, "LEASE_S", 0.5)
    folder = RunFolder(bucket("left"), "r")
    folder.write(".lock", json.dumps({"id": "x", "process": 77, "host": "far", "renewed": 9}))
    with folder.lock():
        assert json.loads(folder.read(".lock"))["process"] == os.getpid()
    assert "waiting up to 0.5 s for the lease of process 77 on host far to expire" in capsys.readouterr().err


def test_a_command_waits_for_storage_that_is_away_while_it_takes_its_lease(tmp_path, waits, monkeypatch, capsys):
    monkeypatch.setattr(lock, "LEASE_S", 0)  # Remote leaves a file behind when it fails to write
    monkeypatch.setattr(lock, "SETTLE_S", 0)
    folder = RunFolder(str(tmp_path), "r")
    folder.fs = Remote(fails=each_fails_once())
    with folder.lock():
        assert json.loads(folder.read(".lock"))["process"] == os.getpid() and len(waits) >= 3
    told = capsys.readouterr().err
    assert f"{tmp_path}/r: cannot be written: AWS Error" in told and "/.lock: the lease cannot be taken: AWS" in told


def test_a_lease_whose_owner_could_not_renew_it_while_storage_was_away_is_not_taken_over(tmp_path, monkeypatch):
    folder, away, now = RunFolder(str(tmp_path), "r"), [], 0.0

    def fails(method, path):
        if method == "open_input_file" and now > lock.LEASE_S / 2 and not away:
            raise OSError("AWS Error SLOW_DOWN")

    def sleep(seconds, renews=True):
        nonlocal now
        now += seconds
        if away and renews:  # the owner comes first
            folder.write(".lock", json.dumps({"id": "x", "process": 77, "renewed": 1}))

    def outage(_):
        sleep(lock.LEASE_S, renews=False)
        away.append("back by now")

    monkeypatch.setattr("hrm_lm.filesystem.sleep", outage)
    monkeypatch.setattr(lock, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    folder.write(".lock", json.dumps({"id": "x", "process": 77, "renewed": 0}))
    folder.fs = Remote(fails)
    with pytest.raises(UserError, match="run 'r' is being trained by process 77"):
        with folder.lock():
            pytest.fail("two runs of a name")


def test_of_two_runs_that_start_at_once_in_object_storage_the_last_to_write_its_lease_trains(bucket, monkeypatch):
    folder = RunFolder(bucket("at_once"), "r")
    other = json.dumps({"id": "x", "process": 77, "host": "far", "renewed": 0})
    monkeypatch.setattr(lock.time, "sleep", lambda _: folder.write(".lock", other))  # while this run lets it settle
    with pytest.raises(UserError, match="run 'r' is being trained by process 77 on host far"):
        with folder.lock():
            pytest.fail("two runs of a name")
    assert folder.read(".lock") == other, "the other run's lease stays"


def test_a_run_whose_lease_was_taken_over_ends_and_says_so(bucket, monkeypatch, capsys):
    monkeypatch.setattr(lock, "RENEW_S", 0.05)
    codes = Queue()
    monkeypatch.setattr(lock.os, "_exit", codes.put)
    folder = RunFolder(bucket("lost"), "r")
    with folder.lock():
        lease = json.dumps({"id": "x", "process": 77, "host": "far", "renewed": 0}).ljust(512)
        wait_until(lambda: folder.write(".lock", lease) or not codes.empty())  # the run may renew its own just then
    assert codes.get() == 1
    assert "run 'r' is being trained by process 77 on host far: this command was held up" in capsys.readouterr().err
    assert json.loads(folder.read(".lock"))["process"] == 77


# --- object storage ----------------------------------------------------------------------------------------------


def write(bucket, path, text):
    with bucket.fs.open_output_stream(f"bucket/{path}") as file:
        file.write(text.encode())


def test_a_config_and_a_sweep_may_be_in_object_storage(bucket):
    write(bucket, "c/base.yaml", "train: {steps: 77, val_every: 7}")
    write(bucket, "c/sweep.yaml", "base: base.yaml\nsearch_space: {optim.lr: {choice: [1.0e-3]}}")
    write(bucket, "c/wrong.yaml", "train: {stesp: 1}")
    assert load_config(bucket("c/base.yaml")).train.steps == 77
    assert Sweep(bucket("c/sweep.yaml")).config.train.steps == 77
    for name, message in (("wrong", "no such field"), ("absent", "cannot be read")):
        with pytest.raises(UserError, match=f"^s3://bucket/c/{name}.yaml: .*{message}") as error:
            load_config(bucket(f"c/{name}.yaml"))
        assert "secret" not in str(error.value)


def test_a_command_waits_for_a_run_folder_that_is_away(tmp_path, waits, capsys):
    folder = RunFolder(str(tmp_path), "r")
    folder.fs = Remote(fails=each_fails_once())
    folder.write("result.json", "{}")
    assert folder.exists("result.json") and folder.read("result.json") == "{}" and len(waits) >= 4
    assert f"{tmp_path}/r: cannot be written: AWS Error SLOW_DOWN" in capsys.readouterr().err


def test_what_a_user_reads_of_a_run_in_object_storage_is_a_uri_without_secrets(bucket):
    folder = RunFolder(bucket("runs"), "r")
    assert folder.uri == "s3://bucket/runs/r" and folder.path == "bucket/runs/r"
    assert folder.uri_of(f"{folder.path}/checkpoint_1") == "s3://bucket/runs/r/checkpoint_1"
    with pytest.raises(UserError, match="^s3://bucket/nothing: no such folder"):
        with local_copy(bucket("nothing")):
            pass


@pytest.mark.parametrize(
    ("uri", "in_messages", "in_files"),
    [
        ("s3://K:S@b/x@y?region=r&sas=z", "s3://b/x@y", "s3://b/x@y?region=r"),
        ("s3://K:S@b/x?endpoint_override=http://h:1", "s3://b/x", "s3://b/x?endpoint_override=http://h:1"),
        ("s3://K:S/with@slash@b/x", "s3://b/x", "s3://b/x"),
        ("s3://K:S?mark@b/x", "s3://b/x", "s3://b/x"),
        ("abfs://box:S@account/x?client_secret=S", "abfs://account/x", "abfs://box@account/x"),
        ("hdfs://host:9000/x", "hdfs://host:9000/x", "hdfs://host:9000/x"),
        ("s3://b/x?region=r", "s3://b/x", "s3://b/x?region=r"),
        ("runs/K:S@b?c", "runs/K:S@b?c", "runs/K:S@b?c"),
    ],
)
def test_a_uri_loses_its_keys_and_stays_where_it_was(uri, in_messages, in_files):
    assert without_secrets(uri) == in_messages
    assert without_keys({"a": [uri, 1]}) == {"a": [in_files, 1]}
    assert without_secrets(f"{uri!r}: no such file, {uri}") == f"{in_messages!r}: no such file, {in_messages}"


def test_a_run_goes_on_with_other_keys():
    old, new = (small_config(data__dataset=f"s3://{keys}bucket/d?region=r") for keys in ("", "K:S@"))
    assert obstacles(old, new) == {} and new.to_yaml() == old.to_yaml()
    assert obstacles(old, small_config(data__dataset="s3://bucket/other?region=r"))


# --- starting Ray ------------------------------------------------------------------------------------------------


def test_the_dashboard_gets_a_free_port_that_no_other_component_of_ray_may_take(monkeypatch):
    import ray

    asked = []
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options["dashboard_port"]))
    start.init_ray()
    assert asked[0] in start.DASHBOARD_PORTS, "below those that the system gives, above those of workers"
    monkeypatch.setattr(start, "DASHBOARD_PORTS", range(asked[0], asked[0] + 2))
    with socket.socket() as taken:
        with suppress(OSError):  # another process may have it by now
            taken.bind(("127.0.0.1", asked[0]))
        start.init_ray()
    assert asked[1] == asked[0] + 1


def test_a_second_ray_of_a_machine_waits_for_no_fixed_port(monkeypatch):
    import ray
    from ray._private.parameter import RayParams

    asked = []
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(RayParams().dashboard_agent_listen_port))
    start.init_ray()
    assert asked == [0]
    assert RayParams().dashboard_agent_listen_port, "only for the Ray that is started"


def test_a_kill_while_tune_copies_a_sweeps_state_leaves_the_state_before(tmp_path, monkeypatch):
    from ray.train._internal import storage

    local, kept, state = pyarrow.fs.LocalFileSystem(), tmp_path / "kept", tmp_path / "state"
    for folder in (kept, state / "of_trials"):
        folder.mkdir(parents=True)

    def save(text: str) -> None:
        for name in ("experiment_state-1.json", "of_trials/one.json"):
            (state / name).write_text(text)
        storage._upload_to_fs_path(str(state), local, str(kept))

    def killed(source, destination, **options):
        Path(destination).mkdir(exist_ok=True)
        (Path(destination) / "experiment_state-1.json").write_text("")
        raise KeyboardInterrupt

    with ray_private.whole_files():
        save("before")
        monkeypatch.setattr(pyarrow.fs, "copy_files", killed)
        with pytest.raises(KeyboardInterrupt):
            save("after")
    assert sorted(str(file.relative_to(kept)) for file in kept.rglob("*.json")) == [
        "experiment_state-1.json", "of_trials/one.json",
    ]  # fmt: skip
    assert (kept / "experiment_state-1.json").read_text() == "before"
