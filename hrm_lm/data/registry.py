"""Dataset name -> train split, validation split, tokenizer.

A dataset is a function `(DataConfig, seed) -> Splits`. To add one, write the function and name it:
`--dataset my_package.my_module:my_function`, or add a line to `BUILT_IN`; that function also gets names that go on
after a colon.
"""

import importlib
from pathlib import Path
from typing import Callable, Iterable, NamedTuple, Sequence

import numpy as np

from hrm_lm.config import DataConfig, ModelConfig
from hrm_lm.data.tokenizer import Sample, Tokenizer, encode_pair, resolve_tokenizer, same_tokens
from hrm_lm.errors import UserError

BUILT_IN = {
    "synthetic": "hrm_lm.data.synthetic:build_synthetic_dataset",
    "reasoning_gym": "hrm_lm.data.reasoning_gym:build_reasoning_gym_dataset",
}


class Splits(NamedTuple):
    """What training needs of a dataset.

    The splits are anything with `len` and `[i]`. One that can do better than sample by sample has `ragged`, `lengths`,
    `longest` and `truncated` as well (`hrm_lm.data.prepared.PreparedSplit` says what they are), one with an order of its
    own `stream`, and one too long to be looked through `fitted` and `without` (`hrm_lm.data.reasoning_gym.EndlessSplit`).
    """

    train: Sequence[Sample]
    val: Sequence[Sample]
    tokenizer: Tokenizer
    place: Callable[[str, int], str] = lambda split, i: f"{split} sample {i + 1}"
    """Where sample i of a split ("train", "val") comes from, for messages: a file and line, say."""
    score: Callable[[int, str], float] | None = None
    """The task's own verdict on an answer to validation sample i, from 0 to 1, where it has one."""
    parts: dict[str, "Splits"] = {}
    """Of a mixture: its datasets by name."""


def encode_split(records: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> list[Sample]:
    return [encode_pair(tokenizer, prompt, response) for prompt, response in records]


def text_splits(
    config: DataConfig,
    train: Iterable[tuple[str, str]],
    val: Iterable[tuple[str, str]],
    default: Callable[[], Tokenizer],
) -> Splits:
    """Splits of prompts and responses, read with the tokenizer that `config.tokenizer` names, else with `default`'s."""
    tokenizer = resolve_tokenizer(config.tokenizer) if config.tokenizer else default()
    return Splits(encode_split(train, tokenizer), encode_split(val, tokenizer), tokenizer)


def load_dataset(config: DataConfig, model: ModelConfig, seed: int) -> Splits:
    """The dataset that `config.dataset` names, or the mixture, fit for the model's lengths.

    Raises UserError where it is missing, empty or malformed, or where a sample is too long for the model.
    """
    from hrm_lm.data import prepared  # it makes Splits

    if config.mixture:
        from hrm_lm.data.mixture import build_mixture

        return build_mixture(config, model, seed)
    name = config.dataset
    if name is None:
        raise UserError(
            "no dataset: give --dataset synthetic, reasoning_gym:<task>, a .jsonl file, a folder with train.jsonl, or a "
            "prepared dataset"
        )
    if (base := name.partition(":")[0]) in BUILT_IN:
        splits = _function(BUILT_IN[base])(config, seed)
    elif prepared.is_prepared(name):
        splits = prepared.load_prepared(name)
    elif Path(name).exists() or name.endswith(".jsonl"):
        from hrm_lm.data.jsonl import build_jsonl_dataset

        splits = build_jsonl_dataset(config, seed)
    elif is_function(name):
        splits = _function(name)(config, seed)
    else:
        raise UserError(
            f"data.dataset: {name!r} is neither a known name ({', '.join(BUILT_IN)}), nor an existing file or folder, "
            "nor module:function"
        )
    if config.tokenizer and not same_tokens(splits.tokenizer, resolve_tokenizer(config.tokenizer)):
        raise UserError(f"data.dataset: {name} has a tokenizer of its own, not data.tokenizer ({config.tokenizer})")
    fitted = {}
    for split in ("train", "val"):
        samples = getattr(splits, split)
        if not len(samples):
            raise UserError(f"data.dataset: {name} has no {split} samples")
        fitted[split] = fit_lengths(samples, model, config.truncate, lambda i: splits.place(split, i))
    return splits._replace(**fitted)


def is_function(name: str) -> bool:
    """Whether a dataset's name is that of code."""
    return ":" in name and "/" not in name and name.partition(":")[0] not in BUILT_IN


def fit_lengths(
    samples: Sequence[Sample], model: ModelConfig, truncate: bool, place: Callable[[int], str]
) -> Sequence[Sample]:
    """Refuses samples longer than the model takes, or cuts their ends off where `truncate`."""
    limits = (model.max_prompt_len, model.max_response_len)
    if hasattr(samples, "fitted"):
        return samples.fitted(*limits, truncate)
    measured = hasattr(samples, "longest")  # a prepared split: none of its prompts is empty either
    lengths = np.array([samples.longest]) if measured else sample_lengths(samples, np.arange(len(samples)))
    empty, over = lengths[:, 0] == 0, lengths > limits
    if empty.any():
        raise UserError(f"{place(int(empty.argmax()))}: the prompt is empty")
    if not over.any():
        return samples
    if not truncate:
        first = int(over.any(axis=1).argmax())
        side = int(over[first].argmax())
        name = ("prompt", "response")[side]
        which = f"data.dataset: the longest {name}" if measured else f"{place(first)}: the {name}"
        raise UserError(
            f"{which} has {lengths[first, side]} tokens, more than model.max_{name}_len ({limits[side]}); "
            "raise that, or cut with data.truncate=true"
        )
    if measured:
        return samples.truncated(*limits)
    return [(prompt[: limits[0]], inputs[: limits[1]], labels[: limits[1]]) for prompt, inputs, labels in samples]


def sample_lengths(samples: Sequence[Sample], indices: np.ndarray) -> np.ndarray:
    """(B, 2) int64: tokens of the prompts and responses at `indices`, EOS counted."""
    if hasattr(samples, "lengths"):
        return samples.lengths(indices)
    return np.array([(len(samples[i][0]), len(samples[i][2])) for i in indices])


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
