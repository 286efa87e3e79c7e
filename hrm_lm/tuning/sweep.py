"""A sweep from the driver's side: check, start Ray, let Tune search, leave a table, the best config and a report.

<storage>/<run_name>/   trials.csv, best.yaml, best_checkpoint/, report.html, sweep.yaml; Tune's files and trials
"""

import os
import sys
from typing import TYPE_CHECKING, Any

import yaml

from hrm_lm.cluster.capacity import UNKNOWN_GROWTH, cluster_nodes, wants_gpus, workers_that_fit
from hrm_lm.cluster.ray_private import files_without_keys, has_trials, whole_files
from hrm_lm.cluster.run import checked_dataset
from hrm_lm.cluster.run_folder import RunFolder
from hrm_lm.cluster.start import say, started_ray
from hrm_lm.errors import RunFailed, UserError
from hrm_lm.filesystem import without_keys
from hrm_lm.parsing import parse_yaml
from hrm_lm.training.validation import metric_names
from hrm_lm.tuning.results import Trial, best_trial, read_trials, write_results
from hrm_lm.tuning.space import Sweep

if TYPE_CHECKING:
    from ray.tune import Tuner
    from ray.tune.search import SearchAlgorithm, Searcher

EXPERIMENT = "trials"
"""Tune's folder within the sweep's."""


def run_sweep(sweep: Sweep, folder: RunFolder, resume: bool) -> list[Trial]:
    """Searches and writes the results. Raises RunFailed where no trial succeeded, KeyboardInterrupt after Ctrl-C."""
    config, tune_config = sweep.config, sweep.tune
    splits = checked_dataset(config)
    if tune_config.metric not in (reported := metric_names(splits)):
        raise UserError(f"tune.metric: trials report no {tune_config.metric!r}, but {', '.join(reported)}")
    written = without_keys(sweep.to_dict())
    if folder.exists("sweep.yaml"):
        if not resume:
            raise UserError(
                f"sweep {folder.name!r} is already in {folder.uri}; --resume continues it, --run_name makes another"
            )
        if without_keys(saved_sweep(folder)) != written:
            raise UserError(
                f"sweep {folder.name!r} was started with another sweep file; --resume takes the one it was started with"
            )
    elif resume:
        raise UserError(f"no sweep {folder.name!r} in {folder.storage_uri} to resume")
    say(f"sweep {folder.name!r} in {folder.uri}")

    from hrm_lm.tuning.report import render

    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # what a killed sweep can forget
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    with started_ray():
        resources = trial_resources(sweep)
        # A sweep that resumes had room when it started: it waits until the room is there again.
        at_once = trials_at_once(sweep, resources, wait=resume or sweep.config.ray.wait_for_nodes)
        search = search_algorithm(sweep, at_once)
        # The lock is the last check: from here on files are written.
        with folder.lock("sweep"), files_without_keys(folder.fs), whole_files():
            folder.write("sweep.yaml", yaml.safe_dump(written, sort_keys=False))
            goes_on = resume and has_trials(folder.fs, f"{folder.path}/{EXPERIMENT}")
            if resume and not goes_on:
                say("the sweep was interrupted before its first trial: starting anew")
            results = build_tuner(sweep, folder, resources, at_once, search, goes_on).fit()
            trials = read_trials(results, sweep)
            best = best_trial(trials, sweep)
            folder.write("report.html", render(trials, best, sweep, folder.name))
            write_results(trials, best, sweep, folder)
    unfinished = [trial for trial in trials if trial.status == "unfinished"]
    if unfinished and not tune_config.time_budget_s:
        raise KeyboardInterrupt(
            f"--resume --run_name {folder.name} goes on with the {len(unfinished)} unfinished trials"
        )
    if best is None:
        raise RunFailed(
            f"no trial succeeded; {folder.uri}/trials.csv has each one's error, the first: {trials[0].error}"
        )
    return trials


def saved_sweep(folder: RunFolder) -> Any:
    """What a sweep's sweep.yaml says. Raises UserError where it is damaged."""
    try:
        return parse_yaml(folder.read("sweep.yaml"))
    except ValueError as error:
        raise UserError(f"{folder.uri}/sweep.yaml: damaged: {error}; give another --run_name") from None


def build_tuner(
    sweep: Sweep,
    folder: RunFolder,
    resources: dict[str, float],
    at_once: int,
    search: "SearchAlgorithm | Searcher",
    resume: bool,
) -> "Tuner":
    """The Tuner of a new sweep, or of the sweep that is there. Making a new one writes files."""
    import ray
    from ray import tune

    from hrm_lm.tuning.progress import SweepProgress
    from hrm_lm.tuning.schedulers import scheduler
    from hrm_lm.tuning.trial import TrialSetup, run_trial

    options = sweep.tune
    in_process = trains_in_process(sweep)
    setup = TrialSetup(
        base=sweep.base,
        metric=options.metric,
        mode=options.mode,
        driver_folder=os.getcwd(),
        in_process=in_process,
        workers=options.workers_per_trial,
        resources=resources,
    )
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, setup=setup),
        # A TorchTrainer asks for its workers' resources itself. Tune takes no empty request, hence the byte.
        resources if in_process else {"CPU": 0, "memory": 1},
    )
    if resume:
        path = f"{folder.path}/{EXPERIMENT}"
        if not tune.Tuner.can_restore(path, storage_filesystem=folder.fs):
            raise UserError(
                f"sweep {folder.name!r} cannot be resumed: {folder.uri}/{EXPERIMENT}/tuner.pkl is gone; "
                "give another --run_name"
            )
        return tune.Tuner.restore(path, trainable, resume_unfinished=True, storage_filesystem=folder.fs)

    cluster = ray.cluster_resources()
    say(
        f"Ray: {cluster.get('CPU', 0):g} CPUs, {cluster.get('GPU', 0):g} GPUs; {at_once} trial(s) at a time of {resources}"
    )
    return tune.Tuner(
        trainable,
        param_space=sweep.param_space(),
        tune_config=tune.TuneConfig(
            metric=options.metric,
            mode=options.mode,
            num_samples=options.num_samples,
            max_concurrent_trials=at_once,
            search_alg=search,
            scheduler=scheduler(sweep),
            time_budget_s=options.time_budget_s,
            # Trials that HyperBand pauses and takes up again may wait for ever for a process that is to be reused.
            reuse_actors=in_process and options.scheduler != "hyperband",
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=EXPERIMENT,
            storage_path=folder.path,
            storage_filesystem=folder.fs,
            failure_config=tune.FailureConfig(max_failures=options.max_failures),
            checkpoint_config=tune.CheckpointConfig(
                # A donor's checkpoint must be there until the trial that takes it over starts.
                num_to_keep=None if options.scheduler == "pbt" else 1,
                checkpoint_score_attribute=options.metric,
                checkpoint_score_order=options.mode,
            ),
            callbacks=[SweepProgress(list(sweep.space), options.metric, options.mode, sys.stderr.isatty())],
            verbose=0,
        ),
    )


def trial_resources(sweep: Sweep) -> dict[str, float]:
    """What each worker of a trial takes."""
    gpus = sweep.tune.gpus_per_worker
    if gpus is None:
        nodes, grown = cluster_nodes()
        gpus = 1 if wants_gpus(sweep.config, nodes + grown) else 0
    return {"CPU": sweep.tune.cpus_per_worker} | ({"GPU": gpus} if gpus else {})


def trials_at_once(sweep: Sweep, resources: dict[str, float], wait: bool) -> int:
    """How many trials run at a time on the cluster at its largest.

    resources: of each worker. Raises UserError where there is no room for a single trial, unless the sweep is to wait.
    """
    nodes, grown = cluster_nodes()
    workers, limit = sweep.tune.workers_per_trial, sweep.tune.max_concurrent_trials
    fit = workers_that_fit(resources, nodes, grown)
    room = fit // workers
    if wait:
        return limit or max(room, 1)
    if room < 1:
        cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        raise UserError(
            f"a trial needs {workers} worker(s) of {resources}; the cluster has {cpus:g} CPUs and {gpus:g} GPUs, "
            f"room for {fit} such workers with all it can grow to {UNKNOWN_GROWTH}"
        )
    return min(limit or room, room)


def trains_in_process(sweep: Sweep) -> bool:
    """Whether a trial trains in Tune's own process, which the next trial takes over.

    Measured (benchmarks/trial_startup.py): a trial starts at once in a process that it takes over, after seconds in a
    new process, and after many seconds with a TorchTrainer. The process that launches a TorchTrainer ends with its
    trial, so that Ray ends the workers of a trial that was stopped.
    """
    return sweep.tune.workers_per_trial == 1


def search_algorithm(sweep: Sweep, at_once: int) -> "SearchAlgorithm | Searcher":
    from ray.tune.search import BasicVariantGenerator

    if sweep.tune.search == "random":
        return BasicVariantGenerator(max_concurrent=at_once, random_state=sweep.tune.seed)
    from ray.tune.search.optuna import OptunaSearch

    try:
        return OptunaSearch(seed=sweep.tune.seed)
    except (AssertionError, ImportError):
        raise UserError("tune.search: optuna is not installed; pip install 'hrm-lm[optuna]', or use random") from None


def summary(trials: list[Trial], sweep: Sweep, folder: RunFolder) -> str:
    """The best values, where they are and the command that trains with them."""
    best = best_trial(trials, sweep)
    assert best is not None  # else the sweep has failed
    values = "\n".join(f"  {dotted}: {_short(value)}" for dotted, value in best.params.items())
    return (
        f"best of {len(trials)} trials: trial {best.number}, {sweep.tune.metric} {best.score:.4f} at step {best.best_step}\n"
        f"{values}\n"
        f"report: {folder.uri}/report.html\n"
        f"train with it: python -m ray_jobs.train --config {folder.uri}/best.yaml"
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
