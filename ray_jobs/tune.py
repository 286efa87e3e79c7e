"""`hrm-lm tune` as a job: `ray job submit --working-dir . -- python -m ray_jobs.tune ...`."""

import sys

from hrm_lm.commands.main import run_command
from hrm_lm.commands.tune import main

if __name__ == "__main__":
    sys.exit(run_command(main))
