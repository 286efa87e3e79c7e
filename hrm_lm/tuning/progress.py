"""A sweep on the terminal: a live table of its trials, or a line per event in a log."""

import math
from pathlib import Path
from typing import Any

from ray.tune import Callback

STYLES = {"running": "", "done": "green", "failed": "red"}


class SweepProgress(Callback):
    """Tune calls it in the driver. `live`: redraw a table in place, else print lines."""

    def __init__(self, params: list[str], metric: str, mode: str, live: bool):
        self.params, self.metric, self.mode, self.is_live = params, metric, mode, live
        self.rows: dict[str, dict[str, Any]] = {}
        self.best: tuple[float, str] | None = None
        self._live: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_live": None}  # Tune saves its callbacks for a resume

    def on_trial_start(self, iteration, trials, trial, **info) -> None:
        self._row(trial)["state"] = "running"
        self._event(trial, "  ".join(f"{self._name(p)} {_short(trial.config[p])}" for p in self.params))

    def on_trial_result(self, iteration, trials, trial, result, **info) -> None:
        row, value = self._row(trial), result.get(self.metric, math.nan)
        if result.get("error"):
            row["state"] = result["status"]
            self._event(trial, f"{result['status']}: {result['error']}")
            return
        if result.get("status"):
            return  # the last report once more, with how the trial ended
        row["step"] = result["step"]
        if math.isnan(value):  # a checkpoint between validations
            self._event(trial, f"step {row['step']}  checkpoint saved")
            return
        row |= {"last": value, "match": result["val_exact_match"]}
        sign = 1 if self.mode == "min" else -1
        if self.best is None or sign * value < sign * self.best[0]:
            self.best = (value, row["number"])
        best = f"best so far: {_short(self.best[0])}, trial {self.best[1]}"
        self._event(trial, f"step {row['step']}  {self.metric} {_short(value)}  ({best})")

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        row = self._row(trial)
        row["state"] = "done" if row["state"] == "running" else row["state"]
        self._event(trial, f"ended at step {row['step']}")

    def on_trial_recover(self, iteration, trials, trial, **info) -> None:
        # Tune's file of the trial's errors ends with the last error's traceback, which ends with the error.
        lines = Path(trial.error_file).read_text().split("\n")
        self._event(trial, f"starts again after: {[line for line in lines if line.strip()][-1]}")

    def on_trial_error(self, iteration, trials, trial, **info) -> None:
        self._row(trial)["state"] = "failed"
        self._event(trial, "failed")

    def on_experiment_end(self, trials, **info) -> None:
        if self._live:
            self._live.stop()

    def _row(self, trial) -> dict[str, Any]:
        new = {"number": len(self.rows), "state": "", "step": None, "last": None, "match": None}
        row = self.rows.setdefault(trial.trial_id, new)
        row["params"] = [trial.config.get(p) for p in self.params]
        return row

    def _name(self, param: str) -> str:
        return param.rsplit(".", 1)[-1]

    def _event(self, trial, text: str) -> None:
        if not self.is_live:
            print(f"trial {self._row(trial)['number']}: {text}", flush=True)
            return
        if self._live is None:
            from rich.live import Live

            self._live = Live(auto_refresh=False, transient=False)
            self._live.start()
        self._live.update(self._table(), refresh=True)

    def _table(self):
        from rich.table import Table

        best = f"best {self.metric} {_short(self.best[0])}, trial {self.best[1]}" if self.best else "no result yet"
        table = Table(title=f"{len(self.rows)} trials; {best}", title_justify="left")
        for name in ("trial", *map(self._name, self.params), "state", "step", self.metric, "exact"):
            table.add_column(name, justify="left" if name == "state" else "right", overflow="fold")
        shown = sorted(self.rows.values(), key=lambda row: (row["state"] != "running", -row["number"]))[:20]
        for row in sorted(shown, key=lambda row: row["number"]):
            cells = [row["number"], *row["params"], row["state"], row["step"], row["last"], row["match"]]
            style = (
                "bold" if self.best and row["number"] == self.best[1] else "dim" if row["state"] != "running" else None
            )
            table.add_row(*("" if cell is None else _short(cell) for cell in cells), style=style)
        return table


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
