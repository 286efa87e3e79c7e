"""`python -m hrm_lm.training.train`: the guide's form of `hrm-lm train`, and the dry run that it defaults to."""

import sys

from hrm_lm.config import Config


def dry_run_loss(config: Config) -> float:
    """One optimisation step on a random batch, in this process. Returns its loss."""
    import torch

    from hrm_lm.data.collate import to_device
    from hrm_lm.data.splits import Ragged, Sample
    from hrm_lm.data.tokenizer import ByteTokenizer
    from hrm_lm.training.step import Stats, build_state, train_step

    device = torch.device("cuda" if torch.cuda.is_available() and config.ray.use_gpu else "cpu")
    if config.train.mixed_precision == "fp16" and device.type != "cuda":
        from hrm_lm.errors import UserError

        raise UserError("train.mixed_precision: fp16 needs a CUDA GPU; use bf16 or none on CPU")
    vocab_size, generator = 64, torch.Generator().manual_seed(config.train.seed)
    prompt_len, response_len = min(32, config.model.max_prompt_len), min(16, config.model.max_response_len)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, vocab_size, (length,), generator=generator).tolist()

    samples = [Sample(tokens(prompt_len), tokens(response_len - 1)) for _ in range(config.micro_batch_size)]
    state = build_state(config, vocab_size, device)
    stats = Stats(state)
    batch = state.model.collate(Ragged.of(samples), ByteTokenizer())
    train_step(state, [to_device(batch, device)], stats)
    return stats.read()["loss"]


if __name__ == "__main__":
    from hrm_lm.commands.main import run_command
    from hrm_lm.commands.train import main

    sys.exit(run_command(lambda: main(dry_run=1)))
