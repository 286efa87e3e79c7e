"""What all commands share: how errors reach the user, and with which exit code."""

import os
import sys
from typing import Callable

from hrm_lm.errors import RunFailed, UserError


def run_command(main: Callable[[], int]) -> int:
    """The exit code: 2 for bad input, 1 for a failed run, 130 for Ctrl-C; a traceback is a bug."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "the same command, for a run with the same --run_name, goes on from what was saved"
        print(f"interrupted; {message}", file=sys.__stderr__, flush=True)
        os._exit(130)  # at once: threads of Ray may still wait for what was interrupted
