"""The scores of a checkpoint on held-out samples. The command is `hrm_lm.commands.evaluate`."""

import sys
from pathlib import Path
from typing import Any

import torch

from hrm_lm.config import Layer, config_of
from hrm_lm.data.registry import load_dataset
from hrm_lm.inference.generate import chosen_cycles
from hrm_lm.models.contract import EvalOptions
from hrm_lm.training.checkpoint import load_model
from hrm_lm.training.validation import validate
from hrm_lm.trust import refuse_strangers_code


def evaluate(
    folder: Path,
    overrides: dict[str, Any],
    batch_size: int = 256,
    h_cycles: int | None = None,
    l_cycles: int | None = None,
) -> dict[str, Any]:
    """`step`, `samples` and what `validate` returns, on the validation split of the checkpoint's dataset.

    overrides: fields of the checkpoint's config by their dotted path; a `data.dataset` there takes the place of its
    dataset or mixture. Cycle counts of None are the trained ones. Raises UserError for a torn checkpoint, a dataset that
    cannot be read, a dataset that is code which `overrides` does not name, and for impossible cycles.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _, checkpoint = load_model(folder, device)
    cycles = chosen_cycles(checkpoint.config.model.hrm, h_cycles, l_cycles)
    raw = checkpoint.config.to_dict()
    if "data.dataset" in overrides:
        raw["data"]["mixture"] = {}
    layers = [Layer("the checkpoint's config", raw, own=False)]
    config = config_of(layers, overrides | {"data.tokenizer": str(folder / "tokenizer.json")})
    refuse_strangers_code(config.to_dict(), layers, overrides)
    splits = load_dataset(config.data, config.model, config.train.seed)
    precision = config.train.mixed_precision
    if precision == "fp16" and device.type != "cuda":
        precision = "none"  # fp16 is CUDA's alone
    options = EvalOptions.of(config, cycles=cycles, batch_size=batch_size, mixed_precision=precision)
    scores = validate(model, splits, options)
    return {"step": checkpoint.progress.step, "samples": len(splits.val), **scores}


if __name__ == "__main__":
    from hrm_lm.commands.evaluate import main
    from hrm_lm.commands.main import run_command

    sys.exit(run_command(main))
