"""TensorBoard event files, read back: numbers and texts over a run's steps, also while the run goes on.

tensorboardX writes them (`hrm_lm.training.metrics`) and reads none, and TensorBoard itself is a large dependency. A file
is a row of records: the record's length in 8 bytes, 4 bytes of checksum, an `Event`, 4 bytes of checksum. A worker's
attempt at a run is a file. A START event says that the run goes on before its step, which hides what was written there
and beyond.
"""

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs
from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event, SessionLog

FILES = "events.out.tfevents."


class EventFiles:
    """The event files of a folder, read from where the last look ended."""

    def __init__(self, fs: pyarrow.fs.FileSystem, path: str, read: dict[str, int] | None = None):
        """read: by name, how many bytes of each file are known already."""
        self.fs, self.path, self.read = fs, path, dict(read or {})

    def new(self) -> list[Event]:
        """What was written since the last look: a file's events in their order, and first the files that were begun first.

        Raises OSError.
        """
        found = []
        for info in self.fs.get_file_info(pyarrow.fs.FileSelector(self.path, allow_not_found=True)):
            if not info.base_name.startswith(FILES) or info.size <= (start := self.read.get(info.base_name, 0)):
                continue
            with self.fs.open_input_file(info.path) as file:
                file.seek(start)
                events, size = parsed(file.read())
            self.read[info.base_name] = start + size
            if events:
                found.append(events)
        return [event for events in sorted(found, key=lambda events: events[0].wall_time) for event in events]


def parsed(data: bytes) -> tuple[list[Event], int]:
    """The whole records at the begin of `data`, and how many bytes they are. What follows is torn, or still to come."""
    events, position = [], 0
    while len(data) >= position + 12:
        (length,) = struct.unpack_from("<Q", data, position)
        end = position + 12 + length + 4
        if end > len(data):
            break
        try:
            events.append(Event.FromString(data[position + 12 : end - 4]))
        except DecodeError:
            break
        position = end
    return events, position


def scalars(event: Event) -> dict[str, float]:
    return {value.tag: value.simple_value for value in event.summary.value if value.HasField("simple_value")}


def texts(event: Event) -> dict[str, Any]:
    """What `MetricsLog.text` wrote, by name."""
    found = {}
    for value in event.summary.value:
        if value.metadata.plugin_data.plugin_name == "text":
            found[value.tag.removesuffix("/text_summary")] = json.loads(value.tensor.string_val[0])
    return found


def begins(event: Event) -> bool:
    """Whether the event says that a run goes on before its step."""
    return event.HasField("session_log") and event.session_log.status == SessionLog.START


@dataclass
class Written:
    """What a run has written, in the order of its steps."""

    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    """By name and step."""
    texts: dict[str, dict[int, Any]] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Each time that the workers were started: `step`, which they went on from, `time`, and what they said of themselves."""
    rollbacks: list[int] = field(default_factory=list)
    """The steps that the run went back to."""
    step: int = 0
    """The last step that is known of."""
    time: float = 0.0
    """Of the last event, in seconds since 1970."""


def written(events: Iterable[Event]) -> Written:
    """All events of a run, from its first on."""
    run, is_new_file = Written(), False
    for event in events:
        run.time = max(run.time, event.wall_time)
        if event.HasField("file_version"):
            is_new_file = True
        elif begins(event):
            step = max(event.step - 1, 0)
            if is_new_file:
                run.attempts.append({"step": step, "time": event.wall_time})
            else:
                run.rollbacks.append(step)
            is_new_file, run.step = False, step
            for by_step in [*run.curves.values(), *run.texts.values()]:
                for beyond in [known for known in by_step if known >= event.step]:
                    del by_step[beyond]
        else:
            run.step = max(run.step, event.step)
            for name, number in scalars(event).items():
                run.curves.setdefault(name, {})[event.step] = number
            for name, value in texts(event).items():
                if name == "environment" and run.attempts:
                    run.attempts[-1] |= value
                else:
                    run.texts.setdefault(name, {})[event.step] = value
    return run
