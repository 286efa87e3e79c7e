"""The output folder of a command that goes on where it was killed: a dataset in the making, answers in bulk."""

import json
from contextlib import AbstractContextManager, suppress
from typing import Any, ClassVar

import pyarrow.fs

from hrm_lm.cluster.lock import locked
from hrm_lm.data.prepared.format import write_file
from hrm_lm.errors import UserError
from hrm_lm.filesystem import outlasting, read_bytes, retrying, shown, storage_error, without_secrets
from hrm_lm.parsing import one_line, parse_json

PLAN = "plan.json"
"""In the work folder: the fingerprint of what the command makes out of what."""


class Output:
    """What is known of an output folder. While it is filled there is a work folder in it, which holds what is done.

    A subclass is a dataclass with the fields below.
    """

    WORK: ClassVar[str]
    """The name of the work folder."""
    RESULT: ClassVar[str]
    """The file that makes the output whole, written last. Its `plan` is the fingerprint."""
    HOLDS: ClassVar[str]
    """What the output is, for messages."""

    fs: pyarrow.fs.FileSystem
    output: str
    """The folder's path in `fs`."""

    @property
    def folder(self) -> str:
        return f"{self.output}/{self.WORK}"

    def work(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the output. Raises FileNotFoundError, and UserError where it cannot be read or is damaged."""
        path = f"{self.output}/{name}"
        try:
            read = parse_json(retrying(f"{shown(self.fs, path)}: cannot be read", lambda: read_bytes(self.fs, path)))
            if not isinstance(read, dict):
                raise ValueError("not an object")
            return read
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_error(f"{shown(self.fs, path)}: cannot be read", error) from None
        except ValueError as error:
            raise UserError(
                f"{shown(self.fs, path)}: damaged: {one_line(error)}; delete what is there, or give another --output"
            ) from None

    def list(self) -> set[str]:
        """The names in the work folder. Raises UserError where it cannot be read."""
        folder = pyarrow.fs.FileSelector(self.folder)
        what = f"{shown(self.fs, self.folder)}: cannot be read"
        return {info.base_name for info in outlasting(what, lambda: self.fs.get_file_info(folder))}

    def finished(self, location: str, fingerprint: str, **plan: Any) -> bool:
        """Whether the output is whole already. Begins the work where it is empty.

        location: the folder as the user gave it. fingerprint: of all that decides the result. plan: what PLAN is to say
        besides. Raises UserError where the folder holds anything else.
        """
        location = without_secrets(location)
        what, folder = (
            f"--output {location}: cannot be used",
            pyarrow.fs.FileSelector(self.output, allow_not_found=True),
        )
        try:
            there = {info.base_name for info in retrying(what, lambda: self.fs.get_file_info(folder))}
            if self.RESULT in there:
                if self.read_json(self.RESULT).get("plan") != fingerprint:
                    raise UserError(
                        f"--output {location}: holds {self.HOLDS} of other input or settings; give another --output"
                    )
                return True
            if self.WORK in there:
                with suppress(FileNotFoundError):  # a run was killed before it wrote the plan
                    if self.read_json(f"{self.WORK}/{PLAN}").get("plan") != fingerprint:
                        raise UserError(
                            f"--output {location}: holds {self.HOLDS} of other input or settings, unfinished; finish that, "
                            "delete it, or give another --output"
                        )
                    return False
                if left := sorted(name for name in self.list() if name.endswith(".json")):
                    raise UserError(
                        f"--output {location}: damaged: {self.WORK} has {left[0]}, but no {PLAN}; delete what is there, or give "
                        "another --output"
                    )
            elif there:
                raise UserError(f"--output {location}: is not empty; give another --output")
            retrying(what, lambda: self.fs.create_dir(self.folder, recursive=True))
            write_file(self.fs, self.work(PLAN), json.dumps({"plan": fingerprint, **plan}).encode())
        except OSError as error:
            raise UserError(f"{what}: {one_line(error)}") from None
        return False

    def lock(self, location: str) -> AbstractContextManager[None]:
        """Keeps a second command away (`hrm_lm.cluster.lock`)."""
        doing = f"--output {without_secrets(location)} is being written"
        return locked(self.fs, self.folder, doing, name_flag="--output", place_flag="--output")

    def remove_work(self, location: str) -> None:
        """Removes the work folder, which may be gone, or left by a run that was killed here."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                self.fs.delete_dir(self.folder)

        outlasting(f"--output {without_secrets(location)}: cannot be used", remove)
