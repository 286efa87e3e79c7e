"""`hrm-lm evaluate` as a job, over all of the cluster: `ray job submit --working-dir . -- python -m ray_jobs.evaluate ...`."""

import sys

from hrm_lm.commands.main import run_command


def main() -> int:
    from hrm_lm.commands import evaluate  # Ctrl-C may come meanwhile, too
    from hrm_lm.evaluation.spread import ALL

    return evaluate.main(workers=ALL)


if __name__ == "__main__":
    sys.exit(run_command(main))
