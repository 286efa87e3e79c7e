"""A sweep file: a base config, a search space over its dotted paths, and how to search.

base: default.yaml            # a config beside this file; or the fields themselves
search_space:
  optim.lr: {loguniform: [1.0e-4, 1.0e-2]}
  model.hrm.h_cycles: {choice: [1, 2, 4]}
tune: {num_samples: 16, scheduler: asha}
"""

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from hrm_lm.config import (
    Config,
    Count,
    Positive,
    Section,
    explain,
    flatten,
    merged,
    parse_config,
    read_yaml,
    set_dotted,
    with_bases,
)
from hrm_lm.errors import UserError
from hrm_lm.filesystem import without_keys, without_secrets
from hrm_lm.parsing import one_line, short

# distribution -> how many numbers it takes; None: any number of any values
DISTRIBUTIONS = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2, "choice": None, "grid": None}

PERTURBED = ("optim.lr", "optim.weight_decay", "train.grad_clip")
"""What population-based training may change in mid-run: weights and sample order do not depend on it."""


class TuneSection(Section):
    """How a sweep searches (`hrm_lm.tuning`)."""

    num_samples: Positive = 16
    """How many points are drawn from the space. Each of them is repeated for every point of the grids."""
    max_concurrent_trials: Count = 0
    """How many trials run at a time. With 0 it is as many as the cluster, once grown, has room for."""
    metric: str = "val_loss"
    """The validation score that trials are compared by."""
    mode: Literal["min", "max"] = "min"
    """Whether the lowest or the highest `metric` is best."""
    scheduler: Literal["asha", "fifo", "pbt", "hyperband"] = "asha"
    """What stops poor trials early. `fifo` stops no trial; `pbt` gives poor trials the weights of good trials."""
    search: Literal["random", "optuna"] = "random"
    """What draws the points. `optuna` learns from the trials that have ended, and needs the extra `optuna`."""
    seed: Count = 0
    """Seed of the draws."""
    grace_steps: Positive | None = None
    """Steps that a trial gets before it may be stopped or changed. When it is left out, it is an eighth of `train.steps`,
    and at least `train.val_every`."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3
    """Out of how many trials a single trial goes on at each rung (`asha` and `hyperband`)."""
    workers_per_trial: Positive = 1
    """Data-parallel workers of a trial. With 1 the trial trains in its own process; with more it starts a
    TorchTrainer."""
    cpus_per_worker: Positive = 1
    """CPUs that each worker of a trial reserves."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs that each worker of a trial reserves. A fraction below 1 lets trials of a single worker share a GPU. When it
    is left out, it is 1 where the cluster has GPUs or may grow to some, and 0 otherwise."""
    max_failures: Count = 1
    """How often a trial that crashed is restarted from its last checkpoint."""
    time_budget_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which the sweep ends. When it is left out, there is no limit."""


class SweepFile(Section):
    """A sweep file."""

    base: str | dict[str, Any] = {}
    """The config that trials start from: the path of a file, relative to the sweep file, or the fields themselves."""
    search_space: dict[str, dict[str, list[Any]]] = Field(min_length=1)
    """What is searched: dotted path -> distribution -> its numbers or options."""
    tune: TuneSection = TuneSection()
    """How the sweep searches."""


class Sweep:
    """A sweep file, read and checked."""

    def __init__(self, path: str | Path, overrides: dict[str, Any] | None = None):
        raw, name = read_yaml(path), without_secrets(str(path))
        for dotted, value in (overrides or {}).items():
            if dotted.startswith("tune."):
                set_dotted(raw, dotted, value)
        try:
            file = SweepFile.model_validate(raw)
        except ValidationError as error:
            raise UserError("\n".join(f"{name}: {line}" for line in explain(error, SweepFile))) from None
        self.path, self.tune = name, file.tune
        self.space = {dotted: _distribution(name, dotted, spec) for dotted, spec in file.search_space.items()}
        self.layers = with_bases({"base": file.base} if isinstance(file.base, str) else file.base, str(path))
        self.base = merged(self.layers)
        for dotted, value in (overrides or {}).items():
            if not dotted.startswith("tune."):
                set_dotted(self.base, dotted, value)
        set_dotted(self.base, "ray.num_workers", self.tune.workers_per_trial)
        self.config = parse_config(self.base, source=f"{name}: base")
        self._check()

    def _check(self) -> None:
        """Each option and each end of a range must be a value that its field takes."""
        known, tune = flatten(self.config.to_dict()), self.tune
        for dotted, (kind, values) in self.space.items():
            if dotted.startswith("ray."):
                raise UserError(
                    f"{self.path}: search_space: {one_line(dotted)}: the ray section is the same for all trials"
                )
            ends = values if DISTRIBUTIONS[kind] is None else [values[0], values[1] - (kind == "randint")]
            for value in ends:
                try:
                    Config.model_validate(_with(self.base, {dotted: value}))
                except ValidationError as error:
                    # What is impossible only together with other fields fails its trial, alone.
                    if any(item["type"] != "value_error" for item in error.errors()):
                        message = "; ".join(explain(error, Config))
                        raise UserError(f"{self.path}: search_space: {message}") from None
            if secret := next((value for value in values if without_keys(value) != value), None):
                raise UserError(
                    f"{self.path}: search_space: {dotted}: Tune writes options into files, and {without_keys(secret)} "
                    "has keys; give them to every node in its environment (AWS_ACCESS_KEY_ID, say)"
                )
            if dotted not in known:
                raise UserError(f"{self.path}: search_space: {one_line(dotted)} is a section, not a field")
        steps, val_every = self.config.train.steps, self.config.train.val_every
        if tune.scheduler != "fifo" and not 0 < val_every < steps:
            raise UserError(
                f"{self.path}: train.val_every ({val_every}) must be between 0 and train.steps ({steps}) "
                f"for scheduler {tune.scheduler}: it judges trials by their validations"
            )
        if tune.scheduler == "asha" and self.grace_steps > steps:
            raise UserError(f"{self.path}: tune.grace_steps ({self.grace_steps}) is more than train.steps ({steps})")
        gpus = tune.gpus_per_worker or 0
        if gpus % 1 and (tune.workers_per_trial > 1 or gpus > 1):  # NCCL wants a GPU for each rank, Ray a whole number
            raise UserError(
                f"{self.path}: tune.gpus_per_worker ({gpus}) must be a whole number, or below 1 with "
                f"tune.workers_per_trial 1 (got {tune.workers_per_trial}): workers of a trial cannot share a GPU"
            )
        if tune.scheduler == "pbt" and not set(PERTURBED) & set(self.space):
            raise UserError(f"{self.path}: scheduler pbt perturbs {', '.join(PERTURBED)}; none is in search_space")
        if tune.search == "optuna" and any(kind == "grid" for kind, _ in self.space.values()):
            raise UserError(f"{self.path}: search optuna takes no grid; use choice")

    def to_dict(self) -> dict[str, Any]:
        """All of it, base included."""
        space = {dotted: {kind: values} for dotted, (kind, values) in self.space.items()}
        return {"base": self.base, "search_space": space, "tune": self.tune.model_dump(mode="json")}

    @property
    def grace_steps(self) -> int:
        return self.tune.grace_steps or max(self.config.train.val_every, self.config.train.steps // 8)

    def param_space(self) -> dict[str, Any]:
        """The space in Ray Tune's terms, in the order of the file."""
        from ray import tune

        make = {
            "uniform": tune.uniform,
            "loguniform": tune.loguniform,
            "quniform": tune.quniform,
            "randint": tune.randint,
            "choice": lambda *options: tune.choice(options),
            "grid": lambda *options: tune.grid_search(list(options)),
        }
        return {dotted: make[kind](*values) for dotted, (kind, values) in self.space.items()}


def _distribution(path: str, dotted: str, spec: dict[str, list[Any]]) -> tuple[str, list[Any]]:
    place = f"{path}: search_space: {one_line(dotted)}"
    if len(spec) != 1 or next(iter(spec)) not in DISTRIBUTIONS:
        raise UserError(f"{place}: needs one of {', '.join(DISTRIBUTIONS)}, such as {{choice: [1, 2]}}")
    ((kind, values),) = spec.items()
    count = DISTRIBUTIONS[kind]
    if count is None:
        if not values:
            raise UserError(f"{place}: {kind} needs at least one option")
        return kind, [_number(value) for value in values]
    try:
        values = [int(v) if kind == "randint" else float(v) for v in values]
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{place}: {kind} takes numbers, not {short(values)}") from None
    least = {"loguniform": 0, "quniform": 2}.get(kind)  # which of the numbers must be positive, if any
    if len(values) != count or not values[0] < values[1] or (least is not None and not values[least] > 0):
        wants = {2: "[low, high]", 3: "[low, high, step]"}[count]
        positive = {"loguniform": ", both positive", "quniform": " and a positive step"}.get(kind, "")
        raise UserError(f"{place}: {kind} takes {wants} with low < high{positive}, not {short(values)}")
    return kind, values


def _number(value: Any) -> Any:
    """1e-4 without a dot is text to YAML, and a number to everybody else."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def point(base: dict[str, Any], params: dict[str, Any]) -> Config:
    """The config of a trial. Raises UserError where the values are impossible together."""
    return parse_config(_with(base, params), source="this trial's config")


def _with(raw: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    for dotted, value in params.items():
        set_dotted(raw, dotted, value)
    return raw
