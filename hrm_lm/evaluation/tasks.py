"""Names to tasks: what a checkpoint is asked, and who says what is right.

A task is a split: samples with prompts and responses, perhaps a verdict and facets. `--tasks` names a suite (`.yaml`), files
of records, or datasets by the names that `--dataset` takes, of which the validation split is asked. Without it, the task is
the validation split of the checkpoint's own dataset.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hrm_lm.config import Config, Layer, config_of
from hrm_lm.data.prepared.reader import is_prepared
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.splits import Limits, Split, Splits, Subset
from hrm_lm.data.text import TextSplit, as_pairs
from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.evaluation.records import FLAG, Frame, RecordTask, questions, read_suite, validated
from hrm_lm.evaluation.verdicts import METRICS
from hrm_lm.filesystem import without_secrets
from hrm_lm.prepare.reading import file_format
from hrm_lm.trust import refuse_strangers_code

MOST_VALUES = 64
"""A facet of texts with more values than this is left out: there would be few samples to each."""
BINS = 6
"""Ranges that the values of a facet of numbers are put into, where there are more than twice as many values."""


@dataclass(frozen=True)
class Task:
    name: str
    split: Split
    """Its `verdict` says what an answer is worth, where it has one."""
    tokenizer: Tokenizer
    metric: str = "score"
    """The name of the verdict."""
    original: int = 0
    """Samples that there are, of which the split may have some."""
    config: dict[str, Any] = field(default_factory=dict)
    """What the results say of the task."""
    member_of: str | None = None
    """The mixture that it is a part of."""
    max_new_tokens: int | None = None

    @property
    def headline(self) -> str:
        """The score that says how good an answer is."""
        return "exact_match" if self.split.verdict is None else self.metric

    @cached_property
    def facets(self) -> dict[str, np.ndarray]:
        """Texts (n,) by name: what each sample has of each facet, or "" where it has nothing of it."""
        if self.split.facets is None:
            return {}
        found = [dict(self.split.facets(i)) for i in range(len(self.split))]
        names = dict.fromkeys(name for facets in found for name in facets)
        texts = {name: binned([facets.get(name) for facets in found]) for name in names}
        return {name: values for name, values in texts.items() if 1 < len(set(values) - {""}) <= MOST_VALUES}


def binned(values: Sequence[Any]) -> np.ndarray:
    """Texts (n,) of values of any kind; many numbers become ranges that hold about as many samples each."""
    there = np.array([value is not None for value in values])
    numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values if value is not None
    )
    texts = np.array(["" if value is None else str(value) for value in values], dtype=object)
    if not numbers or len(set(texts[there])) <= 2 * BINS:
        return texts
    known = np.array([value for value in values if value is not None])
    edges = np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1), method="lower"))
    home = np.clip(np.searchsorted(edges, known, side="right") - 1, 0, len(edges) - 1)
    names = [
        f"{known[home == i].min():g} to {known[home == i].max():g}" if (home == i).any() else ""
        for i in range(len(edges))
    ]
    texts[there] = [names[i] for i in home]
    return texts


def in_order(values: Iterable[str]) -> list[str]:
    """The values of a facet, as a reader expects them: numbers by size, also within a text."""
    return sorted(
        set(values) - {""}, key=lambda text: [(0, float(part), "") if part[:1].isdigit() else (1, 0.0, part)
                                              for part in re.split(r"(\d+(?:\.\d+)?)", text) if part]
    )  # fmt: skip


# --- tasks by name -----------------------------------------------------------------------------------------------------


def tasks_of(
    names: Sequence[str], folder: Path, trained: Config, overrides: dict[str, Any], tokenizer: Tokenizer
) -> list[Task]:
    """The tasks that `--tasks` names, or without names those of the checkpoint's own dataset.

    folder, trained: the checkpoint's, and its config. overrides: fields of that config by their dotted path.
    Raises UserError for a name that is none, data that cannot be read, samples that do not fit the model, and a dataset
    that is code which the command line does not name.
    """

    def configured(dataset: str | None) -> Config:
        given = overrides | ({"data.dataset": dataset} if dataset else {})
        raw = trained.to_dict()
        if "data.dataset" in given:
            raw["data"]["mixture"] = {}
        layers = [Layer("the checkpoint's config", raw, own=False)]
        config = config_of(layers, given | {"data.tokenizer": str(folder / "tokenizer.json")})
        refuse_strangers_code(config.to_dict(), layers, given)
        return config

    if not names:
        return of_dataset(configured(None))
    tasks: list[Task] = []
    for text in names:
        for name, options in parsed(text):
            if name.endswith((".yaml", ".yml")):
                suite = read_suite(name, options)
                tasks += [
                    of_records(key, task, frame, configured(None), tokenizer) for key, (task, frame) in suite.items()
                ]
            elif is_records(name):
                task = validated(RecordTask, options | {"data": name}, f"{FLAG} {without_secrets(name)}")
                tasks.append(of_records(Path(name.partition("?")[0]).name, task, Frame(), configured(None), tokenizer))
            else:
                limit = validated(
                    RecordTask, {"limit": options.pop("limit", None)}, f"{FLAG} {without_secrets(name)}"
                ).limit
                whole = ",".join([name, *(f"{key}={value}" for key, value in options.items())])
                tasks += [limited(task, limit) for task in of_dataset(configured(whole))]
    return renamed(tasks)


def parsed(text: str) -> list[tuple[str, dict[str, str]]]:
    """`"a,limit=10,b"` as names with their options. A comma within brackets separates nothing."""
    found: list[tuple[str, dict[str, str]]] = []
    for piece in filter(None, re.split(r",(?![^\[({]*[\])}])", text)):
        key, equals, value = piece.partition("=")
        if found and equals and key.isidentifier():
            found[-1][1][key] = value
        else:
            found.append((piece, {}))
    return found


def is_records(name: str) -> bool:
    """Whether a name is that of files of records, rather than that of a dataset."""
    if file_format(name.partition("?")[0] if "://" in name else name):
        return True
    return os.path.isdir(name) and not os.path.exists(f"{name}/train.jsonl") and not is_prepared(name)


def of_dataset(config: Config) -> list[Task]:
    """The validation split of the config's dataset; of a mixture, those of its members."""
    splits = load_dataset(config.data, config.model, config.train.seed)
    name = without_secrets(config.data.dataset or "mixture")

    def task(name: str, splits: Splits, member_of: str | None = None) -> Task:
        described = {"dataset_path": name, "test_split": "validation", "seed": config.train.seed}
        return Task(name, splits.val, splits.tokenizer, original=len(splits.val), config=described, member_of=member_of)

    if splits.members:
        return [task(member, its, name) for member, its in splits.members.items()]
    return [task(name, splits)]


def of_records(name: str, task: RecordTask, frame: Frame, config: Config, tokenizer: Tokenizer) -> Task:
    asked, total = questions(task, frame)
    pairs = as_pairs([(one.prompt, one.response) for one in asked], name, lambda _, i: asked[i].place)
    metric = task.metric or ("choice" if task.options is not None else "exact_match" if task.answers else None)
    verdict = METRICS[metric] if metric else None
    split = TextSplit(
        pairs,
        tokenizer,
        lambda i: asked[i].place,
        None if verdict is None else lambda i, answer: verdict(answer, asked[i].expected),
    )
    split.facets = lambda i: asked[i].facets
    fitted = split.fitted(Limits(config.model.max_prompt_len, config.model.max_response_len), config.data.truncate)
    described = task.model_dump(exclude_defaults=True) | {
        key: without_secrets(value) for key in ("data", "shots_data") if (value := getattr(task, key))
    }
    described |= {
        "dataset_path": described["data"],
        "doc_to_text": task.prompt,
        "num_fewshot": task.shots * bool(task.shots_data),
    }
    return Task(name, fitted, tokenizer, metric or "score", total, described, max_new_tokens=task.max_new_tokens)


def limited(task: Task, limit: int | None) -> Task:
    """At most so many samples, spread evenly."""
    count = len(task.split)
    if limit is None or limit >= count:
        return task
    return replace(task, split=Subset(task.split, np.arange(limit) * count // limit))


def renamed(tasks: list[Task]) -> list[Task]:
    """Tasks with different names: a second of a name gets a number."""
    seen: dict[str, int] = {}
    for i, task in enumerate(tasks):
        seen[task.name] = seen.get(task.name, 0) + 1
        if seen[task.name] > 1:
            tasks[i] = replace(task, name=f"{task.name}#{seen[task.name]}")
    return tasks
