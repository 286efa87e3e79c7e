"""A data set's name -> the data set, fit for the model.

A data set is a function `(DataConfig, seed) -> Splits`. To add yours, write the function and name it:
`--dataset my_package.my_module:my_function`. The built-in names stand in `BUILT_IN`; a name may go on after a colon, and
the function reads the rest from `config.dataset`.
"""

import importlib
import inspect
import os
from collections.abc import Callable
from contextlib import suppress

from hrm_lm.config import DataConfig, ModelConfig
from hrm_lm.data.jsonl import build_jsonl_dataset
from hrm_lm.data.mixture import mix
from hrm_lm.data.prepared.reader import is_prepared, load_prepared
from hrm_lm.data.splits import Capped, Limits, Split, Splits, Subset
from hrm_lm.data.text import TextSplit, named_tokenizer, text_splits  # text_splits for a user's function
from hrm_lm.data.tokenizer import CHARACTERS, SimpleTokenizer, same_tokens, tokenizer_from_json
from hrm_lm.errors import UserError
from hrm_lm.filesystem import without_secrets
from hrm_lm.parsing import short

__all__ = ["BUILT_IN", "Splits", "is_function", "load_dataset", "text_splits"]

BUILT_IN = {
    "synthetic": "hrm_lm.data.synthetic:build_synthetic_dataset",
    "reasoning_gym": "hrm_lm.data.reasoning_gym:build_reasoning_gym_dataset",
    "hf": "hrm_lm.data.hub:build_hub_dataset",
    "task": "hrm_lm.data.named_tasks:build_task_dataset",
}


def load_dataset(config: DataConfig, model: ModelConfig, seed: int, sharing: int = 1) -> Splits:
    """The data set that `config.dataset` names, or the mixture, fit for the model's lengths.

    sharing: how many remote data sets of the run share `config.cache_gb`.
    Raises UserError where it is missing, empty or malformed, or where a sample is too long for the model.
    """
    if config.mixture:
        return load_mixture(config, model, seed)
    name, splits = without_secrets(config.dataset or ""), named_dataset(config, seed, sharing)
    named = named_tokenizer(config)
    source = without_secrets(config.tokenizer or "")
    if named and not same_tokens(splits.tokenizer, named):
        raise UserError(f"data.dataset: {name} has a tokenizer of its own, not data.tokenizer ({source})")
    if config.tokenizer == CHARACTERS and not isinstance(splits.tokenizer, SimpleTokenizer):
        raise UserError(f"data.dataset: {name} has a tokenizer of its own, not data.tokenizer ({CHARACTERS})")
    limits = Limits(model.max_prompt_len, model.max_response_len)

    def fit(which: str, split: Split) -> Split:
        if not len(split):
            raise UserError(f"data.dataset: {name} has no {which} samples")
        return split.fitted(limits, config.truncate)

    fitted, most = splits.map(fit), config.max_val_samples
    if config.truncate and isinstance(fitted.train, TextSplit):  # cut, prompts may be alike that were not before
        whole = fitted
        others = Subset(whole.train, lambda: whole.train.others(whole.val.prompts()))
        fitted = fitted.map(lambda which, split: others if which == "train" else split)
    if most is None or len(fitted.val) <= most:
        return fitted
    return fitted.map(lambda which, split: Capped(split, most) if which == "val" else split)


def named_dataset(config: DataConfig, seed: int, sharing: int = 1) -> Splits:
    """The data set that `config.dataset` names, as it is."""
    name = config.dataset
    if name is None:
        raise UserError(
            "no dataset: give --dataset synthetic, task:<name>, reasoning_gym:<task>, hf:<name>, a .jsonl file, a folder with "
            "train.jsonl, or a prepared dataset"
        )
    if (base := name.partition(":")[0]) in BUILT_IN:
        return function(BUILT_IN[base])(config, seed)
    if is_prepared(name):
        return load_prepared(name, config.cache_gb, sharing)
    if os.path.exists(name) or name.endswith(".jsonl"):
        return build_jsonl_dataset(config, seed)
    if is_function(name):
        splits = function(name)(config, seed)
        if not isinstance(splits, Splits):
            raise UserError(
                f"data.dataset: {name} returned {type(splits).__name__}; it must return hrm_lm.data.registry.Splits"
            )
        try:
            tokenizer_from_json(splits.tokenizer.to_json())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"data.dataset: {name} has a tokenizer that no checkpoint could bring back, since its to_json is not that of a "
                f"tokenizer of hrm_lm.data.tokenizer: {error}"
            ) from None
        return splits
    raise UserError(
        f"data.dataset: {short(name)} is neither a known name ({', '.join(BUILT_IN)}), nor an existing file or folder, "
        "nor module:function"
    )


def load_mixture(config: DataConfig, model: ModelConfig, seed: int) -> Splits:
    """The data sets of `config.mixture`, all read with one tokenizer: `config.tokenizer`, a prepared member's, or bytes."""
    if config.tokenizer == CHARACTERS:
        raise UserError(
            "data.tokenizer: characters are those of a single data set; a mixture takes bytes or a tokenizer.json"
        )
    mixture = dict(sorted(config.mixture.items()))  # the order in the config does not count
    ready = next((member.dataset for member in mixture.values() if is_prepared(member.dataset)), None)
    tokenizer = config.tokenizer or ready or "bytes"
    remote = max(sum("://" in member.dataset for member in mixture.values()), 1)
    members = {}
    for name, member in mixture.items():
        own = member.model_dump(exclude={"weight"}, exclude_none=True) | {"mixture": {}, "tokenizer": tokenizer}
        members[name] = load_dataset(config.model_copy(update=own), model, seed, remote)
    return mix(members, [member.weight for member in mixture.values()])


def is_function(name: str) -> bool:
    """Whether a data set's name is that of code."""
    return ":" in name and "/" not in name and name.partition(":")[0] not in BUILT_IN


def function(name: str) -> Callable[[DataConfig, int], Splits]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise  # the user's module is there, but a module that it needs is not
        raise UserError(f"data.dataset: there is no module {module!r} on the Python path") from None
    except AttributeError:
        raise UserError(f"data.dataset: module {module!r} has no {attribute!r}") from None
    except TypeError:
        raise UserError(f"data.dataset: {name!r} is not module:function") from None
    if not callable(found):
        raise UserError(f"data.dataset: {name} is {type(found).__name__}, not a function of the data config and a seed")
    with suppress(ValueError):  # what is written in C may not tell its signature
        try:
            inspect.signature(found).bind(None, 0)
        except TypeError as error:
            raise UserError(f"data.dataset: {name} must be a function (config, seed): {error}") from None
    return found
