#!/usr/bin/env bash
# Searches learning rate, gradient clipping and cycles, trains the best config, and lays the runs side by side.
#
#     bash examples/sweep.sh
#
# All that is made is in ./swept. swept/search/report.html is the page to look at.
set -euo pipefail
examples=$(cd "$(dirname "$0")" && pwd)

hrm-lm tune --config "$examples/sweep.yaml" --run_name search --save_dir swept
cat swept/search/best.yaml

hrm-lm train --config swept/search/best.yaml --run_name best --save_dir swept --steps 300
hrm-lm train --config swept/search/best.yaml --run_name no_core --save_dir swept --steps 300 --set model.hrm.h_cycles=0
hrm-lm report swept/best swept/no_core --output swept/compared.html
