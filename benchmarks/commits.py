"""Milliseconds of a training step at several commits, side by side: whether a change has made it slower.

Each commit is checked out into a folder of its own. Rounds of all alternate, each in a process of its own; medians are given. The
steps are those of the default config, and of a prefix LM in float32 and in bf16.

    python benchmarks/commits.py HEAD~5 HEAD [--rounds 5] [--only default,prefix_lm,bf16]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PREFIX_LM = {"model.architecture": "prefix_lm", "model.d_model": 192, "model.n_heads": 6, "train.batch_size": 16}
# Of each kind: the fields that differ from the defaults, tokens of a prompt and of a response, and steps.
KINDS: dict[str, tuple[dict, int, int, int]] = {
    "default": ({}, 10, 4, 60),
    "prefix_lm": (PREFIX_LM, 64, 64, 8),
    "bf16": (PREFIX_LM | {"train.mixed_precision": "bf16"}, 64, 64, 8),
}
# Runs at every commit, so it uses what all of them have.
STEPS = """
import sys, time
import numpy as np, torch
from hrm_lm.config import load_config
from hrm_lm.training.step import Stats, build_state, train_step

fields, prompt, response, steps = eval(sys.argv[1])
config = load_config(overrides=fields)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
state, rng = build_state(config, 64, device), np.random.default_rng(0)
pairs = [[rng.integers(3, 64, n).tolist() for n in (prompt, response)] for _ in range(config.train.batch_size)]

class Vocabulary:
    pad_id, bos_id, eos_id, vocab_size = 0, 1, 2, 64

try:
    from hrm_lm.data.splits import Ragged, Sample
    batch = state.model.collate(Ragged.of([Sample(*pair) for pair in pairs]), Vocabulary())
except (ImportError, AttributeError):  # before there was one contract of data
    from hrm_lm.data.collate import pad_batch
    batch = pad_batch([(a, [1, *b], [*b, 2]) for a, b in pairs], pad_id=0)
batch, stats = type(batch)(*(tensor.to(device) for tensor in batch)), Stats(state)
for count in (5, steps):
    start = time.perf_counter()
    for _ in range(count):
        train_step(state, [batch], stats)
    stats.read()  # waits for the device
print((time.perf_counter() - start) / steps * 1000)
"""


def milliseconds(folder: Path, kind: str) -> float:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", STEPS, repr(KINDS[kind])]
    return float(subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(KINDS), metavar="KIND,...")
    args = parser.parse_args()
    if unknown := set(args.only) - KINDS.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))}: known are {', '.join(KINDS)}")

    git = ["git", "-C", str(ROOT)]
    for commit in args.commits:
        if subprocess.run(
            [*git, "rev-parse", "-q", "--verify", f"{commit}^{{commit}}"], stdout=subprocess.DEVNULL
        ).returncode:
            parser.error(f"{commit}: this repository has no such commit")
    with tempfile.TemporaryDirectory() as root:
        folders = {commit: Path(root, str(i)) for i, commit in enumerate(args.commits)}
        try:
            for commit, folder in folders.items():
                subprocess.run([*git, "worktree", "add", "-q", "--detach", str(folder), commit], check=True)
            for kind in args.only:
                taken: dict[str, list[float]] = {commit: [] for commit in folders}
                for turn in range(args.rounds):
                    for commit in list(folders)[:: -1 if turn % 2 else 1]:
                        taken[commit].append(milliseconds(folders[commit], kind))
                for commit, some in taken.items():
                    median = statistics.median(some)
                    print(f"{kind:10} {commit:12} {median:8.1f} ms  {min(some):.1f} to {max(some):.1f}", flush=True)
        finally:
            for folder in folders.values():
                subprocess.run([*git, "worktree", "remove", "--force", str(folder)], stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
