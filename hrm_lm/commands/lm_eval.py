"""lm-evaluation-harness with the model `hrm_lm`: `hrm-lm lm_eval --model hrm_lm --model_args checkpoint=PATH --tasks NAME`.

All arguments are the harness's own. It has no place where an installed package could announce its model.
"""

import sys
from collections.abc import Sequence

from hrm_lm.errors import UserError

USAGE = f"usage: hrm-lm lm_eval --model hrm_lm --model_args checkpoint=PATH --tasks NAME ...\n\n{__doc__}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0)
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise UserError("lm_eval needs the lm-evaluation-harness: pip install 'hrm-lm[eval]'") from None
    import hrm_lm.evaluation.harness  # noqa: F401 (registers the model)

    sys.argv = ["lm_eval", *arguments]  # the harness reads no other
    cli_evaluate()
    return 0
