"""Two hosts that share nothing but a network and S3: every command, with a worker on each host.

A host is a raylet in a mount namespace of its own. Its home, its temporary files, Ray's session and the folder of the
command are on a tmpfs that only this namespace sees.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.fs
import pytest
import yaml
from conftest import ROOT, kill_processes_with, small_config, wait_until

pytestmark = pytest.mark.long

SMALL = small_config(train__steps=6, train__val_every=3, train__checkpoint_every=2, ray__num_workers=2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Hosts:
    """Two nodes of a CPU each. The commands are given on the first, which is the head."""

    def __init__(self, folder: str):
        self.folder, self.mark = folder, f"HRM_LM_TEST={folder}"
        port = free_port()
        self.environment = os.environ | {
            "HRM_LM_TEST": folder,
            "HOME": folder,
            "TMPDIR": folder,
            "RAY_TMPDIR": folder,
            "HRM_LM_CACHE": f"{folder}/cache",
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a-token-that-both-hosts-of-this-test-know",
        }
        head = ["--head", f"--port={port}", f"--dashboard-port={free_port()}"]
        self.pids = [self._start("127.0.0.1", *head)]
        self.pids += [self._start("127.0.0.2", f"--address=127.0.0.1:{port}")]
        count = "import ray; ray.init(logging_level='error'); print(len(ray.nodes()))"
        wait_until(lambda: self.run("-c", count).stdout.strip() == "2")

    def _start(self, address: str, *options: str) -> int:
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1", "--num-gpus=0"]
        ray += [f"--node-ip-address={address}", f"--dashboard-agent-listen-port={free_port()}", *options]
        mounted = 'mount -t tmpfs host "$0" && mkdir "$0/work" && cd "$0/work" && exec "$@" > "$0/ray.log" 2>&1'
        # The process becomes the shell, and the shell becomes `ray start`.
        command = ["unshare", "--mount", "sh", "-c", mounted, self.folder, *ray]
        process = subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL)
        log = f"{self.folder}/ray.log"
        started = lambda: "Ray runtime started" in self.run(log, program="cat", pid=process.pid).stdout  # noqa: E731
        wait_until(lambda: started() or process.poll() is not None)
        assert process.poll() is None, f"host {address} did not start"
        return process.pid

    def run(self, *arguments, program: str = sys.executable, pid: int | None = None) -> subprocess.CompletedProcess:
        """Runs Python with these arguments on the first host, in its folder `work`."""
        there = ["nsenter", "--mount", f"--target={pid or self.pids[0]}", "sh", "-c", f'cd {self.folder}/work && "$@"']
        command = [*there, "sh", program, *map(str, arguments)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)

    def write(self, name: str, text: str) -> None:
        """Writes a file into the first host's folder `work`."""
        code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
        assert self.run("-c", code, name, text).returncode == 0


@pytest.fixture(scope="module")
def hosts():
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"hosts with file systems of their own need the right to mount: {tried.stderr.strip()}")
    folder = tempfile.mkdtemp(prefix="h")  # short: sockets live in it
    try:
        yield Hosts(folder)
    finally:
        kill_processes_with(f"HRM_LM_TEST={folder}")
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def prepared(hosts, bucket):
    """The URI of a dataset that was prepared on both hosts."""
    for name in ("a", "b"):
        with bucket.fs.open_output_stream(f"bucket/in/{name}.jsonl") as file:
            for i in range(40):
                file.write(json.dumps({"prompt": f"{name}{i}?", "response": str(i)}).encode() + b"\n")
    options = ["--tokenizer", "characters", "--val_fraction", "0.2", "--shard_mb", "0.0005"]
    done = hosts.run("-m", "ray_jobs.prepare", "--input", bucket("in"), "--output", bucket("out"), *options)
    assert done.returncode == 0, done.stderr
    return bucket("out")


def files(bucket, path: str) -> list[str]:
    """The names below a path of the bucket."""
    infos = bucket.fs.get_file_info(pyarrow.fs.FileSelector(f"bucket/{path}", recursive=True, allow_not_found=True))
    return sorted(info.path.removeprefix(f"bucket/{path}/") for info in infos if info.is_file)


def train(hosts, bucket, dataset, *options):
    hosts.write("c.yaml", SMALL.to_yaml())
    arguments = ["--config", "c.yaml", "--dataset", dataset, "--save_dir", bucket("runs")]
    return hosts.run("-m", "ray_jobs.train", *arguments, *options)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_hosts_train_go_on_and_generate_through_object_storage(hosts, bucket, prepared, parallel):
    for steps in (6, 8):  # the second run starts from what both hosts have written
        options = ["--set", f"ray.parallel={parallel}", "--run_name", parallel, "--steps", steps]
        done = train(hosts, bucket, prepared, *options)
        assert done.returncode == 0, done.stderr
    assert "resuming from step 6" in done.stderr and "attempt" not in done.stderr
    found = files(bucket, f"runs/{parallel}")
    assert {"config.yaml", "result.json", "checkpoint_00000008/trainer_state.json"} <= set(found)
    assert any(name.startswith("events.out.tfevents.") for name in found)
    parts = [name for name in found if name.startswith("checkpoint_00000008/model")]
    assert len(parts) == (2 if parallel == "fsdp" else 1), parts
    asked = hosts.run(
        "-m", "hrm_lm.commands", "generate", "--save_dir", bucket("runs"), "--run_name", parallel, "--prompt", "a1?"
    )
    assert asked.returncode == 0 and len(asked.stdout.splitlines()) == 1, asked.stderr


def test_a_trial_of_two_hosts_writes_its_checkpoints_once_into_object_storage(hosts, bucket, prepared):
    sweep = {
        "base": SMALL.to_dict(),
        "search_space": {"optim.lr": {"grid": [1e-2, 1e-3]}},
        "tune": {"num_samples": 1, "workers_per_trial": 2, "grace_steps": 6},
    }
    sweep["base"]["data"]["dataset"] = prepared
    hosts.write("sweep.yaml", yaml.safe_dump(sweep))
    done = hosts.run("-m", "ray_jobs.tune", "--config", "sweep.yaml", "--save_dir", bucket("runs"), "--run_name", "s")
    assert done.returncode == 0, done.stdout + done.stderr
    found = files(bucket, "runs/s")
    assert {"best.yaml", "report.html", "trials.csv", "best_checkpoint/trainer_state.json"} <= set(found)
    kept = [name for name in found if name.startswith("trials/") and name.endswith("trainer_state.json")]
    trials = [name.split("/")[1] for name in kept]
    assert len(set(trials)) == 2 and max(map(trials.count, trials)) <= 2, "of each trial the best and the last"
    asked = hosts.run(
        "-m", "hrm_lm.commands", "generate", "--save_dir", bucket("runs"), "--run_name", "s", "--prompt", "a1?"
    )
    assert asked.returncode == 0 and len(asked.stdout.splitlines()) == 1, asked.stderr


def test_what_only_the_first_host_has_is_told_at_once(hosts, bucket, prepared):
    done = train(hosts, bucket, prepared, "--save_dir", "runs", "--run_name", "here")
    assert done.returncode == 2 and "this folder of the driver is not on node" in done.stderr
    hosts.write("d.jsonl", "".join(json.dumps({"prompt": f"{i}?", "response": str(i)}) + "\n" for i in range(40)))
    done = train(hosts, bucket, "d.jsonl", "--run_name", "missing")
    assert done.returncode == 2 and ": d.jsonl: cannot be read" in done.stderr and "error: worker" in done.stderr
    assert "attempt" not in done.stderr
