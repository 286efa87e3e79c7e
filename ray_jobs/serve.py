"""`hrm-lm serve` as a job: `ray job submit --working-dir . -- python -m ray_jobs.serve ...`."""

import sys

from hrm_lm.commands.main import run_command
from hrm_lm.commands.serve import main

if __name__ == "__main__":
    sys.exit(run_command(main))
