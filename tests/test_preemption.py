"""Nodes that are announced to go, workers that hang, and a control process that dies."""

import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import ray.train.collective
import torch
from conftest import LocalSession, assert_same_weights, small_config, train_locally, wait_until
from pyarrow.fs import LocalFileSystem
from ray.train import FailureConfig, WorkerGroupError
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from hrm_lm.cluster import preemption, watchdog
from hrm_lm.cluster.failures import FailurePolicy
from hrm_lm.cluster.preemption import Lookout, Preempted, Reached
from hrm_lm.cluster.watchdog import Hung, Watchdog
from hrm_lm.data.loading import prefetch
from hrm_lm.training.loop import train

PREEMPTION = "DRAIN_NODE_REASON_PREEMPTION"


class Leaving(LocalSession):
    """Its node is announced to go after step 5, and again after the last step."""

    def preempted(self, step):
        return step in (5, 12)


def test_a_run_whose_node_is_to_go_saves_at_once_and_goes_on_as_if_undisturbed(tmp_path):
    config = small_config(train__val_every=4)
    straight = train_locally(config, tmp_path / "straight")
    session = Leaving(tmp_path / "left")
    assert train(config, session) == {"status": "preempted", "step": 5}
    assert [metrics["step"] for metrics in session.reports] == [4, 5] and "val_loss" not in session.reports[-1]
    assert train(config, session) == {"status": "finished", "step": 12}
    assert_same_weights(session.last_weights(), straight.last_weights())


def test_a_node_that_was_announced_to_go_is_no_failure_and_is_told(capsys):
    policy, gone = FailurePolicy(FailureConfig(max_failures=0)), Preempted("a node is about to go, and step 5 is saved")
    for attempt in (2, 3):
        failures = {0: gone, 1: RuntimeError("Connection closed by peer")}
        assert policy.make_decision(WorkerGroupError("", failures)) == FailureDecision.RETRY
        told = capsys.readouterr().err
        assert "step 5 is saved" in told and f"attempt {attempt} starts" in told and "so far: 0" in told
    assert policy.make_decision(WorkerGroupError("", {0: Hung("no progress")})) == FailureDecision.RAISE


class Meeting:
    """The clock of two workers, and the round trip in which rank 0 tells the other what it has planned."""

    now, round_trip, looks = 0.0, 0.003, 0

    def monotonic(self):
        return self.now

    def broadcast(self, plan):
        if plan is not None:
            self.now += self.round_trip
            self.plan, self.looks = plan, self.looks + 1
        return self.plan


@pytest.mark.parametrize("step_time", [1e-3, 0.02, 0.3, 20.0])
def test_looking_for_an_announcement_costs_half_a_percent_at_most_and_is_not_late(step_time, monkeypatch):
    meeting, late = Meeting(), 0.0
    monkeypatch.setattr(preemption, "time", meeting)
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", meeting.broadcast)
    workers, looked = [Lookout(rank, 2) for rank in (0, 1)], 0.0
    steps = int(200 / step_time)
    for step in range(1, steps + 1):
        meeting.now += step_time
        looks = meeting.looks
        assert [worker.sees(step) for worker in workers] == [False, False]
        if meeting.looks > looks:
            late, looked = max(late, meeting.now - looked), meeting.now
    assert meeting.looks * meeting.round_trip / meeting.now < 0.005
    assert late < max(2.5, 1.1 * step_time)
    workers[0]._signal.is_set = lambda: True
    seen = [[worker.sees(step) for worker in workers] for step in range(steps + 1, workers[0]._next + 1)]
    assert seen[-1] == [True, True] and not any(map(any, seen[:-1]))


def test_a_run_that_went_back_looks_for_an_announcement_at_once(monkeypatch):
    meeting = Meeting()
    monkeypatch.setattr(preemption, "time", meeting)
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", meeting.broadcast)
    workers = [Lookout(rank, 2) for rank in (0, 1)]

    def seen(step):
        meeting.now += 0.01
        return [worker.sees(step) for worker in workers]

    assert not any(any(seen(step)) for step in range(1, 1001))
    workers[0]._signal.is_set = lambda: True
    assert seen(501) == [True, True]  # after a rollback to step 500


def test_the_steps_that_a_run_had_taken_are_known_to_the_workers_that_follow(tmp_path):
    reached = Reached(LocalFileSystem(), str(tmp_path))
    assert reached.before == 0
    reached.step = 17
    reached.close()
    reached = Reached(LocalFileSystem(), str(tmp_path))
    assert reached.before == 17
    assert [reached.repeated(step) for step in (11, 18)] == ["7 steps are repeated", "0 steps are repeated"]
    reached.close()  # before its first step
    assert Reached(LocalFileSystem(), str(tmp_path)).before == 17
    (tmp_path / ".reached").write_bytes(b"17")  # killed a moment later
    reached = Reached(LocalFileSystem(), str(tmp_path))
    assert [reached.repeated(step) for step in (11, 18)] == [
        "at least 7 steps are repeated",
        "at least 0 steps are repeated",
    ]
    (tmp_path / ".reached").write_bytes(b"")  # killed while it wrote
    reached = Reached(LocalFileSystem(), str(tmp_path))
    assert reached.before == 0 and reached.repeated(11) == "at least 0 steps are repeated"


def test_a_worker_that_waits_for_data_for_too_long_says_where_and_fails(monkeypatch, capfd):
    release = threading.Event()

    def batches():
        yield []
        release.wait()

    def end(code):
        dog.close()
        release.set()

    monkeypatch.setattr(watchdog, "LAST_WORDS", 0)
    monkeypatch.setattr(watchdog.os, "_exit", end)
    loop, told = prefetch(batches(), torch.device("cpu")), []
    next(loop)
    dog = Watchdog(0.05, 1, told.append)
    dog.alive(7)
    assert not list(loop)
    error = str(told[0])
    assert re.fullmatch(r"no progress for \d s after step 7; it stands in produce \(loading.py:\d+\)", error)
    stacks = capfd.readouterr().err
    assert f"worker 1: {error}" in stacks and "in batches" in stacks and "in prefetch" in stacks


def test_the_start_may_take_longer_than_a_step_and_a_worker_that_gets_on_is_not_taken_for_hung(monkeypatch):
    clock = Meeting()
    monkeypatch.setattr(watchdog, "time", clock)
    dog, hangs = Watchdog(60, 0, print), []
    for seconds, step in ((239, 1), (59, None), (59, 2), (59, None), (61, None)):
        clock.now += seconds
        hangs.append(dog.hangs())
        dog.alive(step)
    dog.close()
    assert hangs == [False, False, False, False, True]


@pytest.fixture
def nodes(monkeypatch, tmp_path_factory):
    """A cluster of two nodes with a CPU each, behind a head without; its log of drains is asked twice a second."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # sockets want a short path
        monkeypatch.setenv("RAY_TMPDIR", folder)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        cluster.first, cluster.second = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


def without_end(nodes, folder: Path, driver, log) -> subprocess.Popen:
    """A run `r` of two workers that goes on until it is stopped."""
    small = ["model.d_model=16", "model.n_heads=2", "data.synthetic.max_digits=1", "ray.max_failures=0"]
    fields = [*small, "train.steps=1000000", "train.val_every=1000000", "train.checkpoint_every=500"]
    fields += ["ray.cpus_per_worker=1", "train.batch_size=8"]
    command = ["-m", "ray_jobs.train", "--dataset", "synthetic", "--num_workers", 2, "--run_name", "r"]
    settings = [word for field in fields for word in ("--set", field)]
    return driver(*command, "--save_dir", folder / "runs", *settings, joins=nodes.address, stdout=log, stderr=log)


@pytest.mark.long
def test_a_drained_node_costs_no_step_and_is_no_failure(nodes, in_folder, driver):
    with open("log", "w") as log:
        trains = without_end(nodes, in_folder, driver, log)
    wait_until(lambda: Path("runs/r/.reached").exists() or trains.poll() is not None)
    nodes.add_node(num_cpus=1)
    ray_command = [Path(sys.executable).parent / "ray", "drain-node", "--address", nodes.address]
    drain = ["--node-id", nodes.first.node_id, "--reason", PREEMPTION, "--reason-message", "spot"]
    subprocess.run([*ray_command, *drain, "--deadline-remaining-seconds", "300"], check=True)

    def resumed():
        return re.search(r"resumed from step (\d+); (.*) steps are repeated", Path("log").read_text())

    wait_until(lambda: resumed() or trains.poll() is not None)
    log = Path("log").read_text()
    step, repeated = resumed().groups()
    assert repeated == "0" and Path(f"runs/r/checkpoint_{int(step):08d}").exists()
    assert f"a node is about to go, and step {step} is saved" in log
    assert "attempt 2 starts" in log and "failures of workers so far: 0" in log and "attempt 3" not in log


@pytest.fixture
def remembered(monkeypatch, tmp_path):
    """For a cluster that is started after it: its control process keeps its state in a folder."""
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", str(tmp_path / "gcs"))


@pytest.mark.long
def test_a_run_goes_on_where_rays_control_process_dies_and_starts_again_with_its_state(
    remembered, nodes, in_folder, driver
):
    with open("log", "w") as log:
        trains = without_end(nodes, in_folder, driver, log)

    def saved() -> int:
        """The newest checkpoint's step that Ray Train's list names."""
        found = Path("runs/r/checkpoint_manager_snapshot.json")
        steps = re.findall(r"checkpoint_(\d+)", found.read_text()) if found.exists() else []
        return max(map(int, steps), default=0)

    wait_until(lambda: saved() or trains.poll() is not None)
    workers = set(re.findall(r"RayTrainWorker pid=(\d+)", Path("log").read_text()))
    nodes.head_node.kill_gcs_server()  # by SIGKILL
    nodes.head_node.start_gcs_server()
    before = saved()
    wait_until(lambda: saved() >= before + 2000 or trains.poll() is not None)
    assert trains.poll() is None, Path("log").read_text()[-3000:]
    log = Path("log").read_text()
    assert set(re.findall(r"RayTrainWorker pid=(\d+)", log)) == workers and "attempt 2" not in log


HANGS = """
import threading
from pathlib import Path

import torch.distributed as dist

class Sums:
    reads = 0

    def __len__(self):
        return 100

    def __getitem__(self, i):
        if threading.current_thread().name == "prefetch" and dist.get_rank() == 1 and not Path("hung").exists():
            self.reads += 1
            if self.reads > 60:
                Path("hung").touch()
                read_for_ever()
        return f"{i % 10}+{i // 10}", str(i % 10 + i // 10)

def read_for_ever():
    threading.Event().wait()

def build(config, seed):
    return Splits(Sums(), [("1+1", "2")], SimpleTokenizer("0123456789+"))
"""


@pytest.mark.long
def test_a_hung_worker_is_named_with_its_place_and_the_run_goes_on(in_folder, driver):
    imports = "from hrm_lm.data.splits import Splits\nfrom hrm_lm.data.tokenizer import SimpleTokenizer\n"
    Path("hanging.py").write_text(imports + HANGS)
    fields = ["model.d_model=16", "model.n_heads=2", "train.steps=40", "train.val_every=10", "train.batch_size=8"]
    fields += ["ray.cpus_per_worker=1", "ray.hang_timeout=10", "ray.max_failures=1"]
    settings = [word for field in fields for word in ("--set", field)]
    with open("log", "w") as log:
        command = ("-m", "ray_jobs.train", "--dataset", "hanging:build", "--num_workers", "2", "--run_name", "r")
        trains = driver(*command, *settings, stderr=log, cwd=in_folder)
    trains.wait()
    log = Path("log").read_text()
    assert trains.returncode == 0, log
    assert re.search(r"worker 1: no progress for \d+ s after step 1\d; it stands in __getitem__ .splits.py", log), log
    assert "in read_for_ever" in log and "attempt 2 starts" in log and "failures of workers so far: 1" in log
    assert "resumed from step 10; " in log
