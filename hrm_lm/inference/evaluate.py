"""The scores of a checkpoint on tasks. The command is `hrm_lm.commands.evaluate`."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hrm_lm.config import Halting
from hrm_lm.errors import UserError
from hrm_lm.evaluation.results import RESAMPLES, SEED, Answered, Evaluation
from hrm_lm.evaluation.scoring import Slice, slices_of
from hrm_lm.evaluation.spread import SLICES_PER_WORKER, scores_of
from hrm_lm.evaluation.tasks import tasks_of
from hrm_lm.inference.choice import chosen_cycles
from hrm_lm.models.contract import EvalOptions
from hrm_lm.training.checkpoint import load_model


def evaluate(
    folder: Path,
    overrides: dict[str, Any],
    tasks: Sequence[str] = (),
    batch_size: int = 256,
    h_cycles: Sequence[int | Halting | None] = (None,),
    l_cycles: int | None = None,
    workers: int | None = None,
    shown: str | None = None,
) -> Evaluation:
    """Scores the checkpoint in `folder` at each of the cycle counts; None is the trained count.

    overrides: fields of the checkpoint's config by their dotted path; a `data.dataset` there takes the place of its
    dataset or mixture. tasks: as `hrm_lm.evaluation.tasks` names them. workers: None for this process, else how many of a
    cluster. shown: what the results call the checkpoint. Raises UserError for a torn checkpoint, a task that cannot be read,
    a dataset that is code which `overrides` and `tasks` do not name, another tokenizer, and impossible cycles.
    """
    start = time.time()
    if "data.tokenizer" in overrides:
        raise UserError("data.tokenizer: a checkpoint is scored with its own tokenizer; leave it out")
    device = torch.device("cuda" if torch.cuda.is_available() and workers is None else "cpu")
    model, tokenizer, checkpoint = load_model(folder, device)
    trained = checkpoint.config.cycles
    every_cycles = list(dict.fromkeys(chosen_cycles(checkpoint.config, h, l_cycles) for h in h_cycles))
    asked = tasks_of(tasks, folder, checkpoint.config, overrides, tokenizer)
    options = EvalOptions.of(checkpoint.config, batch_size=batch_size)

    def slices(workers: int) -> list[Slice]:
        size = 4 * batch_size
        if workers > 1:
            samples = sum(len(task.split) for task in asked) * len(every_cycles)
            size = min(size, max(-(-samples // (SLICES_PER_WORKER * workers)), 16))
        return slices_of(asked, every_cycles, options, size)

    done = scores_of(model, tokenizer, slices, workers)
    answered = [
        [
            Answered.of(
                task, [(piece, scores) for piece, scores in done if (piece.task, piece.cycles) == (number, which)]
            )
            for which in range(len(every_cycles))
        ]
        for number, task in enumerate(asked)
    ]
    config = {
        "model": "hrm_lm",
        "model_num_parameters": sum(p.numel() for p in model.parameters()),
        "mixed_precision": options.mixed_precision,
        "batch_size": batch_size,
        "device": device.type,
        "bootstrap_iters": RESAMPLES,
        "random_seed": SEED,
    }
    return Evaluation(
        checkpoint=shown or str(folder),
        step=checkpoint.progress.step,
        cycles=every_cycles,
        trained=trained,
        tasks=asked,
        answered=answered,
        config=config,
        date=start,
        seconds=time.time() - start,
    )


if __name__ == "__main__":
    from hrm_lm.commands.evaluate import main
    from hrm_lm.commands.main import run_command

    sys.exit(run_command(main))
