"""`hrm-lm train` as a job: `ray job submit --working-dir . -- python -m ray_jobs.train ...`."""

import sys

from hrm_lm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
