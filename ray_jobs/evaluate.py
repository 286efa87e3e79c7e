"""`hrm-lm evaluate` as a job, over all of the cluster: `ray job submit --working-dir . -- python -m ray_jobs.evaluate ...`."""

import sys

from hrm_lm.commands.evaluate import main
from hrm_lm.commands.main import run_command
from hrm_lm.evaluation.spread import ALL

if __name__ == "__main__":
    sys.exit(run_command(lambda: main(workers=ALL)))
