"""`hrm-lm tune` as a job: `ray job submit --working-dir . -- python -m ray_jobs.tune ...`."""

import sys

from hrm_lm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
