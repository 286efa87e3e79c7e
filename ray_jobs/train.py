"""What one submits: `ray job submit --working-dir . -- python -m ray_jobs.train ...`.

The trainer's command (`hrm_lm.training.train`), except that it trains unless told `--dry_run 1`.
"""

import sys

from hrm_lm.cli import run_command
from hrm_lm.training.train import main

if __name__ == "__main__":
    sys.exit(run_command(lambda: main(dry_run=0, program="ray_jobs.train")))
