"""A node's copies of what lies on remote storage. A file is fetched once and checked, whoever asks for it, and is there
under its name only when it is whole. Several files come at a time, and what is not needed yet comes in the background.

The copies of all datasets may have a limit together. What was needed longest ago then goes first, and last of all what this
process said it needs (`RemoteFiles.keep`). A file that goes while another process reads it stays readable there.
"""

import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.fs

from hrm_lm.data.prepared.format import META
from hrm_lm.errors import StorageError, UserError
from hrm_lm.filesystem import outlasting

STREAMS = 16
"""Files that a process fetches at a time. S3 gives a stream some 100 MB/s. All workers of a node go through the same list,
and wait for one another's files, so a node has about as many streams as a worker.
"""

_kept: dict[Path, frozenset[str]] = {}
"""The files that this process needs, by folder."""


def cache_folder() -> Path:
    """Where a node keeps what it fetched: `HRM_LM_CACHE`, best a local disk, or ~/.cache/hrm_lm."""
    return Path(os.environ.get("HRM_LM_CACHE") or "~/.cache/hrm_lm").expanduser()


class RemoteFiles:
    """The files of a remote dataset, as copies in `folder`."""

    def __init__(
        self,
        fs: pyarrow.fs.FileSystem,
        path: str,
        files: dict[str, tuple[int, str]],
        folder: Path,
        limit: float | None = None,
    ):
        """files: size and SHA-256 of each. folder: in the cache's folder. limit: bytes that the whole cache may take."""
        self.fs, self.path, self.files, self.folder, self.limit = fs, path, files, folder, limit
        self._lock, self._threads, self._process = threading.Lock(), 0, os.getpid()
        self._wanted: dict[str, Future] = {}
        self._running: dict[str, Future] = {}

    def fetch(self, names: Iterable[str]) -> None:
        """Returns when these files are there; they come before all that was asked for so far.

        Raises UserError where a file is not what it should be, and StorageError where it cannot be had now.
        """
        if missing := self._missing(names):
            for future in self._ask(missing, first=True):
                future.result()

    def fetch_ahead(self, names: Iterable[str]) -> None:
        """Begins to fetch these files, in this order, in the background. What fails there fails again when it is due."""
        if missing := self._missing(names):
            self._ask(missing, first=False)

    def keep(self, names: Iterable[str], soon: int = 0) -> None:
        """Says which files this process needs from now on: no other file takes their place. soon: how many bytes it will need
        besides.

        Raises UserError where the disk does not hold them: they would take one another's place over and over.
        """
        kept = _kept[self.folder] = frozenset(names)
        for name in kept:
            with suppress(FileNotFoundError):
                os.utime(self.folder / name)  # for other processes, which remove the oldest
        if self.limit is not None:
            self._check_disk(kept, soon)

    def _check_disk(self, kept: frozenset[str], soon: int) -> None:
        """Raises UserError where the disk does not hold `kept` and `soon` bytes more. It takes no account of the other datasets of
        a mixture, whose copies may go.
        """
        root = self.folder.parent
        root.mkdir(parents=True, exist_ok=True)
        with counting(root):
            # Before the copies are counted: what is written meanwhile makes the room seem larger, and never smaller.
            room = shutil.disk_usage(root).free
            missing = soon + sum(self.files[name][0] for name in self._missing(kept))
            for stat, file in copies(root):
                own = file.parent == self.folder and file.name.removesuffix(".partial") in kept
                if file.suffix == ".partial":
                    room += 512 * stat.st_blocks if own else 0  # a file is as long as it will be before it is fetched
                elif not own:
                    room += stat.st_size
        if missing > room:
            whole = soon + sum(self.files[name][0] for name in kept)
            raise UserError(
                f"{root}: this disk has no room for the {whole / 1e9:.3g} GB of copies that a run needs at a time: {missing / 1e9:.3g} "
                f"GB are missing, and {room / 1e9:.3g} GB are free; set HRM_LM_CACHE to a larger disk, or lower data.cache_gb of a "
                "new run"
            )

    def _missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if not os.path.exists(self.folder / name)]

    def _ask(self, names: list[str], first: bool) -> list[Future]:
        if os.getpid() != self._process:  # storage's threads are not there after a fork, and a request would never end
            raise StorageError(f"{self.folder}/{names[0]}: went before it was read; raise data.cache_gb")
        with self._lock:
            asked = {name: self._running.get(name) or self._wanted.get(name) or Future() for name in names}
            new = {name: future for name, future in asked.items() if name not in self._running}
            self._wanted = new | self._wanted if first else self._wanted | new
            for _ in range(min(len(self._wanted), STREAMS - self._threads)):
                self._threads += 1
                threading.Thread(target=self._work, name="fetch", daemon=True).start()  # a pool's would delay the exit
        return list(asked.values())

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._threads -= 1
                    return
                name = next(iter(self._wanted))
                future = self._running[name] = self._wanted.pop(name)
            try:
                fetch(self.fs, f"{self.path}/{name}", self.folder / name, *self.files[name], self.limit)
                future.set_result(None)
            except BaseException as error:  # raised where the file is waited for
                future.set_exception(error)
            with self._lock:
                del self._running[name]


def fetch(
    fs: pyarrow.fs.FileSystem, source: str, target: Path, size: int, sha256: str, limit: float | None = None
) -> None:
    """Copies a file to `target` unless it is there; of several processes that want it, one fetches and the rest wait.

    limit: as for RemoteFiles. Raises UserError where what came is not what `sha256` says; then nothing is left at `target`.
    """
    if target.exists():  # it got its name when it was whole and checked
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(_lock_file(target), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        partial = target.with_name(target.name + ".partial")

        def copy() -> str:
            if limit is not None:
                reserve(partial, size, limit)
            digest = hashlib.sha256()
            with fs.open_input_stream(source) as remote, open(partial, "r+b" if limit is not None else "wb") as file:
                while block := remote.read(1 << 22):
                    digest.update(block)
                    file.write(block)
            return digest.hexdigest()

        if outlasting(f"{source}: cannot be fetched to {target.parent}", copy) != sha256:
            partial.unlink()
            raise UserError(
                f"{source}: is not what {META} says it is (SHA-256 differs): changed or damaged; prepare it again"
            )
        with counting(target.parent.parent):  # a file that changes its name meanwhile may be counted under neither
            os.replace(partial, target)


@contextmanager
def counting(root: Path) -> Iterator[None]:
    """While this lasts, no other process counts the files of the cache's folder `root`, or gives a file its name."""
    with open(root / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def reserve(partial: Path, size: int, limit: float) -> None:
    """Makes a file of `size` that holds nothing, so that other processes count it, and removes what must go for that."""
    root = partial.parent.parent
    with counting(root):
        partial.unlink(missing_ok=True)
        found = list(copies(root))
        found.sort(key=lambda entry: (entry[1].name in _kept.get(entry[1].parent, ()), entry[0].st_mtime_ns))
        used, free = sum(stat.st_size for stat, _ in found), shutil.disk_usage(root).free
        over = used + size - min(limit, used + free)
        for stat, file in found:
            if over > 0 and _remove(file):
                over -= stat.st_size
        with open(partial, "wb") as file:
            file.truncate(size)


def copies(root: Path) -> Iterator[tuple[os.stat_result, Path]]:
    """The files of all datasets in the cache's folder `root`, which may hold what is not ours."""
    for folder in os.scandir(root):
        if folder.is_dir() and re.fullmatch("[0-9a-f]{32}", folder.name):
            for file in os.scandir(folder):
                with suppress(FileNotFoundError):  # another process found it damaged
                    if file.name.endswith((".bin", ".idx", ".partial")):
                        yield file.stat(), Path(file.path)


def _remove(file: Path) -> bool:
    """Removes a copy, unless a process is just fetching it."""
    with open(_lock_file(file), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        file.unlink(missing_ok=True)
    return True


def _lock_file(file: Path) -> Path:
    return file.with_name(file.name.removesuffix(".partial") + ".lock")
