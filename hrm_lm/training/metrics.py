"""Where a run's numbers go while it runs: TensorBoard event files, and a progress bar or plain lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog


class ProgressBar(Protocol):
    """As tqdm's."""

    def update(self, steps: int) -> object: ...

    def set_description(self, text: str) -> object: ...

    def close(self) -> object: ...


Display = Literal["lines", "none"] | Callable[[int], ProgressBar]
"""Lines on standard output, nothing, or the progress bar that a function makes for the number of a run's steps."""


class MetricsLog:
    """Rank 0's log. `folder`: where event files go, if anywhere."""

    def __init__(self, folder: Path | None, display: Display, first_step: int, steps: int):
        self.steps, self.step = steps, first_step
        # After a resume, what an earlier attempt wrote beyond its last checkpoint is hidden.
        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1, flush_secs=10) if folder else None
        self.lines = display == "lines"
        self.bar = display(steps) if callable(display) else None
        self.shown: dict[str, float] = {}
        if self.bar:
            self.bar.update(first_step)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """For the event files alone."""
        if self.writer:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, value: Any) -> None:
        """Plain values for the event files, as JSON: TensorBoard shows it, and `hrm_lm.report` reads it."""
        if self.writer:
            lines = json.dumps(value, ensure_ascii=False, indent=2).split("\n")
            self.writer.add_text(name, "\n".join(f"    {line}" for line in lines), step)  # code, in Markdown

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.record(step, metrics)
        text = "  ".join(f"{name} {_format(name, value)}" for name, value in metrics.items())
        if self.lines:
            print(f"step {step}/{self.steps}  {text}", flush=True)
        if self.bar:
            self.shown |= {
                k: v for k, v in metrics.items() if k in ("loss", "val_loss", "val_exact_match", "val_score")
            }
            self.bar.set_description("  ".join(f"{name} {_format(name, value)}" for name, value in self.shown.items()))
            self.bar.update(step - self.step)
        self.step = step

    def tell(self, text: str) -> None:
        """A line of its own, however numbers are shown."""
        if self.lines or self.bar:
            print(text, flush=True)

    def rewind(self, step: int) -> None:
        """The run goes on from `step`, and what was written beyond it is hidden."""
        if self.writer:
            start = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
            self.writer.file_writer.add_event(start)
        if self.bar:
            self.bar.update(step - self.step)
        self.step = step

    def close(self) -> None:
        if self.writer:
            self.writer.close()
        if self.bar:
            self.bar.close()


def _format(name: str, value: float) -> str:
    if name == "lr":
        return f"{value:.2e}"
    return f"{value:,.0f}" if name.endswith("_per_s") or isinstance(value, int) else f"{value:.4f}"
