"""What one submits: `ray job submit --working-dir . -- python -m ray_jobs.prepare ...`: the command `hrm-lm prepare`."""

import sys

from hrm_lm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
