"""Transformers folder -> checkpoint: `hrm-lm import --input DIR --output PATH`.

The input is a folder of `HrmTextForCausalLM`, such as the 1 B release downloaded. The checkpoint generates as it is.
It trains on with `hrm-lm train --config PATH/config.yaml --init_from PATH --set data.tokenizer=PATH`, and a
corpus for it is prepared with `--tokenizer PATH`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hrm_lm.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hrm-lm import", description=__doc__)
    parser.add_argument("--input", required=True, metavar="DIR", help="folder that Transformers' save_pretrained wrote")
    parser.add_argument("--output", required=True, metavar="PATH", help="checkpoint folder to be made")
    args = parser.parse_args(argv)
    if not Path(args.input).is_dir():
        raise UserError(f"--input: {args.input}: no such folder")

    from hrm_lm.interop.import_ import import_

    import_(Path(args.input), Path(args.output))
    print(args.output)
    return 0
