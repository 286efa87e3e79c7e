"""Runs whose number of workers follows the cluster (`ray.num_workers: 1:4`)."""

import re
import socket
import subprocess
import tempfile
from types import SimpleNamespace

import pytest
from conftest import assert_same_weights, small_config, train_locally, wait_until
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RunningState, SchedulingState
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

from hrm_lm.cluster import scaling
from hrm_lm.cluster.run_folder import RunFolder
from hrm_lm.cluster.scaling import ScalingPolicy
from hrm_lm.data.collate import IGNORE, Stream, join
from hrm_lm.data.loading import train_batches
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.sampler import batch_rows
from hrm_lm.models.contract import layout
from hrm_lm.training.checkpoint import load_model

PACKED = {"train__batch_tokens": 2048, "train__length_window": 256, "train__packing": True}
SHORT = {"model__max_prompt_len": 32, "model__max_response_len": 8, "model__architecture": "prefix_lm"}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_smaller_group_shares_the_same_batch_in_micro_batches_that_are_no_larger(world_size, packing):
    config = small_config(ray__num_workers="1:4", train__batch_size=16, **SHORT, **(PACKED if packing else {}))
    splits = load_dataset(config.data, config.model, 0)

    def shared(world_size):
        """Labels of three steps, micro-batches of each worker, and the size of the largest micro-batch."""
        group = config.for_workers(world_size)
        step_rows, rows = batch_rows(splits.train, group)
        collate = layout(SimpleNamespace(collate=join, stream=Stream()), rows)
        workers = [
            train_batches(splits.train, splits.tokenizer, collate, group.train, 0, rank, world_size, rows=step_rows)
            for rank in range(world_size)
        ]
        steps = [[next(worker) for worker in workers] for _ in range(3)]
        every = [[batch for micro_batches in step for batch in micro_batches] for step in steps]
        labels = [sorted(i for batch in step for i in batch.labels[batch.labels != IGNORE].tolist()) for step in every]
        counts = {len(micro_batches) for step in steps for micro_batches in step}
        sizes = [batch.num_positions if rows else batch.num_samples for step in every for batch in step]
        return labels, counts, max(sizes)

    labels, counts, size = shared(world_size)
    all_labels, one, largest = shared(4)
    assert labels == all_labels
    assert counts == {-(-4 // world_size)} and one == {1}
    assert size <= largest
    assert packing or size >= largest * 4 / (world_size * -(-4 // world_size)), "no worker waits for another"


@pytest.fixture
def policy(monkeypatch):
    """A policy of 1 to 3 workers of a CPU; `policy.reserved` and `policy.free` are CPUs of the cluster's nodes."""
    policy = ScalingPolicy(ScalingConfig(num_workers=(1, 3), elastic_resize_monitor_interval_s=0), last_step=30)
    policy.reserved = policy.free = [1]
    policy.GET_RESERVED_RESOURCES_INTERVAL_S = 0
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(
        policy, "_get_reserved_resources", lambda: {str(i): {"CPU": n} for i, n in enumerate(policy.reserved)}
    )
    monkeypatch.setattr(
        scaling, "available_resources_per_node", lambda: {str(i): {"CPU": n} for i, n in enumerate(policy.free)}
    )
    return policy


def decided(policy, *steps):
    """What the policy makes of workers of which each reports a checkpoint of such a step, or nothing (None): the new number
    of workers, or None where all stays.
    """
    reports = [step and SimpleNamespace(metrics={"step": step}) for step in steps]
    statuses = {rank: WorkerStatus(running=True, training_report=report) for rank, report in enumerate(reports)}
    decision = policy.make_decision_for_running_worker_group(
        SimpleNamespace(start_time=0.0, num_workers=len(steps)), WorkerGroupPollStatus(statuses)
    )
    return None if isinstance(decision, NoopDecision) else decision.num_workers


def test_a_run_grows_when_all_workers_have_stored_a_checkpoint_and_not_between(policy, capsys):
    assert policy.make_decision_for_non_running_worker_group().num_workers == 1
    assert capsys.readouterr().err == "training with 1 worker(s) of 1 to 3\n"
    policy.after_controller_state_update(SchedulingState(None), RunningState())
    policy.reserved, policy.free = [1, 1], [0, 1]
    assert decided(policy, None) is None
    assert decided(policy, 6) == 2
    assert "training with 2 worker(s) of 1 to 3 instead of 1, from the checkpoint of step 6" in capsys.readouterr().err
    policy.reserved, policy.free = [1, 1, 1], [0, 0, 1]
    assert decided(policy, 12, None) is None, "worker 1 still writes its part"
    assert decided(policy, None, 12) == 3
    policy.reserved, policy.free = [1, 1], [0, 0]
    assert decided(policy, 30, 30) is None, "the run is over"


def test_a_run_does_not_grow_into_what_another_program_uses(policy):
    policy.reserved, policy.free = [1, 1], [0, 0]  # another program's actor is on the second node
    policy.after_controller_state_update(SchedulingState(None), RunningState())
    assert decided(policy, 6) is None


def test_a_node_that_answers_no_more_is_known_to_be_dead():
    with socket.create_server(("127.0.0.1", 0)) as raylet:
        address = raylet.getsockname()
        assert scaling.answers(*address)
    assert not scaling.answers(*address)


def test_workers_that_could_not_be_started_are_started_in_smaller_number(policy):
    policy.after_controller_state_update(SchedulingState(None), RunningState())
    policy.reserved, policy.free = [1, 1], [0, 1]  # the failed workers' resources are not free yet
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    policy.free = [1, 0]
    error = RuntimeError("worker group startup timed out")
    policy.after_controller_state_update(SchedulingState(None), ReschedulingState(error))
    assert policy.make_decision_for_non_running_worker_group().num_workers == 1


def test_a_run_says_once_that_it_waits_for_its_first_worker(policy, capsys):
    policy.reserved = policy.free = []
    for _ in range(3):
        assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    assert capsys.readouterr().err == "waiting until at least 1 worker(s) fit the cluster\n"


CLUSTER = """
import os, sys, threading
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from hrm_lm.cluster import run as runs
from hrm_lm.cluster.start import free_port
from hrm_lm.config import load_config

port = free_port()
os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"  # there may be other clusters
head = {"num_cpus": 1, "dashboard_port": port}
cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)  # else add_node needs the main thread
ray.init(cluster.address, logging_level="error")

def obey():
    for line in sys.stdin:
        if line == "add\\n":
            node = cluster.add_node(num_cpus=1)
        else:
            cluster.remove_node(node, allow_graceful=False)
        Path(line.strip()).touch()

def plan_workers(config, plan=runs.plan_workers):
    scaling = plan(config)
    scaling.elastic_resize_monitor_interval_s = 0
    return scaling

threading.Thread(target=obey, daemon=True).start()
runs.plan_workers = plan_workers
try:
    print(runs.run(load_config("c.yaml"))["status"], flush=True)
finally:
    ray.shutdown()
    cluster.shutdown()
"""
"""Runs c.yaml on a cluster of a node, which adds a node and kills it when told to."""

GATED = """
import time
from pathlib import Path
from hrm_lm.data.synthetic import build_synthetic_dataset
from hrm_lm.training import loop

def train_step(state, *rest, train_step=loop.train_step):
    # One worker waits for the second node before step 3 and for its death before step 9, two workers before step 11.
    for step, event in {3: "add", 9: "kill"}.items() if state.world_size == 1 else [(11, "kill")]:
        while state.step >= step and not Path(__file__).with_name(event).exists():
            time.sleep(0.02)
    train_step(state, *rest)

loop.train_step = train_step
data = build_synthetic_dataset
"""
"""A dataset whose code holds the run until the cluster has changed."""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_run_grows_with_the_cluster_shrinks_with_it_and_ends_as_one_of_fixed_size(in_folder, driver, monkeypatch):
    (in_folder / "gated.py").write_text(GATED)
    fields = {"train__steps": 14, "train__checkpoint_every": 1, "ray__num_to_keep": 100}
    config = small_config(**fields, data__dataset="gated:data", ray__num_workers="1:2", ray__run_name="r")
    (in_folder / "c.yaml").write_text(config.to_yaml())
    folder = RunFolder(str(in_folder / "runs"), "r")
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as ray_folder:  # sockets have short names
        monkeypatch.setenv("RAY_TMPDIR", ray_folder)
        process = driver("-c", CLUSTER, stdin=subprocess.PIPE)

        def stored(step):
            return (
                process.poll() is not None or (in_folder / f"runs/r/checkpoint_{step:08d}/trainer_state.json").exists()
            )

        for step, order in ((2, "add"), (11, "kill")):
            wait_until(lambda step=step: stored(step))
            process.stdin.write(f"{order}\n")
            process.stdin.flush()
        out, err = process.communicate()
    assert process.returncode == 0 and "finished\n" in out, err  # a line of a worker may come after it
    assert re.findall(r"training with (\d) worker\(s\) of 1 to 2", err) == ["1", "2", "1"], err

    alone = train_locally(small_config(**fields), in_folder / "alone")
    kept, last = folder.checkpoints()
    curve = sorted((metrics["step"], metrics["loss"]) for _, metrics in kept)
    assert [step for step, _ in curve] == list(range(1, 15)), "each step is once in the curve"
    assert [loss for _, loss in curve] == pytest.approx([metrics["loss"] for metrics in alone.reports], rel=1e-5)
    assert_same_weights(load_model(last)[0].state_dict(), alone.last_weights(), atol=1e-5, rtol=1e-4)
