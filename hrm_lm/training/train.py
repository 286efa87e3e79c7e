"""`python -m hrm_lm.training.train`: the guide's form of `hrm-lm train`, and the dry run that it defaults to."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hrm_lm.config import Config

if TYPE_CHECKING:
    import torch

STEP_FLOPS = 3e11
"""Of a dry run's step on CPU: some seconds."""
LONGEST = 10 * STEP_FLOPS
"""Of a step of a single sample on CPU: a minute. A model that takes longer gets its plan, and no loss."""


def dry_run(config: Config) -> None:
    """Prints the loss of one optimisation step on a random batch, in this process, and what the config's run will take."""
    import torch

    from hrm_lm.data.named_tasks import check_names
    from hrm_lm.training.memory import is_out_of_memory
    from hrm_lm.training.plan import plan

    check_names(config.data)
    device = torch.device("cuda" if torch.cuda.is_available() and config.ray.use_gpu else "cpu")
    if config.train.mixed_precision == "fp16" and device.type != "cuda":
        from hrm_lm.errors import UserError

        raise UserError("train.mixed_precision: fp16 needs a CUDA GPU; use bf16 or none on CPU")
    obstacle = too_large(config, device)
    if obstacle is None:
        try:
            print(f"loss {random_loss(config, device):.4f}", flush=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            obstacle = "a step takes more memory than there is"
    if obstacle:
        print(f"loss         not computed: {obstacle}")
    print(plan(config, device, obstacle))


def too_large(config: Config, device: "torch.device") -> str | None:
    """Why a dry run takes no step, if that is known beforehand."""
    import torch

    from hrm_lm.models.build import build_model
    from hrm_lm.training.memory import kept_bytes
    from hrm_lm.training.plan import VOCABULARY, cpu_work, mean_flops, size

    with torch.device("meta"):
        model = build_model(config.model, config.model.vocab_size or VOCABULARY)
    kept = sum(kept_bytes(model, config).values())
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    elif cpu_work(config, mean_flops(model, config, 48, 16, 1)) > LONGEST:
        return "a step takes a CPU too long"
    else:
        memory = int(0.7 * host_memory())  # Linux ends a process that takes too much, without a word
    return f"a run keeps {size(kept)}, and {size(memory)} of memory are free for it" if kept > memory else None


def host_memory() -> int:
    """Bytes that are free."""
    with suppress(OSError):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def random_loss(config: Config, device: "torch.device") -> float:
    """The loss of one optimisation step on a batch of at most 32 + 16 random tokens a sample. On CPU the batch of a large
    model is cut to what takes some seconds.
    """
    import torch

    from hrm_lm.data.collate import to_device
    from hrm_lm.data.splits import Ragged, Sample
    from hrm_lm.data.tokenizer import ByteTokenizer
    from hrm_lm.models.build import build_model
    from hrm_lm.training.plan import mean_flops
    from hrm_lm.training.step import Stats, build_state, train_step

    vocab_size, generator = 64, torch.Generator().manual_seed(config.train.seed)
    prompt_len, response_len = min(32, config.model.max_prompt_len), min(16, config.model.max_response_len)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, vocab_size, (length,), generator=generator).tolist()

    count = config.micro_batch_size
    if device.type == "cpu":
        with torch.device("meta"):
            model = build_model(config.model, vocab_size)
        affordable = int(STEP_FLOPS / mean_flops(model, config, prompt_len + response_len, response_len, 1))
        if count > affordable:  # and compiling takes longer than such a step
            count = max(affordable, 1)
            config = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    samples = [Sample(tokens(prompt_len), tokens(response_len - 1)) for _ in range(count)]
    state = build_state(config, vocab_size, device)
    stats = Stats(state)
    batch = state.model.collate(Ragged.of(samples), ByteTokenizer())
    train_step(state, [to_device(batch, device)], stats)
    return stats.read()["loss"]


if __name__ == "__main__":
    from hrm_lm.commands.main import run_command
    from hrm_lm.commands.train import main

    sys.exit(run_command(lambda: main(dry_run=1)))
