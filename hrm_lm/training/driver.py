"""A run from the driver's side: check everything, start Ray, fit, leave `result.json`.

What a user can get wrong is refused here, before Ray starts where that is possible.
"""

import os
import socket
import sys
import threading
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Iterator

import yaml

from hrm_lm.config import Config, flatten, parse_config
from hrm_lm.data.registry import load_dataset
from hrm_lm.errors import RunFailed, UserError
from hrm_lm.training import storage
from hrm_lm.training.checkpoint import Progress, read_checkpoint
from hrm_lm.training.storage import RunFolder

# Changing one of these changes the model's shape or the order of samples: no resume across that.
FIXED = ("data.", "train.seed", "train.batch_size", "train.batch_tokens", "train.length_window")
FIXED += ("model.architecture", "model.d_model", "model.n_heads", "model.encoder_layers", "model.decoder_layers")
FIXED += ("model.expansion", "model.hrm.h_layers", "model.hrm.l_layers", "model.bridge.type", "model.bridge.prefix_len")


def run(config: Config, resume: str = "auto") -> dict[str, Any]:
    """Trains `config` under Ray and returns what `result.json` holds.

    resume: "auto" continues a run of the same name, "never" refuses to touch it. Raises UserError for what the user
    can mend, RunFailed for a run that started and could not finish.
    """
    name = config.ray.run_name or f"hrm-{datetime.now():%Y%m%d-%H%M%S}"
    location = config.ray.storage_path or storage.default_storage()
    folder = RunFolder(location, name)
    load_dataset(config.data, config.model, config.train.seed)
    if config.train.mixed_precision == "fp16" and config.ray.use_gpu is False:
        raise UserError("train.mixed_precision: fp16 needs a CUDA GPU; use bf16 or none on CPU")
    if config.train.init_from:
        with storage.local_checkpoint(config.train.init_from) as path:
            read_checkpoint(path)
    say(f"run {name!r} in {folder.path}")
    if folder.has_checkpoints():
        progress = check_resume(config, folder, resume)
        if progress.step >= config.train.steps:
            say(f"already at step {progress.step} of {config.train.steps}: nothing to do")
            return {"status": "finished"} | summarize(folder)

    with started_ray():
        scaling = plan_workers(config)
        with folder.lock():
            folder.write("config.yaml", config.to_yaml())
            result = fit(config, folder, scaling)
            folder.write("result.json", storage.dump_json(result))
    if result["status"] in ("diverged", "failed"):
        raise RunFailed(result["error"])
    return result


def check_resume(config: Config, folder: RunFolder, resume: str) -> Progress:
    """How far the run that is there has come. Names what differs from it; refuses what cannot be continued."""
    if resume == "never":
        raise UserError(f"run {folder.name!r} already has checkpoints in {folder.path}; give another --run_name")
    _, last = folder.checkpoints()
    with storage.local_checkpoint(last, folder.fs) as path:
        progress = read_checkpoint(path).progress
    saved = parse_config(yaml.safe_load(folder.read("config.yaml")), source=f"{folder.path}/config.yaml")
    before, now = flatten(saved.to_dict()), flatten(config.to_dict())
    changed = {key: (before.get(key), now.get(key)) for key in before | now if before.get(key) != now.get(key)}
    changed = {key: values for key, values in changed.items() if not key.startswith("ray.")}
    refused = {key: values for key, values in changed.items() if key.startswith(FIXED) or _bypasses(key, values)}
    if refused:
        what = ", ".join(f"{key} ({old} -> {new})" for key, (old, new) in refused.items())
        raise UserError(
            f"run {folder.name!r} cannot be resumed with another model shape or sample order: {what}\n"
            "give another --run_name, or --init_from its checkpoint to take only the weights"
        )
    say(f"resuming from step {progress.step}")
    for key, (old, new) in changed.items():
        say(f"  {key}: {old} -> {new}")
    return progress


def _bypasses(key: str, values: tuple[Any, Any]) -> bool:
    """Zero H-cycles mean no core at all: another shape."""
    return key == "model.hrm.h_cycles" and 0 in values


@contextmanager
def started_ray() -> Iterator[None]:
    """A running cluster where there is one (RAY_ADDRESS, `ray start`), else a local Ray for as long as this lasts."""
    # Ray would take progress lines for repetitions of one another and drop most, and Ray Train show the others twice.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    import ray

    if ray.is_initialized():  # a test's, or a notebook's
        yield
        return
    try:
        init_ray()
    except (ConnectionError, RuntimeError) as error:
        raise RunFailed(f"Ray did not start: {' '.join(str(error).split())[:500]}") from None
    try:
        yield
    except KeyboardInterrupt:
        # No orderly shutdown, which can hang on workers in mid-step: a local Ray ends with this process. What they say
        # until then is no news.
        sys.stdout = sys.stderr = open(os.devnull, "w")
        raise
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


def init_ray(**options: Any) -> None:
    """`ray.init`, and if that starts a Ray, one whose processes know it from others on this machine.

    Ray Train frees what a dead run held through the dashboard, which it looks for with an empty environment, and gives
    up where it finds two of them.
    """
    import ray

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    try:
        ray.init(logging_level="error", dashboard_port=port, **options)
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def plan_workers(config: Config):
    """The ScalingConfig; raises UserError where the cluster neither has the workers' resources nor can grow to them."""
    import ray
    from ray.train import ScalingConfig

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    growth = cluster_growth()
    num_gpus, num_cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
    workers = config.ray.num_workers
    use_gpu = config.ray.use_gpu
    if use_gpu == "auto":
        use_gpu = num_gpus > 0 or any(node.get("GPU", 0) for node in growth)
    if config.train.mixed_precision == "fp16" and not use_gpu:
        raise UserError("train.mixed_precision: fp16 needs a CUDA GPU and the cluster has none; use bf16 or none")

    cpus = config.ray.cpus_per_worker
    if cpus == "auto":
        smallest = min((int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1), default=1)
        cpus = 1 if use_gpu else min(max(num_cpus // workers, 1), smallest)
    resources = {"CPU": cpus} | ({"GPU": 1} if use_gpu else {})

    def room(available: list[dict[str, float]]) -> int:
        return sum(min(int(node.get(kind, 0) // amount) for kind, amount in resources.items()) for node in available)

    if room(nodes) < workers and room(nodes + growth) < workers and not config.ray.wait_for_nodes:
        each = " and ".join(f"{amount} {kind}" for kind, amount in resources.items())
        raise UserError(
            f"ray.num_workers: {workers} workers of {each} each do not fit the cluster: it has {len(nodes)} node(s), "
            f"{num_cpus} CPUs, {num_gpus} GPUs, room for {room(nodes + growth)} such workers with all it can grow to "
            "(where Ray cannot tell that, as under KubeRay: --set ray.wait_for_nodes=true)"
        )
    say(f"Ray: {len(nodes)} node(s), {num_cpus} CPUs, {num_gpus} GPUs; {workers} worker(s) of {resources}")
    return ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources)


def cluster_growth() -> list[dict[str, float]]:
    """Resources of each node that an autoscaler may add, as far as it can be known."""
    path = os.path.expanduser("~/ray_bootstrap_config.yaml")  # where `ray up` leaves the head its cluster.yaml
    if not os.path.exists(path):
        return []
    import ray

    if not any(node["Alive"] and "node:__internal_head__" in node["Resources"] for node in ray.nodes()):
        return []
    with open(path, encoding="utf-8") as file:
        cluster = yaml.safe_load(file)
    head = cluster.get("head_node_type")
    return [
        kind.get("resources", {})
        for name, kind in cluster.get("available_node_types", {}).items()
        for _ in range(kind.get("max_workers", cluster.get("max_workers", 0)) if name != head else 0)
    ]


def fit(config: Config, folder: RunFolder, scaling) -> dict[str, Any]:
    """Runs the trainer and sums the run up; a failure is a status of its own."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from hrm_lm.training.loop import train_loop_per_worker

    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "config": config.to_dict(),
            "driver_folder": os.getcwd(),
            "display": "bar" if sys.stderr.isatty() else "lines",
            "event_folder": folder.path if folder.is_local else None,
        },
        scaling_config=scaling,
        run_config=RunConfig(
            name=folder.name,
            storage_path=folder.storage,
            storage_filesystem=folder.fs,
            failure_config=FailureConfig(max_failures=config.ray.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.ray.num_to_keep,
                checkpoint_score_attribute="val_loss",
                checkpoint_score_order="min",
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    outcome = wait_for(trainer)
    if isinstance(outcome, BaseException):
        status = {"status": "failed", "error": explain_failure(outcome)}
    else:
        status = {key: outcome[key] for key in ("status", "error") if key in outcome}
    return status | summarize(folder)


def wait_for(trainer) -> dict[str, Any] | BaseException:
    """The loop's return value, or what stopped it.

    `fit` waits in a thread: in the main one Ray Train would take Ctrl-C over, and answer it with a traceback.
    """
    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome.append(trainer.fit().return_value)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=target, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    return outcome[0]


def explain_failure(error: BaseException) -> str:
    """A line or two for what stopped the workers; raises UserError if it was one."""
    for rank, failure in sorted(getattr(error, "worker_failures", {}).items()):
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, UserError):
            raise UserError(f"worker {rank}: {cause}") from None
    print(error, file=sys.stderr)
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"training failed: {lines[-1].strip() if lines else type(error).__name__}"


def summarize(folder: RunFolder) -> dict[str, Any]:
    """`result.json`, less the status: from the last checkpoint, the best one's `val_loss`."""
    if not folder.has_checkpoints():
        return {"step": 0}
    kept, last = folder.checkpoints()
    best, best_metrics = kept[0]
    metrics = next(metrics for path, metrics in kept if path == last)
    seconds = metrics["seconds"]
    return {
        "step": metrics["step"],
        **{name: value for name, value in best_metrics.items() if name.startswith("val_")},
        "best_step": best_metrics["step"],
        "best_checkpoint": best,
        "last_checkpoint": last,
        "tokens_per_s": round(metrics["tokens"] / seconds, 1) if seconds else None,
        "seconds": round(seconds, 2),
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
