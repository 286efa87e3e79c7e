"""`hrm-lm serve` as a job: `ray job submit --working-dir . -- python -m ray_jobs.serve ...`."""

import sys

from hrm_lm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
