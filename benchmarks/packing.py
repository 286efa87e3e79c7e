"""Training on the lengths of an instruction set, packed: useful tokens/s of the real command.

Makes a prepared dataset of random tokens (prompts and responses log-normal, mean 200, up to 1,023), trains an HRM-Text
preset on it with `train.packing` through `hrm-lm train`, and prints the tokens/s of each logging interval after the first,
which holds the compilation. A worker takes 32,768 tokens at a time. Needs GPUs; `--quick` shows on CPU that it works.

    python benchmarks/packing.py                                                  # HRM-Text B, one GPU
    python benchmarks/packing.py --workers 2 --set ray.parallel=fsdp
    python benchmarks/packing.py --preset xl --set train.activation_memory=0.3    # 1 B parameters on one GPU of 80 GB
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.fs

from hrm_lm.data.prepared.writer import ShardWriter, write_meta
from hrm_lm.data.tokenizer import ByteTokenizer

CONFIGS = Path(__file__).parent.parent / "configs"


def write_dataset(folder: Path, samples: int, longest: int) -> None:
    rng, fs, tokenizer = np.random.default_rng(0), pyarrow.fs.LocalFileSystem(), ByteTokenizer()
    folder.mkdir()
    closed: dict[str, list] = {"train": [], "val": []}
    for split, count in (("train", samples), ("val", 64)):
        writer = ShardWriter(fs, str(folder), f"{split}-00000", tokenizer)
        lengths = np.exp(rng.normal(np.log(200) - 0.32, 0.8, (count, 2))).clip(1, longest).astype(int)
        writer.write([tuple(rng.integers(3, 259, n).tolist() for n in pair) for pair in lengths])
        closed[split].append(writer.close())
    write_meta(fs, str(folder), tokenizer, closed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("b", "l", "xl"), default="b")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    tokens, longest, vocab_size = (1024, 63, 300) if args.quick else (32_768, 1023, 65_536)
    fields = {
        "train.packing": "true", "train.batch_tokens": tokens * args.workers, "train.length_window": 65_536,
        "train.log_every": 10, "train.ema_decay": 0, "optim.name": "adamw", "model.vocab_size": vocab_size,
        "model.hrm.backprop_warmup_steps": 0, "model.max_prompt_len": longest + 1, "model.max_response_len": longest + 1,
    }  # fmt: skip
    if args.quick:
        fields |= {"model.d_model": 64, "model.n_heads": 4, "model.hrm.h_layers": 1, "model.hrm.l_layers": 1}
        fields |= {"train.compile": "false", "train.length_window": 500}
    sets = [part for pair in fields.items() for part in ("--set", "{}={}".format(*pair))]
    with tempfile.TemporaryDirectory(prefix="packing_") as temporary:
        write_dataset(Path(temporary) / "data", 3000 if args.quick else 70_000, longest)
        command = [
            sys.executable, "-m", "ray_jobs.train", "--config", str(CONFIGS / f"hrm_text_{args.preset}.yaml"),
            "--dataset", f"{temporary}/data", "--save_dir", f"{temporary}/runs", "--num_workers", str(args.workers),
            "--steps", str(args.steps), *sets, *(part for value in args.set for part in ("--set", value)),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"tokens_per_s ([\d,]+)", done.stdout + done.stderr)][
        1:
    ]
    losses = re.findall(r"  loss ([\d.]+)", done.stdout + done.stderr)
    print(f"{statistics.median(rates):,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f}); last loss {losses[-1]}")


if __name__ == "__main__":
    main()
