"""`hrm-lm NAME ...`: finds the command, and tells errors to the user with the right exit code.

A command is imported only once it is chosen, so that the list of commands comes at once; and it imports PyTorch and Ray only
where its flags, and the files and runs that they name, are there: a mistake is told in a second.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from hrm_lm.errors import RunFailed, UserError

COMMANDS = {
    "train": ("hrm_lm.commands.train", "train a model, or go on with a run"),
    "tune": ("hrm_lm.commands.tune", "search a config's fields with Ray Tune"),
    "prepare": ("hrm_lm.commands.prepare", "tokenize a corpus into a dataset for the trainer"),
    "generate": ("hrm_lm.commands.generate", "answer prompts with a checkpoint"),
    "predict": ("hrm_lm.commands.predict", "answer the records of files, over all of a cluster"),
    "serve": ("hrm_lm.commands.serve", "answer requests over HTTP, with a page to try it on"),
    "evaluate": ("hrm_lm.commands.evaluate", "score a checkpoint on tasks, with a page of pictures and answers"),
    "lm_eval": ("hrm_lm.commands.lm_eval", "run lm-evaluation-harness on a checkpoint"),
    "report": ("hrm_lm.commands.report", "make a page on a run, or on several side by side"),
    "export": ("hrm_lm.commands.export", "turn a checkpoint into a Transformers folder"),
    "import": ("hrm_lm.commands.import_", "turn a Transformers folder into a checkpoint"),
    "reference": ("hrm_lm.commands.reference", "print the reference of all config fields, in Markdown"),
}
"""name -> the module with its `main(argv)`, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command that `argv` names. An unknown name gives 2, and prints the commands."""
    arguments = sys.argv[1:] if argv is None else argv
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}\n{usage()}" if name else usage(), file=sys.stderr)
        return 2
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as for `python -m`: a dataset of one's own is a module beside the command
    return run_command(lambda: importlib.import_module(COMMANDS[name][0]).main(rest))  # Ctrl-C may come meanwhile, too


def usage() -> str:
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: hrm-lm COMMAND ...", "", *lines, "", "hrm-lm COMMAND --help tells a command's flags"])


def run_command(command: Callable[[], int]) -> int:
    """The exit code of a command: 2 for bad input, 1 for a failed run, 130 for Ctrl-C; a traceback is a bug."""
    try:
        return command()
    except (UserError, RunFailed) as error:
        from hrm_lm.parsing import printable  # the list of commands does without

        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "the same command, for a run with the same --run_name, goes on from what was saved"
        print(f"interrupted; {message}", file=sys.__stderr__, flush=True)
        os._exit(130)  # at once: threads of Ray may still wait for what was interrupted
