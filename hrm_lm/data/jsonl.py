"""JSONL: a record a line, a pair of prompt and response or a conversation (`hrm_lm.data.records`)."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hrm_lm.config import DataConfig
from hrm_lm.data.chat import Chat
from hrm_lm.data.records import Fields, Missing, Pair
from hrm_lm.data.splits import Splits
from hrm_lm.data.text import named_tokenizer, splits_of
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.errors import UserError
from hrm_lm.filesystem import storage_error
from hrm_lm.parsing import one_line, parse_json


class Record(NamedTuple):
    prompt: str
    response: str
    place: str
    """file:line"""
    first_prompt: str
    """Of a conversation, which is held out as a whole; else the prompt."""


def build_jsonl_dataset(config: DataConfig, seed: int = 0) -> Splits:
    """A .jsonl file, or a folder with train.jsonl and optionally val.jsonl; else a seeded split by prompt.

    The tokenizer is the one `config.tokenizer` names, else one of characters, built from all the text there is.
    """
    path = Path(config.dataset or "")
    train_file = path / "train.jsonl" if path.is_dir() else path
    val_file = path / "val.jsonl"
    if path.is_dir() and not train_file.exists():
        raise UserError(
            f"{path}: has neither train.jsonl nor meta.json, which a finished prepared dataset has; a folder of Parquet or "
            f"of save_to_disk is hf:{path}"
        )
    tokenizer = named_tokenizer(config)
    fields = Fields.of(config.prompt_field, config.response_field, Chat.of(tokenizer), "data.")
    train = read_jsonl(train_file, fields)
    if path.is_dir() and val_file.exists():
        val = read_jsonl(val_file, fields)
    else:
        train, val = split_by_prompt(train, config.val_fraction, seed)
        if not val or not train:
            raise UserError(f"{train_file}: too few different prompts to hold some out for validation")
    places = {"train": [record.place for record in train], "val": [record.place for record in val]}
    tokenizer = tokenizer or SimpleTokenizer.from_texts(text for record in train + val for text in record[:2])
    return splits_of(
        [record[:2] for record in train], [record[:2] for record in val], tokenizer, lambda split, i: places[split][i]
    )


def read_jsonl(path: Path, fields: Fields) -> list[Record]:
    """Raises UserError with the file and line of what is wrong; blank lines are skipped."""
    records = []
    try:
        if not path.is_file() and path.exists():  # a folder or a device, which may have no end
            raise UserError(f"{path}: not a file")
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                pairs = pairs_of(line, fields, place)
                records += [Record(*pair, place, pairs[0][0]) for pair in pairs]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise storage_error(f"{path}: cannot be read", error) from None
    if not records:
        raise UserError(f"{path}: has no records")
    return records


def pairs_of(line: str, fields: Fields, place: str) -> list[Pair]:
    """The pairs of a line, at least one. Raises UserError, with the place, where the line has none."""
    try:
        record = parse_json(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise UserError(f"{place}: not JSON: {one_line(error)}") from None
    try:
        return fields.pairs(record)
    except Missing as missing:
        fields_there = one_line(", ".join(map(repr, record))) if isinstance(record, dict) else ""
        there = f"it has {fields_there}" if isinstance(record, dict) else "it is not an object"
        hint = f"; {there} (data.prompt_field and data.response_field name the fields)"
        raise UserError(f"{place}: {missing}" + hint * missing.reason.startswith("no field")) from None


def split_by_prompt(records: list[Record], val_fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Holds out a share of the prompts, each with all its records: no prompt is on both sides, and no conversation."""
    prompts = list(dict.fromkeys(record.first_prompt for record in records))
    order = np.random.default_rng(seed).permutation(len(prompts))
    held_out = {prompts[i] for i in order[: max(1, round(len(prompts) * val_fraction))]}
    train = [record for record in records if record.first_prompt not in held_out]
    return train, [record for record in records if record.first_prompt in held_out]
