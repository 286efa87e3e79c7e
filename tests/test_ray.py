"""Runs under Ray: several workers, a worker killed, the driver killed, a submitted job."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    assert_same_weights,
    flip_bit,
    held_by_ray,
    kill_processes_with,
    small_config,
    train_locally,
    wait_until,
)

from hrm_lm.cluster.capacity import plan_workers
from hrm_lm.cluster.run import check_resume, run
from hrm_lm.cluster.run_folder import RunFolder
from hrm_lm.errors import RunFailed, UserError
from hrm_lm.training.checkpoint import load_model


def weights(result):
    return load_model(result["last_checkpoint"])[0].state_dict()


def reported_losses(folder, name):
    """Losses of all of a run's kept checkpoints, by step."""
    kept, _ = RunFolder(str(folder / "runs"), name).checkpoints()
    return [metrics["loss"] for _, metrics in sorted(kept, key=lambda item: item[1]["step"])]


def test_two_workers_train_as_one(cluster, in_folder):
    options = {"train__val_every": 1, "train__steps": 6, "ray__num_to_keep": 100}
    alone = train_locally(small_config(**options), in_folder / "alone")
    result = run(small_config(**options, ray__num_workers=2, ray__run_name="two"))
    assert result["status"] == "finished" and result["step"] == 6
    assert reported_losses(in_folder, "two") == pytest.approx([m["loss"] for m in alone.reports], rel=1e-5)
    assert_same_weights(weights(result), alone.last_weights(), atol=1e-5, rtol=1e-4)
    assert result["val_loss"] == pytest.approx(min(m["val_loss"] for m in alone.reports), rel=1e-5)
    assert json.loads((in_folder / "runs/two/result.json").read_text()) == result
    assert list((in_folder / "runs/two").glob("events.out.tfevents.*"))
    page = (in_folder / "runs/two/report.html").read_text()
    assert "Finished at step <b>6</b>" in page and "<b>2</b><span>workers" in page and "Sample answers" in page


def test_a_sharded_run_of_two_workers_makes_one_checkpoint_and_goes_on_with_one(cluster, in_folder):
    options = {"train__val_every": 3, "train__steps": 6, "ray__run_name": "s", "model__architecture": "prefix_lm"}
    left_over = in_folder / "runs/s/checkpoint_00000006/model/shard-00003-model-00001-of-00001.safetensors"
    left_over.parent.mkdir(parents=True)  # of four workers that were killed in mid-upload
    left_over.write_bytes(b"half a part")
    sharded = run(small_config(**options, ray__num_workers=2, ray__parallel="fsdp"))
    assert "Sample answers" in (in_folder / "runs/s/report.html").read_text(), "both workers take part in them"
    alone = train_locally(small_config(**options), in_folder / "alone")
    assert sharded["val_loss"] == pytest.approx(min(m["val_loss"] for m in alone.reports), rel=1e-5)
    shutil.copytree(sharded["last_checkpoint"], in_folder / "sharded/step_000006")
    longer = small_config(**options | {"train__steps": 9})
    (one,), (other,) = (train_locally(longer, in_folder / folder).reports for folder in ("sharded", "alone"))
    assert one["step"] == 9 and one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-5)


OVERFITS = {
    "train__steps": 60, "train__val_every": 20, "train__checkpoint_every": 15, "train__log_every": 100,
    "optim__lr": 0.02, "optim__schedule": "constant", "data__val_fraction": 0.8, "train__on_nonfinite": "skip",
}  # fmt: skip


@pytest.fixture(scope="module")
def overfitted(shared_cluster, tmp_path_factory):
    """The storage of the finished run "r", whose best validation is its first, and its result."""
    storage = tmp_path_factory.mktemp("overfitted") / "runs"
    options = {"ray__storage_path": str(storage), "ray__run_name": "r", "ray__num_to_keep": 9}
    return storage, run(small_config(**OVERFITS, **options))


def test_checkpoints_between_validations_leave_the_best_one_where_it_is(overfitted, in_folder):
    storage, result = overfitted
    kept, last = RunFolder(str(storage), "r").checkpoints()
    assert kept[0][1]["step"] == 20 and [metrics["step"] for _, metrics in kept[-3:]] == [45, 30, 15]
    assert last == result["last_checkpoint"] and Path(last).name == "checkpoint_00000060"
    assert result["skipped"] == 0
    assert result["best_step"] == 20 and Path(result["best_checkpoint"]).name == "checkpoint_00000020"
    alone = train_locally(small_config(**OVERFITS), in_folder / "alone").reports
    assert result["val_loss"] == pytest.approx(min(m["val_loss"] for m in alone if "val_loss" in m), rel=1e-5)


PID_DATA = """
import os
from pathlib import Path
from hrm_lm.data.synthetic import build_synthetic_dataset

def build(config, seed):
    if "RayTrainWorker" in Path("/proc/self/cmdline").read_text():
        Path("worker.pid").write_text(str(os.getpid()))
    return build_synthetic_dataset(config, seed)
"""


def test_a_worker_killed_in_mid_run_costs_nothing_but_time(cluster, in_folder, monkeypatch):
    (in_folder / "pid_data.py").write_text(PID_DATA)
    monkeypatch.syspath_prepend(in_folder)
    options = {"train__val_every": 20, "train__steps": 240, "train__log_every": 20}
    results = []
    config = small_config(**options, data__dataset="pid_data:build", ray__run_name="killed")
    runner = threading.Thread(target=lambda: results.append(run(config)))
    runner.start()
    folder = RunFolder(str(in_folder / "runs"), "killed")
    wait_until(folder.has_checkpoints)
    first = int((in_folder / "worker.pid").read_text())
    os.kill(first, signal.SIGKILL)
    runner.join()
    assert int((in_folder / "worker.pid").read_text()) != first, "the run was over before the kill"
    (result,) = results
    assert result["status"] == "finished" and result["step"] == 240
    assert_same_weights(weights(result), train_locally(small_config(**options), in_folder / "alone").last_weights())


def test_the_driver_killed_and_the_command_given_again_ends_as_if_undisturbed(cluster, in_folder, driver, monkeypatch):
    options = {"train__val_every": 20, "train__steps": 200, "train__log_every": 20}
    (in_folder / "c.yaml").write_text(small_config(**options).to_yaml())
    command = ["-m", "ray_jobs.train", "--config", "c.yaml", "--run_name", "r", "--save_dir", in_folder / "runs"]
    folder = RunFolder(str(in_folder / "runs"), "r")
    killed = driver(*command, joins=cluster)
    wait_until(lambda: folder.has_checkpoints() or killed.poll() is not None)
    killed.kill()
    assert "finished" not in killed.communicate()[0], "the run was over before the kill"
    wait_until(lambda: not held_by_ray())  # its workers have ended

    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    again = driver(*command)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "resuming from step" in err and "finished at step 200" in out
    assert "core_worker.cc" not in out + err, "Ray's core raises an alarm over each run, a false one"
    result = json.loads(folder.read("result.json"))
    assert_same_weights(weights(result), train_locally(small_config(**options), in_folder / "alone").last_weights())


def test_ctrl_c_ends_in_a_line_and_code_130(in_folder, driver):
    options = {"train__steps": 100_000, "train__val_every": 20, "train__log_every": 20}
    (in_folder / "c.yaml").write_text(small_config(**options).to_yaml())
    interrupted = driver("-m", "ray_jobs.train", "--config", "c.yaml", "--run_name", "r")
    folder = RunFolder(str(in_folder / "runs"), "r")
    wait_until(lambda: folder.has_checkpoints() or interrupted.poll() is not None)
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate()
    assert interrupted.returncode == 130 and "interrupted" in err and "Traceback" not in err


def test_what_the_cluster_cannot_hold_is_refused_with_what_it_has(cluster, in_folder):
    with pytest.raises(
        UserError, match=r"3 workers of 1 CPU each do not fit .* 1 node\(s\), 2 CPUs, 0 GPUs, room for 2"
    ):
        run(small_config(ray__num_workers=3, train__batch_size=9))
    with pytest.raises(UserError, match="1 GPU each do not fit"):
        run(small_config(ray__use_gpu=True))
    assert not (in_folder / "runs").exists()


def test_a_range_of_workers_needs_room_for_the_fewest(cluster, capsys):
    scaling = plan_workers(small_config(ray__num_workers="2:4", ray__cpus_per_worker="auto"))
    assert (scaling.min_workers, scaling.max_workers, scaling.resources_per_worker) == (2, 4, {"CPU": 1})
    assert "2 to 4 worker(s) of {'CPU': 1}" in capsys.readouterr().err
    with pytest.raises(UserError, match="3 to 4 workers of 1 CPU each do not fit .* room for 2"):
        plan_workers(small_config(ray__num_workers="3:4"))


def test_what_ray_up_may_add_counts_as_room(cluster, in_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(in_folder))
    (in_folder / "ray_bootstrap_config.yaml").write_text((ROOT / "cluster.yaml").read_text())
    assert plan_workers(small_config(ray__use_gpu=True, ray__num_workers=8)).num_workers == 8
    with pytest.raises(UserError, match="room for 8 such workers with all it can grow to"):
        plan_workers(small_config(ray__use_gpu=True, ray__num_workers=9, train__batch_size=9))


def test_nodes_that_ray_up_has_added_are_counted_once(in_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(in_folder))
    (in_folder / "ray_bootstrap_config.yaml").write_text((ROOT / "cluster.yaml").read_text())
    nodes = [{"CPU": 4, "node:__internal_head__": 1}, *[{"CPU": 16, "GPU": 1}] * 8]
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    with pytest.raises(UserError, match="room for 8 such workers with all it can grow to"):
        plan_workers(small_config(ray__num_workers=9, train__batch_size=9))


def test_a_run_of_the_same_name_resumes_is_refused_or_is_left_alone(overfitted, in_folder, capsys):
    storage, first = overfitted
    shutil.copytree(storage, in_folder / "runs")

    def again(resume="auto", **overrides):
        return run(small_config(**OVERFITS | overrides, ray__run_name="r", ray__num_to_keep=9), resume)

    saved = in_folder / "runs/r/config.yaml"
    saved.write_text(saved.read_text().replace("  val_samples: 500\n", ""))  # of before that field was there
    paths = ("best_checkpoint", "last_checkpoint")
    moved = {name: first[name].replace(str(storage), str(in_folder / "runs")) for name in paths}
    assert again() == first | moved and "nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match="already has checkpoints"):
        again(resume="never")
    with pytest.raises(UserError, match=r"train.seed \(0 -> 1\)"):
        again(train__seed=1)
    with RunFolder(str(in_folder / "runs"), "r").lock():
        with pytest.raises(UserError, match=f"trained by process {os.getpid()}"):
            again(train__steps=75)
    longer = again(train__steps=75, optim__lr=1e-3)  # goes on from a list of checkpoints of which some have no score
    assert longer["step"] == 75 and longer["best_step"] == 20
    assert "optim.lr: 0.02 -> 0.001" in capsys.readouterr().err


def test_a_run_goes_back_behind_a_damaged_checkpoint_and_ends_with_the_same_weights(overfitted, in_folder, capfd):
    storage, _ = overfitted
    shutil.copytree(storage, in_folder / "runs")
    flip_bit(in_folder / "runs/r/checkpoint_00000060/model.safetensors", -1)
    options = OVERFITS | {"train__steps": 75}
    result = run(small_config(**options, ray__run_name="r", ray__num_to_keep=9))
    assert "checkpoint_00000060/model.safetensors: damaged" in capfd.readouterr().err
    assert result["step"] == 75 and result["best_step"] == 20
    assert_same_weights(weights(result), train_locally(small_config(**options), in_folder / "alone").last_weights())
    assert (in_folder / "runs/r/checkpoint_00000060_again").is_dir(), (
        "the damaged one is left for whoever looks into it"
    )
    # What the driver sees is said by the driver.
    cut = in_folder / "runs/r/checkpoint_00000075/optimizer.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    folder = RunFolder(str(in_folder / "runs"), "r")
    assert check_resume(small_config(**options), folder, "auto").step == 60
    assert f"{cut}: torn or foreign" in capfd.readouterr().err


def test_a_diverging_run_fails_once_with_its_reason(cluster, in_folder, capfd):
    with pytest.raises(RunFailed, match="not finite at step 2"):
        run(small_config(optim__lr=1e30, optim__warmup_steps=0, ray__run_name="r"))
    result = json.loads((in_folder / "runs/r/result.json").read_text())
    assert result["status"] == "diverged" and "train.grad_clip" in result["error"]
    assert "Diverged at step" in (in_folder / "runs/r/report.html").read_text()


def test_an_error_in_a_worker_that_a_user_can_mend_is_told_as_such_at_once(cluster, in_folder, monkeypatch):
    (in_folder / "only_here.py").write_text(
        "import os\nfrom pathlib import Path\nfrom hrm_lm.data.synthetic import build_synthetic_dataset\n"
        "from hrm_lm.errors import UserError\n"
        "def build(config, seed):\n"
        "    if 'RayTrainWorker' in Path('/proc/self/cmdline').read_text():\n"
        "        print('tried', file=open('attempts', 'a'))\n"
        "        raise UserError('the file is not on this node')\n"
        "    return build_synthetic_dataset(config, seed)\n"
    )
    monkeypatch.syspath_prepend(in_folder)
    with pytest.raises(UserError, match="worker 0: the file is not on this node"):
        run(small_config(data__dataset="only_here:build", ray__max_failures=3))
    assert (in_folder / "attempts").read_text() == "tried\n"


@pytest.mark.slow
def test_a_job_whose_submitter_is_killed_trains_to_its_end_and_generate_finds_its_checkpoint(tmp_path):
    """The real thing: `ray start --head`, `ray job submit`, `generate` from another folder."""
    home = tmp_path / "home"
    home.mkdir()
    session_root = tempfile.mkdtemp(prefix="ray")  # short: sockets live in it
    environment = os.environ | {
        "HOME": str(home),
        "RAY_TMPDIR": session_root,
        "RAY_ADDRESS": "",
        "RAY_AUTH_MODE": "token",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # the `ray` of this environment, activated or not
    }

    def shell(*arguments, **options):
        return subprocess.run(arguments, capture_output=True, text=True, env=environment, **options)

    assert shell("ray", "get-auth-token", "--generate").returncode == 0
    port, dashboard, agent = free_port(), free_port(), free_port()  # another cluster may be up beside this one
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    head = shell("ray", "start", "--head", "--num-cpus=2", *ports)
    assert head.returncode == 0, head.stderr
    try:
        submitted = tmp_path / "submitted"
        submitted.mkdir()
        (submitted / "c.yaml").write_text(small_config(train__val_every=6, train__log_every=3).to_yaml())
        jobs = "--address", f"http://127.0.0.1:{dashboard}"
        submitter = subprocess.Popen(
            ["ray", "job", "submit", *jobs, "--submission-id", "mine", "--working-dir", ".", "--",
            sys.executable, "-m", "ray_jobs.train", "--config", "c.yaml"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=submitted,
        )  # fmt: skip
        for line in submitter.stdout:
            if "run 'hrm-" in line:  # the job's own words
                break
        submitter.kill()
        assert "finished" not in submitter.communicate()[0], "the job was over before its submitter was killed"
        wait_until(lambda: "RUNNING" not in shell("ray", "job", "status", *jobs, "mine").stdout)
        log = shell("ray", "job", "logs", *jobs, "mine").stdout
        assert "succeeded" in shell("ray", "job", "status", *jobs, "mine").stdout, log
        assert "step 3/12" in log and "finished at step 12" in log and str(home / "hrm_lm_runs") in log
        asked = shell(sys.executable, "-m", "hrm_lm.inference.generate", "--prompt", "What is 1 + 2?", cwd=tmp_path)
        assert asked.returncode == 0 and len(asked.stdout.splitlines()) == 1, asked.stderr
        assert str(home / "hrm_lm_runs") in asked.stderr
    finally:
        kill_processes_with(session_root)
        shutil.rmtree(session_root, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
