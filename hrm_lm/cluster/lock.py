"""Keeps a second command away from a folder that a first one writes: a run, a sweep, a dataset in the making.

On local storage the system's file lock does it, and the lock ends with its process. Object storage has no locks, and
pyarrow has no conditional writes. There a file is a lease: its owner writes it anew every RENEW_S seconds. Who finds the
file waits, is refused when the file changes, and takes it over when it does not change for LEASE_S seconds. Each process
goes by its own clock, so it does not matter whether the clocks of hosts agree.

What that guarantees: of two commands that start at the same time, one is refused. A command that was held up for longer
than LEASE_S (a stopped process, a host cut off from storage) may lose its lease. It finds that out when it renews the
lease, and ends. Until then both commands may write.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import pyarrow.fs

from hrm_lm.cluster.start import say
from hrm_lm.errors import UserError
from hrm_lm.filesystem import outlasting, read_text, reason, shown
from hrm_lm.parsing import parse_json

LOCK = ".lock"
RENEW_S = 5.0
LEASE_S = 30.0
SETTLE_S = 1.0
"""How long a command that wrote its lease waits before it reads it again. Of commands that found no lease at the same
time, the last to write has it.
"""


@contextmanager
def locked(fs: pyarrow.fs.FileSystem, folder: str, doing: str, name_flag: str, place_flag: str) -> Iterator[None]:
    """Holds the folder for as long as this lasts. Raises UserError where another command holds it.

    doing: what the other command does, such as "run 'r' is being trained". name_flag, place_flag: the command's flags
    that would name another folder, and a folder on another file system.
    """
    path = f"{folder}/{LOCK}"

    def opened() -> TextIO | None:
        fs.create_dir(folder, recursive=True)
        return open(path, "a+") if isinstance(fs, pyarrow.fs.LocalFileSystem) else None

    local = outlasting(f"{shown(fs, folder)}: cannot be written", opened)
    with _file_lock(local, doing, name_flag, place_flag) if local else _lease(fs, path, doing, name_flag):
        yield


@contextmanager
def _file_lock(file: TextIO, doing: str, name_flag: str, place_flag: str) -> Iterator[None]:
    with file:
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise _refusal(doing, f"process {file.read().strip() or '?'}", name_flag) from None
            raise UserError(
                f"{os.path.dirname(file.name)}: the folder cannot be locked against a second command: {reason(error)}\n"
                f"give {place_flag} a folder on a file system with file locks, or a URI"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def _lease(fs: pyarrow.fs.FileSystem, path: str, doing: str, name_flag: str) -> Iterator[None]:
    own: dict[str, Any] = {"id": uuid.uuid4().hex, "process": os.getpid(), "host": socket.gethostname(), "renewed": 0}

    def read() -> dict[str, Any] | None:
        """What the file says; None where there is no file."""
        try:
            found = parse_json(read_text(fs, path))
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}  # no command of this program wrote it

    def write() -> None:
        with fs.open_output_stream(path, compression=None) as stream:
            # Always as long: pyarrow asks for the size and then for the bytes, and the file may change in between.
            stream.write(json.dumps(own).ljust(512).encode())

    def is_own(found: dict[str, Any] | None) -> bool:
        return found is not None and found.get("id") == own["id"]

    def take() -> None:
        found = first = read()
        if not is_own(found):  # it is, where storage went away after the lease was written
            if first is not None:
                say(f"waiting up to {LEASE_S:g} s for the lease of {_holder(first)} to expire")
            waited_from = time.monotonic()
            while found is not None and time.monotonic() < waited_from + LEASE_S:
                time.sleep(RENEW_S / 5)
                found = read()
                if found is not None and found != first:
                    raise _refusal(doing, _holder(found), name_flag)
            write()
        time.sleep(SETTLE_S)
        if not is_own(found := read()):
            raise _refusal(doing, _holder(found or {}), name_flag)

    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(RENEW_S):
            with suppress(OSError):  # storage that is away is away for others, too
                if not is_own(found := read()):
                    break
                own["renewed"] += 1
                write()
        if not ended.is_set():
            say(
                f"{doing} by {_holder(found or {})}: this command was held up for more than {LEASE_S:g} s and lost its "
                "lease; it ends, and what it saved stays"
            )
            os._exit(1)  # at once: an orderly end would write to the folder, or hang

    keeper = threading.Thread(target=keep, name="lease", daemon=True)
    try:
        # While storage is away, the lease's owner cannot renew it. So the wait for it begins anew when storage is back.
        outlasting(f"{shown(fs, path)}: the lease cannot be taken", take)
        keeper.start()
        yield
    finally:
        ended.set()
        if keeper.is_alive():
            keeper.join(RENEW_S)  # a write that hangs for longer leaves a lease that expires
        with suppress(OSError):
            if is_own(read()):
                fs.delete_file(path)


def _holder(lease: dict[str, Any]) -> str:
    return f"process {lease.get('process', '?')} on host {lease.get('host', '?')}"


def _refusal(doing: str, holder: str, name_flag: str) -> UserError:
    return UserError(f"{doing} by {holder}; wait for it, or give another {name_flag}")
