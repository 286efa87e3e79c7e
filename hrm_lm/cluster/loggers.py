"""`train.loggers`: what a run writes goes to MLflow or Weights & Biases as well.

The driver does it. It has the user's environment, keys and local folders, it lives as long as the run, and no step waits
for it. A thread for each logger reads the run's event files as they grow (`hrm_lm.report.events`), and hands on what is
new. The run's folder remembers (`.mlflow.json`, `.wandb.json`) which run of the logger is this run's, and how far the files
were read: a run that goes on goes on there too, and what a logger has missed is handed to it later.
"""

import importlib.util
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from tensorboardX.proto.event_pb2 import Event

from hrm_lm.cluster.run_folder import RunFolder
from hrm_lm.cluster.start import say
from hrm_lm.config import Config, flatten
from hrm_lm.errors import UserError
from hrm_lm.filesystem import without_keys, without_secrets
from hrm_lm.parsing import one_line
from hrm_lm.report.events import EventFiles, scalars, texts
from hrm_lm.report.runs import plain, read_run

PERIOD = 10.0
"""Seconds between looks at the event files."""
PATIENCE = 60.0
"""Seconds that the end of a run waits for a logger."""


class Logger(Protocol):
    """A run as a logger knows it. All methods may raise whatever the library raises."""

    id: str

    def log(self, events: list[Event]) -> None: ...

    def finish(self, result: dict[str, Any], page: str | None) -> None:
        """result: what `result.json` holds. page: report.html."""


class MLflow:
    """In the experiment that MLFLOW_EXPERIMENT_NAME names, else in `hrm_lm`."""

    def __init__(self, folder: RunFolder, fields: dict[str, Any], id: str | None):
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        self.client = MlflowClient()
        if id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "hrm_lm")
            known = self.client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self.client.create_experiment(name)
            id = self.client.create_run(experiment, run_name=folder.name).info.run_id
        self.id = id
        self.client.update_run(id, status="RUNNING")
        # MLflow keeps the value that a parameter had first.
        logged = self.client.get_run(id).data.params
        values = {name: plain(value)[:6000] for name, value in fields.items()}
        params = [Param(name, value) for name, value in values.items() if name not in logged]
        changed = {f"changed.{name}": value for name, value in values.items() if logged.get(name, value) != value}
        for some in range(0, len(params), 100):
            self.client.log_batch(id, params=params[some : some + 100])
        tags = {"folder": folder.uri} | changed
        self.client.log_batch(id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log(self, events: list[Event]) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(name, value, int(event.wall_time * 1000), event.step)
            for event in events
            for name, value in scalars(event).items()
        ]
        for some in range(0, len(metrics), 1000):
            self.client.log_batch(self.id, metrics=metrics[some : some + 1000])
        tags = [RunTag(f"environment.{name}", plain(value)) for name, value in environment(events).items()]
        self.client.log_batch(self.id, tags=tags)

    def finish(self, result: dict[str, Any], page: str | None) -> None:
        states = {"finished": "FINISHED", "early_stopped": "FINISHED", "interrupted": "KILLED"}
        self.client.set_tag(self.id, "status", result["status"])
        if page:
            self.client.log_dict(self.id, result, "result.json")
            self.client.log_text(self.id, page, "report.html")
        for name in ("best_checkpoint", "last_checkpoint"):
            if name in result:
                self.client.set_tag(self.id, name, result[name])
        self.client.set_terminated(self.id, states.get(result["status"], "FAILED"))


class WandB:
    """In the project that WANDB_PROJECT names, else in `hrm_lm`."""

    def __init__(self, folder: RunFolder, fields: dict[str, Any], id: str | None):
        import wandb

        self.id = id or uuid.uuid4().hex[:8]
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "hrm_lm"),
            name=folder.name,
            id=self.id,
            resume="allow",
            config=fields,
            settings=wandb.Settings(console="off", silent=True),
        )
        self.run.config.update(fields | {"folder": folder.uri}, allow_val_change=True)
        self.run.define_metric("*", step_metric="step")  # its own count never goes back

    def log(self, events: list[Event]) -> None:
        for event in events:
            if numbers := scalars(event):
                self.run.log(numbers | {"step": event.step})
        if found := environment(events):
            self.run.config.update({"environment": found}, allow_val_change=True)

    def finish(self, result: dict[str, Any], page: str | None) -> None:
        import wandb

        if page:
            self.run.log({"report": wandb.Html(page, inject=False)})
        self.run.summary.update({f"result/{name}": value for name, value in result.items()})
        self.run.finish(exit_code=0 if result["status"] in ("finished", "early_stopped") else 1)


LOGGERS: dict[str, Callable[[RunFolder, dict[str, Any], str | None], Logger]] = {"mlflow": MLflow, "wandb": WandB}


def environment(events: list[Event]) -> dict[str, Any]:
    """What the workers that started last said of themselves; empty where none has started."""
    return next((told for event in reversed(events) if (told := texts(event).get("environment"))), {})


def check_loggers(config: Config) -> None:
    """Raises UserError where a logger is not installed, or would ask for a key."""
    for kind in config.train.loggers:
        spec = importlib.util.find_spec(kind)
        if spec is None or spec.origin is None:  # W&B leaves a folder of its name, which looks like a package
            raise UserError(f"train.loggers: {kind} is not installed; pip install 'hrm-lm[{kind}]'")
    if "wandb" in config.train.loggers and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.api.api_key:
            raise UserError("train.loggers: wandb has no key; give `wandb login`, or set WANDB_MODE=offline")


class Follower(threading.Thread):
    """Hands what is new in a run's event files to a logger. A logger that fails is told of once, and tried again."""

    def __init__(self, kind: str, config: Config, folder: RunFolder):
        super().__init__(name=kind, daemon=True)
        self.kind, self.folder, self.file = kind, folder, f".{kind}.json"
        known = json.loads(folder.read(self.file)) if folder.exists(self.file) else {}
        fields = flatten(without_keys(config.to_dict()))
        try:
            self.logger = LOGGERS[kind](folder, fields, known.get("id"))
        except Exception as error:
            again = f"; without {folder.uri}/{self.file} it starts anew there" if known else ""
            raise UserError(f"train.loggers: {kind}: {without_secrets(one_line(error))[:500]}{again}") from None
        self.events = EventFiles(folder.fs, folder.path, known.get("read"))
        self.pending: list[Event] = []
        self.is_failing = False
        self._closed = threading.Event()
        self._end: tuple[dict[str, Any], str | None]
        self._save()

    def run(self) -> None:
        while not self._closed.wait(PERIOD):
            self._try(self._forward)
        self._try(self._forward)
        self._try(lambda: self.logger.finish(*self._end))

    def close(self, result: dict[str, Any], page: str | None, patience: float = PATIENCE) -> None:
        self._end = result, page
        self._closed.set()
        self.join(patience)
        if self.is_alive():
            say(f"train.loggers: {self.kind} did not take the run's end within {patience:.0f} s")

    def _forward(self) -> None:
        self.pending += self.events.new()
        if self.pending:
            self.logger.log(self.pending)
            self.pending = []
            self._save()

    def _save(self) -> None:
        self.folder.write(self.file, json.dumps({"id": self.logger.id, "read": self.events.read}) + "\n")

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of any library: the run is worth more than its log
            if not self.is_failing:
                reason = without_secrets(one_line(error))[:300]
                say(f"train.loggers: {self.kind}: {reason or type(error).__name__}; the run goes on without it")
            self.is_failing = True
        else:
            if self.is_failing:
                say(f"train.loggers: {self.kind} is back, and has what it missed")
            self.is_failing = False


@contextmanager
def followed(config: Config, folder: RunFolder) -> Iterator[dict[str, Any]]:
    """While this lasts, the run's loggers follow it. Then, however it ended, its folder has a report.html, unless by Ctrl-C:
    `hrm-lm report` makes the page at any time.

    What is yielded is to be filled with the run's result. Raises UserError where a logger cannot be reached.
    """
    followers = [Follower(kind, config, folder) for kind in dict.fromkeys(config.train.loggers)]
    for follower in followers:
        follower.start()
    result: dict[str, Any] = {}
    try:
        yield result
    except KeyboardInterrupt:
        for follower in followers:
            follower.close({"status": "interrupted"}, None, patience=5)
        raise
    except BaseException as error:
        end(followers, folder, {"status": "failed", "error": str(error)})
        raise
    end(followers, folder, result)


def end(followers: list[Follower], folder: RunFolder, result: dict[str, Any]) -> None:
    from hrm_lm.report.page import run_page  # whose figures take long to import

    page = None
    try:
        run = read_run(folder.fs, folder.path)
        page = run_page(
            replace(run, result=run.result or result)
        )  # an error that the user must mend leaves no result.json
        folder.write("report.html", page)
    except Exception as error:  # a page is not worth a run
        say(f"{folder.uri}/report.html could not be made: {one_line(error) or type(error).__name__}")
    for follower in followers:
        follower.close(result, page)
