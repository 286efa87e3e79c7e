"""Where the files of an evaluation go, and writing them: results for each cycle count, the samples, the page."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from typing import NamedTuple

import pyarrow.fs

from hrm_lm.cluster.run_folder import outliving
from hrm_lm.errors import UserError
from hrm_lm.evaluation.page import page
from hrm_lm.evaluation.results import Evaluation, documents, samples
from hrm_lm.filesystem import outlasting, resolve, shown, write_text


class Output(NamedTuple):
    fs: pyarrow.fs.FileSystem
    path: str

    @property
    def uri(self) -> str:
        return shown(self.fs, self.path)

    def make(self) -> bool:
        """Makes the folder, and says whether something was in it."""
        self.fs.create_dir(self.path, recursive=True)
        return bool(self.fs.get_file_info(pyarrow.fs.FileSelector(self.path)))

    def write(self, evaluation: Evaluation) -> None:
        """Raises UserError where the storage cannot be written."""
        files = {
            f"results_h{str(one['h_cycles']).replace(':', '_')}.json": json.dumps(one, indent=1)
            for one in documents(evaluation)
        }
        files["samples.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples(evaluation))
        files["report.html"] = page(evaluation)
        for name, text in files.items():
            path = f"{self.path}/{name}"
            outlasting(f"{shown(self.fs, path)}: cannot be written", partial(write_text, self.fs, path, text))


@contextmanager
def begun(given: str | None, checkpoint: tuple[pyarrow.fs.FileSystem, str] | None) -> Iterator[Output]:
    """The folder, made before the work begins, and gone again where the work fails.

    given: a folder or URI, which must be new or empty. Without it the folder is in the run's, beside `checkpoint`, or where
    the checkpoint is of no run that was named, below the folder of the command.
    """
    if given is not None:
        fs, path = resolve(outliving(given, "--output"))
    elif checkpoint is not None:
        fs, path = checkpoint[0], f"{checkpoint[1].rpartition('/')[0]}/evaluation/{datetime.now():%Y%m%d-%H%M%S}"
    else:
        fs, path = resolve(outliving(f"evaluations/{datetime.now():%Y%m%d-%H%M%S}", "--output"))
    number, output = 1, Output(fs, path)
    while outlasting(f"--output {output.uri}: cannot be written", output.make):
        if given is not None:
            raise UserError(f"--output {output.uri}: is not empty; give another --output")
        number += 1
        output = Output(fs, f"{path}-{number}")  # two in a second
    try:
        yield output
    except BaseException:
        with suppress(OSError):
            output.fs.delete_dir(output.path)
        raise
