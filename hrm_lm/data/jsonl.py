"""JSONL: a record a line, its prompt and response under configurable names."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hrm_lm.config import DataConfig
from hrm_lm.data.splits import Splits
from hrm_lm.data.text import text_splits
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.errors import UserError
from hrm_lm.filesystem import storage_error
from hrm_lm.parsing import one_line, parse_json


class Record(NamedTuple):
    prompt: str
    response: str
    place: str
    """file:line"""


def build_jsonl_dataset(config: DataConfig, seed: int = 0) -> Splits:
    """A .jsonl file, or a folder with train.jsonl and optionally val.jsonl; else a seeded split by prompt.

    The tokenizer is the one `config.tokenizer` names, else one of characters, built from all the text there is.
    """
    path = Path(config.dataset or "")
    train_file = path / "train.jsonl" if path.is_dir() else path
    val_file = path / "val.jsonl"
    if path.is_dir() and not train_file.exists():
        raise UserError(f"{path}: has neither train.jsonl nor meta.json, which a finished prepared dataset has")
    train = read_jsonl(train_file, config.prompt_field, config.response_field)
    if path.is_dir() and val_file.exists():
        val = read_jsonl(val_file, config.prompt_field, config.response_field)
    else:
        train, val = split_by_prompt(train, config.val_fraction, seed)
        if not val or not train:
            raise UserError(f"{train_file}: too few different prompts to hold some out for validation")
    texts = (text for record in train + val for text in record[:2])
    places = {"train": [record.place for record in train], "val": [record.place for record in val]}
    return text_splits(
        config,
        [record[:2] for record in train],
        [record[:2] for record in val],
        lambda: SimpleTokenizer.from_texts(texts),
        place=lambda split, i: places[split][i],
    )


def read_jsonl(path: Path, prompt_field: str, response_field: str) -> list[Record]:
    """Raises UserError with the file and line of what is wrong; blank lines are skipped."""
    records = []
    try:
        if not path.is_file() and path.exists():  # a folder or a device, which may have no end
            raise UserError(f"{path}: not a file")
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = parse_json(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
                except ValueError as error:
                    raise UserError(f"{path}:{number}: not JSON: {one_line(error)}") from None
                place = f"{path}:{number}"
                records.append(Record(_text(record, prompt_field, place), _text(record, response_field, place), place))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise storage_error(f"{path}: cannot be read", error) from None
    if not records:
        raise UserError(f"{path}: has no records")
    return records


def _text(record: object, field: str, place: str) -> str:
    if not isinstance(record, dict) or field not in record:
        there = (
            f"it has {one_line(', '.join(map(repr, record)))}" if isinstance(record, dict) else "it is not an object"
        )
        raise UserError(f"{place}: no field {field!r}; {there} (data.prompt_field and data.response_field name them)")
    if not isinstance(record[field], str):
        raise UserError(f"{place}: {field!r} must be text, not {type(record[field]).__name__}")
    try:
        record[field].encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: {field!r} has half a character (a lone surrogate)") from None
    return record[field]


def split_by_prompt(records: list[Record], val_fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Holds out a share of the prompts, each with all its records: no prompt is on both sides."""
    prompts = list(dict.fromkeys(record.prompt for record in records))
    order = np.random.default_rng(seed).permutation(len(prompts))
    held_out = {prompts[i] for i in order[: max(1, round(len(prompts) * val_fraction))]}
    train = [record for record in records if record.prompt not in held_out]
    return train, [record for record in records if record.prompt in held_out]
