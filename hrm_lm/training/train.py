"""The trainer's command: `python -m hrm_lm.training.train`, and `python -m ray_jobs.train` for submitting."""

import argparse
import sys
from typing import Sequence

from hrm_lm.cli import run_command
from hrm_lm.config import Config, load_config, parse_set

# flag -> the config field it sets; a flag not given leaves the config's value
FLAGS = {
    "dataset": "data.dataset",
    "steps": "train.steps",
    "val_every": "train.val_every",
    "save_dir": "ray.storage_path",
    "mixed_precision": "train.mixed_precision",
    "grad_clip": "train.grad_clip",
    "init_from": "train.init_from",
    "run_name": "ray.run_name",
    "num_workers": "ray.num_workers",
    "use_gpu": "ray.use_gpu",
}
HELP = {
    "dataset": "synthetic, reasoning_gym:TASK[,OPTION=VALUE...], a .jsonl file, a folder with train.jsonl, a prepared "
    "dataset (folder or URI), or module:function",
    "steps": "optimization steps",
    "val_every": "steps between validations, each with a checkpoint; 0: only at the end",
    "save_dir": "folder or URI that run folders are created in (default: runs/)",
    "mixed_precision": "none, bf16 or fp16 (CUDA only)",
    "grad_clip": "largest global L2 norm of the gradient; off when <= 0",
    "init_from": "checkpoint to take the weights from",
    "run_name": "name of the run's folder; a run that is there is resumed",
    "num_workers": "data-parallel workers",
    "use_gpu": "true, false, or auto: whatever the cluster has",
}


def main(argv: Sequence[str] | None = None, dry_run: int = 1, program: str = "hrm_lm.training.train") -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description="Train an HRM language model on Ray.")
    parser.add_argument("--config", metavar="YAML", help="config file (default: the values of configs/default.yaml)")
    parser.add_argument(
        "--dry_run",
        type=int,
        choices=(0, 1),
        default=dry_run,
        help="1: one step on random data without Ray, printing the loss (default: %(default)s)",
    )
    for flag, path in FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="VALUE", help=f"{HELP[flag]} [{path}]")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="what to do if the run is there")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="any field of the config by its dotted path, such as model.hrm.h_cycles=4; repeatable",
    )
    args = parser.parse_args(argv)

    given = [f"{path}={getattr(args, flag)}" for flag, path in FLAGS.items() if getattr(args, flag) is not None]
    config = load_config(args.config, parse_set(given) | parse_set(args.set))
    if args.dry_run:
        print(f"loss {dry_run_loss(config):.4f}")
        return 0

    from hrm_lm.cluster.run import run

    result = run(config, args.resume)
    scores = ", ".join(f"{name} {value:.4f}" for name, value in result.items() if name.startswith("val_"))
    print(
        f"{result['status']} at step {result['step']}: {scores} (best, step {result['best_step']}), "
        f"{result['seconds']:.0f} s, {result['tokens_per_s']:,.0f} tokens/s\n"
        f"best checkpoint: {result['best_checkpoint']}"
    )
    return 0


def dry_run_loss(config: Config) -> float:
    """One optimisation step on a random batch, in this process. Returns its loss."""
    import torch

    from hrm_lm.data.collate import pad_batch
    from hrm_lm.training.step import Stats, build_state, train_step

    device = torch.device("cuda" if torch.cuda.is_available() and config.ray.use_gpu else "cpu")
    if config.train.mixed_precision == "fp16" and device.type != "cuda":
        from hrm_lm.errors import UserError

        raise UserError("train.mixed_precision: fp16 needs a CUDA GPU; use bf16 or none on CPU")
    vocab_size, generator = 64, torch.Generator().manual_seed(config.train.seed)
    prompt_len, response_len = min(32, config.model.max_prompt_len), min(16, config.model.max_response_len)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, vocab_size, (length,), generator=generator).tolist()

    samples = [(tokens(prompt_len), tokens(response_len), tokens(response_len)) for _ in range(config.micro_batch_size)]
    state = build_state(config, vocab_size, device)
    stats = Stats(state)
    train_step(state, [pad_batch(samples, pad_id=0).to(device)], stats)
    return stats.read()["loss"]


if __name__ == "__main__":
    sys.exit(run_command(main))
