"""`hrm-lm predict` as a job: `ray job submit --working-dir . -- python -m ray_jobs.predict ...`."""

import sys

from hrm_lm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
