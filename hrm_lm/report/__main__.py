"""`python -m hrm_lm.report RUN ...` is `hrm-lm report RUN ...` where the package is not installed."""

import sys

if __name__ == "__main__":
    from hrm_lm.commands.main import run_command
    from hrm_lm.commands.report import main

    sys.exit(run_command(main))
