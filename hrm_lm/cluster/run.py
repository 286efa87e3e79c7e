"""A run from the driver's side: check everything, start Ray, fit, leave `result.json` and `report.html`.

What a user can get wrong is refused here, before Ray starts where that is possible.
"""

import json
import math
import os
import sys
import threading
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hrm_lm.cluster import run_folder
from hrm_lm.cluster.capacity import plan_workers
from hrm_lm.cluster.loggers import check_loggers, followed
from hrm_lm.cluster.ray_private import quiet_logging
from hrm_lm.cluster.run_folder import RunFolder
from hrm_lm.cluster.start import say, started_ray
from hrm_lm.config import Config
from hrm_lm.data.registry import BUILT_IN, Splits, load_dataset
from hrm_lm.errors import DamagedCheckpoint, RunFailed, UserError
from hrm_lm.filesystem import resolve, without_secrets
from hrm_lm.training.checkpoint import Checkpoint, Progress, differences, obstacles, read_checkpoint

if TYPE_CHECKING:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer


def run(config: Config, resume: str = "auto") -> dict[str, Any]:
    """Trains `config` under Ray and returns what `result.json` holds.

    resume: "auto" continues a run of the same name, "never" refuses to touch it. Raises UserError for what the user
    can mend, RunFailed for a run that started and could not finish.
    """
    name = config.ray.run_name or f"hrm-{datetime.now():%Y%m%d-%H%M%S}"
    location = config.ray.storage_path
    location = run_folder.outliving(location, "--save_dir") if location else run_folder.default_storage()
    folder = RunFolder(location, name)
    checked_dataset(config)
    check_loggers(config)
    if config.train.mixed_precision == "fp16" and config.ray.use_gpu is False:
        raise UserError("train.mixed_precision: fp16 needs a CUDA GPU; use bf16 or none on CPU")
    if config.train.init_from:
        fs, path = resolve(config.train.init_from)
        read_checkpoint(path, fs)
    say(f"run {name!r} in {folder.uri}")
    if folder.has_checkpoints():
        progress = check_resume(config, folder, resume)
        if progress.step >= config.train.steps:
            say(f"already at step {progress.step} of {config.train.steps}: nothing to do")
            return {"status": "finished"} | summarize(folder)

    with started_ray():
        scaling = plan_workers(config)
        with folder.lock():
            folder.write("config.yaml", config.to_yaml())
            folder.remove("result.json")  # an earlier command's
            with followed(config, folder) as ended:
                result = fit(config, folder, scaling)
                folder.write("result.json", json.dumps(result, indent=2) + "\n")
                ended |= result
    if result["status"] in ("diverged", "failed"):
        raise RunFailed(result["error"])
    return result


def checked_dataset(config: Config) -> Splits:
    """The dataset as the driver reads it; raises UserError. In a job the error names why a file may not be there."""
    try:
        return load_dataset(config.data, config.model, config.train.seed)
    except UserError as error:
        named = [config.data.dataset, *(part.dataset for part in config.data.mixture.values())]
        files = [name for name in named if name and ":" not in name and name not in BUILT_IN]
        missing = [name for name in files if not os.path.exists(name)]
        if not (run_folder.in_ray_job() and missing):
            raise
        raise UserError(
            f"{error}\n{missing[0]} did not come with the job: its package leaves out what .gitignore names, "
            "such as data/; give a URI, or a folder that every node has"
        ) from None


def check_resume(config: Config, folder: RunFolder, resume: str) -> Progress:
    """How far the run that is there has come. Names what differs from it; refuses what cannot be continued."""
    if resume == "never":
        raise UserError(f"run {folder.name!r} already has checkpoints in {folder.uri}; give another --run_name")
    saved = last_whole(folder)
    if refused := obstacles(saved.config, config):
        what = ", ".join(f"{key} ({_change(*values)})" for key, values in refused.items())
        raise UserError(
            f"run {folder.name!r} cannot be resumed with another model shape, sample order or optimizer state: {what}\n"
            "give another --run_name, or --init_from its checkpoint to take only the weights"
        )
    say(f"resuming from step {saved.progress.step}")
    for key, values in differences(saved.config, config).items():
        say(f"  {key}: {_change(*values)}")
    return saved.progress


def last_whole(folder: RunFolder) -> Checkpoint:
    """What the last checkpoint says of itself; where it is damaged, which is told, what the one before it says.

    Only the headers of its tensors are read: the workers read all of it, and find other damage.
    """
    kept, last = folder.checkpoints()
    earlier = sorted((metrics["step"], path) for path, metrics in kept if path != last)
    for path in [last, *(path for _, path in reversed(earlier))]:
        try:
            return read_checkpoint(path, folder.fs, for_resume=True)
        except DamagedCheckpoint as error:
            say(str(error))
    raise UserError(f"run {folder.name!r} has no whole checkpoint in {folder.uri}; give another --run_name")


def _change(old: Any, new: Any) -> str:
    """A field's two values for the user, who may have put keys into a URI."""
    old, new = (without_secrets(value) if isinstance(value, str) else value for value in (old, new))
    return f"{old} -> {new}"


def fit(config: Config, folder: RunFolder, scaling: "ScalingConfig") -> dict[str, Any]:
    """Runs the trainer and sums the run up; a failure is a status of its own."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig

    from hrm_lm.cluster.failures import Trainer
    from hrm_lm.cluster.watchdog import process_group
    from hrm_lm.cluster.worker import train_loop_per_worker

    trainer = Trainer(
        train_loop_per_worker,
        train_loop_config={
            "config": config.to_dict(),
            "driver_folder": os.getcwd(),
            "display": "bar" if sys.stderr.isatty() else "lines",
            "run_folder": (folder.fs, folder.path),
        },
        torch_config=process_group(config.ray.hang_timeout),
        scaling_config=scaling,
        run_config=RunConfig(
            name=folder.name,
            storage_path=folder.storage,
            storage_filesystem=folder.fs,
            failure_config=FailureConfig(max_failures=config.ray.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=max(config.ray.num_to_keep, 2),  # there is one to go back to if the last is damaged
                checkpoint_score_attribute="val_loss",
                checkpoint_score_order="min",
            ),
            logging_config=quiet_logging(),
        ),
    )
    outcome = wait_for(trainer)
    if isinstance(outcome, BaseException):
        status = {"status": "failed", "error": explain_failure(outcome, folder.name)}
    else:
        status = {key: outcome[key] for key in ("status", "error") if key in outcome}
    return status | summarize(folder)


def wait_for(trainer: "TorchTrainer") -> dict[str, Any] | BaseException:
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


def explain_failure(error: BaseException, run_name: str) -> str:
    """Two lines: what stopped the workers, and what to do. Raises UserError if a UserError stopped them."""
    from hrm_lm.cluster.failures import user_error

    if told := user_error(error):
        raise told from None
    print(error, file=sys.stderr)
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (
        f"training failed: {lines[-1].strip() if lines else type(error).__name__}\n"
        f"the same command with --run_name {run_name} goes on from what was saved"
    )


def summarize(folder: RunFolder) -> dict[str, Any]:
    """`result.json`, less the status. It is made of the last checkpoint's metrics, and of the best checkpoint's where
    there was a validation.
    """
    if not folder.has_checkpoints():
        return {"step": 0}
    kept, last = folder.checkpoints()
    metrics = next(metrics for path, metrics in kept if path == last)
    seconds = metrics["seconds"]
    summary = {"step": metrics["step"]}
    best, best_metrics = kept[0]
    if not math.isnan(best_metrics["val_loss"]):
        summary |= {name: value for name, value in best_metrics.items() if name.startswith("val_")}
        summary |= {"best_step": best_metrics["step"], "best_checkpoint": folder.uri_of(best)}
    summary |= {name: metrics[name] for name in ("skipped", "rollbacks", "spikes") if name in metrics}
    return summary | {
        "last_checkpoint": folder.uri_of(last),
        "tokens_per_s": round(metrics["tokens"] / seconds, 1) if seconds else None,
        "seconds": round(seconds, 2),
        **({"save_ms": round(metrics["save_ms"], 1)} if "save_ms" in metrics else {}),  # of an older checkpoint: none
        **({"mfu": round(metrics["mfu"], 4)} if "mfu" in metrics else {}),  # of the last interval
    }
