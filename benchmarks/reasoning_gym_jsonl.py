"""Writes a reasoning-gym task as train.jsonl and val.jsonl, with no question on both sides.

python benchmarks/reasoning_gym_jsonl.py chain_sum data/chain_sum --size 20000 max_terms=3 max_digits=2
"""

import argparse
import json
from pathlib import Path

import reasoning_gym
import yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("output", type=Path)
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="the task's own options")
    parser.add_argument("--size", type=int, default=20_000, help="training questions drawn (default: %(default)s)")
    parser.add_argument("--val_size", type=int, default=500, help="validation questions drawn (default: %(default)s)")
    args = parser.parse_intermixed_args()

    options = {key: yaml.safe_load(value) for key, value in (option.split("=") for option in args.options)}
    drawn = [
        dict.fromkeys(
            (item["question"], item["answer"])
            for item in reasoning_gym.create_dataset(args.task, size=size, seed=seed, **options)
        )
        for seed, size in ((1, args.size), (0, args.val_size))
    ]
    held_out = {question for question, _ in drawn[1]}
    drawn[0] = [pair for pair in drawn[0] if pair[0] not in held_out]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, pairs in zip(("train", "val"), drawn):
        with open(args.output / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"prompt": q, "response": a}, ensure_ascii=False) + "\n" for q, a in pairs)
        print(f"{args.output / name}.jsonl: {len(pairs)} records")


if __name__ == "__main__":
    main()
