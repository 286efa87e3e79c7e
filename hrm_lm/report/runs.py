"""A run as its folder tells it, whether the run goes on, was killed, failed or finished."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import pyarrow.fs

from hrm_lm.config import Config, flatten
from hrm_lm.errors import UserError
from hrm_lm.filesystem import outlasting, read_text, shown, without_keys
from hrm_lm.parsing import one_line, parse_json, parse_yaml
from hrm_lm.report.events import EventFiles, Written, written

PLACES = ("ray.run_name", "ray.storage_path")
"""Fields that say where a run is kept. They tell runs apart, and explain nothing."""

OF_TRIALS = ("loss", "lr", "grad_norm", "tokens_per_s", "padding", "mfu", "save_ms", "seconds", "tokens")
"""What a trial reports, beside its scores."""


@dataclass
class Run:
    name: str
    config: dict[str, Any]
    """By dotted path."""
    result: dict[str, Any]
    """What `result.json` holds; nothing until the run has ended."""
    written: Written

    @property
    def status(self) -> str:
        return self.result.get("status", "unfinished")

    @property
    def environment(self) -> dict[str, Any]:
        """What the workers said of themselves when they were last started."""
        last = self.written.attempts[-1] if self.written.attempts else {}
        return {name: value for name, value in last.items() if name not in ("step", "time")}

    @property
    def best(self) -> dict[str, float]:
        """`step` and all scores of the validation with the lowest `val_loss`; empty where there was none."""
        losses = self.curve("val_loss")
        if not losses:
            return {}
        step = min(losses, key=losses.__getitem__)
        scores = {name: by_step[step] for name, by_step in self.written.curves.items() if step in by_step}
        return {"step": step} | {name: value for name, value in scores.items() if name.startswith("val_")}

    def curve(self, name: str) -> dict[int, float]:
        """By step."""
        return self.written.curves.get(name, {})

    def last(self, name: str) -> float | None:
        by_step = self.curve(name)
        return by_step[max(by_step)] if by_step else None

    @property
    def tokens_per_s(self) -> float | None:
        seconds, tokens = self.last("seconds"), self.last("tokens")
        return tokens / seconds if seconds and tokens else self.result.get("tokens_per_s")

    @property
    def seconds(self) -> float | None:
        """Spent training, over all restarts."""
        return self.last("seconds") or self.result.get("seconds")


def read_run(fs: pyarrow.fs.FileSystem, path: str) -> Run:
    """The run, or the trial of a sweep, in the folder `path`. Raises UserError where there is neither, and where storage
    cannot be read.
    """
    name = shown(fs, path)

    def text(file: str) -> str | None:
        def attempt() -> str | None:
            try:
                return read_text(fs, f"{path}/{file}")
            except FileNotFoundError:
                return None

        return outlasting(f"{name}/{file}: cannot be read", attempt)

    config, of_trial = text("config.yaml"), text("params.json") is not None
    if of_trial:
        config = text(outlasting(f"{name}: cannot be read", lambda: last_config(fs, path)) or "params.json")
    if config is None:
        is_sweep = text("sweep.yaml") is not None
        raise UserError(f"{name}: a sweep, which has a report of its own" if is_sweep else f"{name}: no run is there")
    if text("trainer_state.json") is not None:
        raise UserError(f"{name}: a checkpoint; give the folder of its run")
    events = outlasting(f"{name}: cannot be read", lambda: EventFiles(fs, path).new())
    try:
        values, told = without_keys(parse_yaml(config)), text("result.json")
        if of_trial:  # to which Tune adds a line for each report
            result, run = trial_written([parse_json(line) for line in (told or "").split("\n")[:-1]])
        else:
            result, run = parse_json(told or "{}"), written(events)
        return Run(path.rpartition("/")[2], flatten(values), result, run)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{name}: torn or foreign: {one_line(error)}") from None


def last_config(fs: pyarrow.fs.FileSystem, path: str) -> str | None:
    """The config of a trial's last checkpoint, as a path in its folder. Those of several workers are a folder deeper."""
    found = [file.path for file in fs.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))]
    configs = [file for file in found if re.search(r"/checkpoint_[^/]+/config\.yaml$", file)]
    return max(configs, key=lambda file: file.split("/")[-2]).removeprefix(f"{path}/") if configs else None


def trial_written(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], Written]:
    """What Tune was told of a trial: its result, and its numbers. What it repeated after a failure replaces what was there."""
    run, result = Written(), {}
    for row in rows:
        run.step, run.time = max(run.step, row["step"]), row["timestamp"]
        result = {name: row[name] for name in ("status", "error") if name in row} | {"step": run.step}
        if "seconds" not in row:  # it diverged, and its score stands for that
            continue
        for name, value in row.items():
            if (name in OF_TRIALS or name.startswith("val_")) and math.isfinite(value):
                run.curves.setdefault(name, {})[row["step"]] = value
    return result, run


def changed_fields(config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By dotted path the value and the default of all fields that are not at their defaults."""
    defaults = flatten(Config().to_dict())
    return {
        path: (value, defaults.get(path))
        for path, value in config.items()
        if value != defaults.get(path) and path not in PLACES
    }


def differing_fields(runs: list[Run]) -> dict[str, list[Any]]:
    """By dotted path the values of all runs, of the fields that are not the same in all. A field that a run does not have,
    of another version say, has its default there.
    """
    defaults = flatten(Config().to_dict())
    paths = dict.fromkeys(path for run in runs for path in run.config if path not in PLACES)
    values = {path: [run.config.get(path, defaults.get(path)) for run in runs] for path in paths}
    return {path: row for path, row in values.items() if any(value != row[0] for value in row)}


def plain(value: Any) -> str:
    """A config's value as it stands in YAML."""
    return value if isinstance(value, str) else json.dumps(value)
