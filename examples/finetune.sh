#!/usr/bin/env bash
# Fine-tunes HRM-Text on questions and answers of one's own, with LoRA, and asks it.
#
#     bash examples/finetune.sh [RELEASE [DATA.jsonl]]
#
# RELEASE: the folder of HRM-Text-1B, downloaded; without it a folder of the same shape, narrow and with random weights, is made.
# DATA.jsonl: a record a line, {"prompt": "…", "response": "…"}; without it, sums. All that is made is in ./finetuned.
set -euo pipefail
examples=$(cd "$(dirname "$0")" && pwd)
release=${1:-} data=${2:-finetuned/sums.jsonl} steps=${STEPS:-30}
mkdir -p finetuned

if [ -z "$release" ]; then
    release=finetuned/release
    [ -e "$release" ] || python "$examples/release_shape.py" --output "$release"
fi
if [ -z "${2:-}" ] && [ ! -e "$data" ]; then
    python - "$data" <<'PYTHON'
import json, random, sys

random.seed(0)
with open(sys.argv[1], "w") as file:
    for _ in range(500):
        a, b = random.randrange(50), random.randrange(50)
        file.write(json.dumps({"prompt": f"What is {a} + {b}?", "response": str(a + b)}) + "\n")
PYTHON
fi

# The release's own format becomes a checkpoint, whose config.yaml has its shape.
imported=finetuned/imported_$(basename "$release")
[ -e "$imported" ] || hrm-lm import --input "$release" --output "$imported"

# LoRA trains two small matrices beside each large one. The same command again goes on with a run that was interrupted.
hrm-lm train --config "$imported/config.yaml" --init_from "$imported" --dataset "$data" \
    --save_dir finetuned/runs --run_name lora --steps "$steps" --val_every "$steps" \
    --set data.tokenizer="$imported" --set data.truncate=true \
    --set model.max_prompt_len=64 --set model.max_response_len=16 \
    --set train.batch_size=8 --set train.lora.rank=8 --set optim.name=adamw --set optim.lr=1e-3 --set optim.warmup_steps=5

hrm-lm generate --run_name lora --save_dir finetuned/runs --prompt "What is 12 + 7?" --max_new_tokens 4

# For Transformers and vLLM: a folder, the factors merged into its matrices.
rm -rf finetuned/exported
hrm-lm export --checkpoint "$(ls -d finetuned/runs/lora/checkpoint_*/ | tail -1)" --output finetuned/exported
