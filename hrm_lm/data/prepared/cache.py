"""A node's copies of what lies on remote storage: a file is fetched once and checked, whoever asks for it."""

import fcntl
import hashlib
import os
from pathlib import Path

import pyarrow.fs

from hrm_lm.data.prepared.format import META
from hrm_lm.errors import UserError
from hrm_lm.filesystem import storage_error


def cache_folder() -> Path:
    """Where a node keeps what it fetched: `HRM_LM_CACHE`, best a local disk, or ~/.cache/hrm_lm."""
    return Path(os.environ.get("HRM_LM_CACHE") or "~/.cache/hrm_lm").expanduser()


def fetch(fs: pyarrow.fs.FileSystem, source: str, target: Path, size: int, sha256: str) -> Path:
    """Copies a file to `target` unless it is there; of several processes that want it, one fetches and the rest wait.

    Raises UserError where what came is not what `sha256` says; then nothing is left at `target`.
    """
    if target.exists():  # it got its name when it was whole and checked
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        partial, digest = target.with_name(target.name + ".partial"), hashlib.sha256()
        try:
            with fs.open_input_stream(source) as remote, open(partial, "wb") as file:
                while block := remote.read(1 << 22):
                    digest.update(block)
                    file.write(block)
        except OSError as error:
            raise storage_error(f"{source}: cannot be fetched to {target.parent}", error) from None
        if digest.hexdigest() != sha256:
            partial.unlink()
            raise UserError(
                f"{source}: is not what {META} says it is (SHA-256 differs): changed or damaged; prepare it again"
            )
        os.replace(partial, target)
    return target
