"""What one submits: `ray job submit --working-dir . -- python -m ray_jobs.prepare ...`: the command `hrm-lm prepare`."""

import sys

from hrm_lm.commands.main import run_command
from hrm_lm.commands.prepare import main

if __name__ == "__main__":
    sys.exit(run_command(main))
