"""What is in `deploy/`, and `cluster.yaml`: taken by Ray's and KubeRay's own schemas, and of one piece with the project.

KubeRay's schema is a megabyte and not ours to ship. KUBERAY_CRDS names a folder that has it:
`ray-operator/config/crd/bases` of a checkout of KubeRay (last checked against 1.7.0).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
import simulated_cloud
import yaml
from conftest import ROOT, kill_processes_with, processes_with, wait_until
from packaging.requirements import Requirement

LAUNCHER = ["cluster.yaml", "deploy/gcp.yaml", "deploy/on_premise.yaml"]
MANIFESTS = ["rayjob.yaml", "rayjob_kueue.yaml", "raycluster.yaml", "raycluster_redis.yaml", "rayservice.yaml"]


def read(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text())


def cluster_spec(manifest: str) -> dict:
    spec = read(f"deploy/{manifest}")["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


# --- ray up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LAUNCHER)
def test_rays_launcher_takes_the_file(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read(path))
    validate_config(prepared)
    # What Ray's defaults add would be installed by the machine's pip, where the head's Ray does not find it.
    assert not [line for line in prepared["head_setup_commands"] if line.startswith("pip ")]


def test_workers_of_clouds_come_from_zero():
    for path in LAUNCHER[:2]:
        config = read(path)
        (worker,) = (kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"])
        assert worker["min_workers"] == 0 and worker["resources"]["GPU"] >= 1, path


def test_all_launcher_files_set_machines_up_alike():
    alike = ["file_mounts", "rsync_exclude", "rsync_filter", "setup_commands", "head_start_ray_commands"]
    aws, *others = (read(path) for path in LAUNCHER)
    for other in others:
        for field in (*alike, "worker_start_ray_commands", "file_mounts_sync_continuously"):
            assert other[field] == aws[field], field


@pytest.mark.long  # starts a cluster of two nodes
@pytest.mark.timeout(900)
def test_ray_up_brings_a_cluster_whose_workers_come_for_a_run_and_go_when_idle():
    from ray import autoscaler

    from hrm_lm.cluster.start import free_port

    folder = Path(tempfile.mkdtemp(prefix="hrm_lm_"))  # a socket's path has room for 107 characters
    machines, user, dashboard = folder / "machines", folder / "user", free_port()
    for path in (machines, user / ".ray", folder / "ray"):
        path.mkdir(parents=True)
    (user / ".ray/auth_token").write_text("a-token-of-at-least-thirty-two-characters")
    environment = {
        "SIMULATED_CLOUD": machines, "RAY_TMPDIR": folder / "ray", "DASHBOARD_PORT": dashboard, "HOME": user,
        "PATH": f"{simulated_cloud.programs(folder / 'bin', 'ssh', 'rsync')}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}/tests", "RAY_FAKE_CLUSTER": 1, "RAY_AUTH_MODE": "token", "AUTOSCALER_UPDATE_INTERVAL_S": 1,
    }  # fmt: skip

    def ray(*arguments) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {name: str(value) for name, value in environment.items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # an interactive shell without a terminal to take
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    # As it is shipped, but for the provider, the CPUs of a node, the time until a node is idle, and the head's port. Ray
    # fills in what it does on AWS.
    text = (ROOT / "cluster.yaml").read_text().replace("6379", str(free_port()))
    defaults = yaml.safe_load((Path(autoscaler.__file__).parent / "aws/defaults.yaml").read_text())
    config = defaults | yaml.safe_load(text) | {"idle_timeout_minutes": 0.05}
    config["provider"] = {"type": "external", "module": "simulated_cloud.SimulatedCloud"}
    for kind, cpus in (("head", 1), ("gpu_worker", 2)):
        config["available_node_types"][kind] |= {"node_config": {}}
        config["available_node_types"][kind]["resources"]["CPU"] = cpus
    (folder / "cluster.yaml").write_text(yaml.safe_dump(config))
    try:
        ray("up", "--yes", folder / "cluster.yaml")
        head, worker = machines / "head-1", machines / "gpu_worker-1"
        assert (head / ".ray/auth_token").exists() and not worker.exists()
        output = ray(
            *("job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--working-dir", ROOT, "--"),
            *("python", "-m", "ray_jobs.train", "--dataset", "synthetic", "--steps", 4, "--run_name", "grown"),
            *("--save_dir", folder / "runs", "--use_gpu", "false", "--set", "ray.cpus_per_worker=2"),
        )
        assert "finished at step 4" in output and (folder / "runs/grown/result.json").exists()
        assert worker.exists()
        wait_until(lambda: not processes_with(f"HOME={worker}\0"))
        assert processes_with(f"HOME={head}\0")
    finally:
        kill_processes_with(str(machines))
        shutil.rmtree(folder, ignore_errors=True)


# --- KubeRay -----------------------------------------------------------------------------------------------------


def test_pods_of_all_manifests_are_alike():
    first, *others = (cluster_spec(name) for name in MANIFESTS)
    serve = {"name": "serve", "containerPort": 8000}  # KubeRay makes the service for a port of this name
    others[-1]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"].remove(serve)
    for other in others:
        assert other["headGroupSpec"] == first["headGroupSpec"]
        assert [group["template"] for group in other["workerGroupSpecs"]] == [
            group["template"] for group in first["workerGroupSpecs"]
        ]


def test_image_and_manifests_have_the_versions_that_pyproject_allows():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = {Requirement(line).name: Requirement(line).specifier for line in wanted}
    dockerfile = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    given = dict(line.removeprefix("ARG ").split("=") for line in dockerfile if line.startswith("ARG "))
    assert given["TORCH"] in allowed["torch"] and given["RAY"] in allowed["ray"]
    assert {cluster_spec(name)["rayVersion"] for name in MANIFESTS} == {given["RAY"]}


@pytest.mark.parametrize("name", MANIFESTS[:2])
def test_a_rayjobs_command_is_taken_and_a_later_attempt_goes_on(name, monkeypatch):
    from hrm_lm.cluster import run as cluster_run
    from hrm_lm.commands.train import main

    seen = []
    monkeypatch.setattr(cluster_run, "run", lambda config, resume: seen.append((config.ray, resume)) or sys.exit(0))
    spec = read(f"deploy/{name}")["spec"]
    python, m, module, *arguments = spec["entrypoint"].split()
    assert (python, m, module) == ("python", "-m", "ray_jobs.train")
    with pytest.raises(SystemExit, match="0"):
        main([argument.replace("/home/ray/hrm_lm", str(ROOT)) for argument in arguments])
    ((ray, resume),) = seen
    assert (ray.run_name, resume, ray.use_gpu, ray.wait_for_nodes) == ("arithmetic", "auto", True, True)
    assert ray.storage_path == "s3://BUCKET/runs" and spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"]


def test_a_rayservices_application_is_taken(monkeypatch):
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
    from ray.serve.schema import ServeDeploySchema

    from hrm_lm.commands import serve
    from hrm_lm.errors import UserError

    schema = ServeDeploySchema(**yaml.safe_load(read("deploy/rayservice.yaml")["spec"]["serveConfigV2"]))
    (application,) = schema.applications
    assert application.import_path == "hrm_lm.commands.serve:application"
    flags = serve.parse_args(application.args)
    assert (flags.replicas, flags.gpus_per_replica, flags.save_dir) == ("1:4", 1, "s3://BUCKET/runs")
    assert schema.http_options.request_timeout_s > flags.timeout  # the server's own limit tells more
    monkeypatch.delenv("HRM_LM_API_KEY", raising=False)
    with pytest.raises(UserError, match="HRM_LM_API_KEY must be set"):
        build(serve.application, application.args)


def test_a_queues_job_has_a_fixed_size_with_room_for_its_workers():
    job = read("deploy/rayjob_kueue.yaml")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert job["spec"]["suspend"] and job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert "enableInTreeAutoscaling" not in job["spec"]["rayClusterSpec"]  # Kueue refuses it
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 4
    assert "--num_workers 4" in job["spec"]["entrypoint"]


def test_a_pod_that_ends_announces_it_for_less_than_its_grace_period():
    from click.testing import CliRunner
    from ray.scripts.scripts import drain_node

    (group,) = cluster_spec("raycluster.yaml")["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (_, _, command) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drain, sleep = command.split(";")
    seconds = int(sleep.split()[1])
    assert f"--deadline-remaining-seconds={seconds}" in drain and seconds < pod["terminationGracePeriodSeconds"]
    known = CliRunner().invoke(drain_node, ["--help"]).output  # a hidden command, which Ray may change
    assert all(option.split("=")[0] in known for option in drain.split() if option.startswith("--"))
    assert "DRAIN_NODE_REASON_PREEMPTION" in known


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="needs KUBERAY_CRDS, a folder with KubeRay's schema")
@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberays_schema_takes_the_manifest_and_knows_every_field(name):
    import jsonschema  # of ray[default]

    manifest = read(f"deploy/{name}")
    file = Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{manifest['kind'].lower()}s.yaml"
    versions = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    (schema,) = (
        version["schema"]["openAPIV3Schema"]
        for version in versions
        if f"ray.io/{version['name']}" == manifest["apiVersion"]
    )
    jsonschema.validate(manifest, strict(schema))


def strict(schema):
    """The schema, where an object with known fields takes no others: Kubernetes would drop them without a word."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(part) for key, part in schema.items()}
    takes_any = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if schema.get("type") == "object" and "properties" in schema and not takes_any:
        closed.setdefault("additionalProperties", False)
    return closed
