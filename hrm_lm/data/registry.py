"""Dataset name -> train split, validation split, tokenizer.

A dataset is a function `(DataConfig, seed) -> Splits`. To add one, write the function and name it:
`--dataset my_package.my_module:my_function`, or add a line to `BUILT_IN`.
"""

import importlib
from pathlib import Path
from typing import Callable, Iterable, NamedTuple, Sequence

from hrm_lm.config import DataConfig, ModelConfig
from hrm_lm.data.collate import Sample
from hrm_lm.data.tokenizer import Tokenizer, encode_pair
from hrm_lm.errors import UserError

BUILT_IN = {"synthetic": "hrm_lm.data.synthetic:build_synthetic_dataset"}


class Splits(NamedTuple):
    """What training needs of a dataset. The splits are anything with `len` and `[i]`."""

    train: Sequence[Sample]
    val: Sequence[Sample]
    tokenizer: Tokenizer
    place: Callable[[str, int], str] = lambda split, i: f"{split} sample {i + 1}"
    """Where sample i of a split ("train", "val") comes from, for messages: a file and line, say."""


def encode_split(records: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> list[Sample]:
    return [encode_pair(tokenizer, prompt, response) for prompt, response in records]


def load_dataset(config: DataConfig, model: ModelConfig, seed: int) -> Splits:
    """The dataset that `config.dataset` names, fit for the model's lengths.

    Raises UserError where it is missing, empty or malformed, or where a sample is too long for the model.
    """
    name = config.dataset
    if name is None:
        raise UserError("no dataset: give --dataset synthetic, a .jsonl file, or a folder with train.jsonl")
    if name in BUILT_IN:
        splits = _function(BUILT_IN[name])(config, seed)
    elif Path(name).exists() or name.endswith(".jsonl"):
        from hrm_lm.data.jsonl import build_jsonl_dataset

        splits = build_jsonl_dataset(config, seed)
    elif ":" in name and "/" not in name:
        splits = _function(name)(config, seed)
    else:
        raise UserError(
            f"data.dataset: {name!r} is neither a known name ({', '.join(BUILT_IN)}), nor an existing file or folder, "
            "nor module:function"
        )
    fitted = {}
    for split in ("train", "val"):
        samples = getattr(splits, split)
        if not len(samples):
            raise UserError(f"data.dataset: {name} has no {split} samples")
        fitted[split] = fit_lengths(samples, model, config.truncate, lambda i: splits.place(split, i))
    return splits._replace(**fitted)


def fit_lengths(
    samples: Sequence[Sample], model: ModelConfig, truncate: bool, place: Callable[[int], str]
) -> Sequence[Sample]:
    """Refuses samples longer than the model takes, or cuts their ends off where `truncate`."""
    longest_prompt, longest_response = model.max_prompt_len, model.max_response_len
    fitted = []
    for i, (prompt, inputs, labels) in enumerate(samples):
        if not len(prompt):
            raise UserError(f"{place(i)}: the prompt is empty")
        if len(prompt) > longest_prompt or len(labels) > longest_response:
            if not truncate:
                side, length, limit = (
                    ("prompt", len(prompt), longest_prompt)
                    if len(prompt) > longest_prompt
                    else ("response", len(labels), longest_response)
                )
                raise UserError(
                    f"{place(i)}: the {side} has {length} tokens, more than model.max_{side}_len ({limit}); "
                    "raise that, or cut with data.truncate=true"
                )
            prompt, inputs, labels = prompt[:longest_prompt], inputs[:longest_response], labels[:longest_response]
        fitted.append((prompt, inputs, labels))
    return fitted


def _function(name: str):
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise  # the user's module is there and needs something that is not
        raise UserError(f"data.dataset: there is no module {module!r} on the Python path") from None
    except AttributeError:
        raise UserError(f"data.dataset: module {module!r} has no {attribute!r}") from None
