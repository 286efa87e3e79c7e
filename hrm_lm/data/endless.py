"""Data sets without an end: questions that a task makes as training asks for them.

A task numbers its questions by block and place. Block 0 gives the validation set, whatever the run's seed; training sample i
is question i % block_size of block 1 + i // block_size, the same on every worker. So training has about 2^32 samples. A
training sample whose question is in the validation set, or is too long for the model, gives way to its successor.

Nothing but the question says how long it is: `train.length_window` makes that many before the first step.
"""

import sys
import time
from collections.abc import Callable, Mapping, Set
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from hrm_lm.config import DataConfig
from hrm_lm.data.order import Seed
from hrm_lm.data.splits import Limits, Prompt, Sample, Split, Splits
from hrm_lm.data.text import text_splits
from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.errors import UserError

SAMPLES = 1 << 32
PATIENCE = 1000
"""Questions in a row that may give way to the next."""


class Task(Protocol):
    """What makes questions."""

    shown: str
    """The data set for messages."""
    block_size: int
    """Questions of a block, which are made at once or share what it takes to make them."""

    def entry(self, block: int, i: int) -> dict[str, Any]:
        """`question` and `answer`, texts, and what else the task wants to know of them. Without an answer (None) the question
        is left out. A pure function. Of block 0 any i may be asked for, of others those below `block_size`.
        """

    @property
    def score(self) -> Callable[[str, dict[str, Any]], float] | None:
        """The task's verdict on an answer to an entry, from 0 to 1; None where only the entry's answer is right."""

    def facets(self, entry: dict[str, Any]) -> Mapping[str, Any]:
        """What makes the question easy or hard; see `Split.facets`."""


class EndlessSplit(Split):
    """Training samples, made on demand. held_out: prompts, as token ids, that no sample has."""

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        held_out: frozenset[Prompt],
        limits: Limits | None = None,
        truncate: bool = False,
    ):
        self.task, self.tokenizer, self.held_out = task, tokenizer, held_out
        self.limits, self.truncate = limits, truncate
        self.blocks = SAMPLES // task.block_size - 1
        self.places = lambda i: f"{task.shown}: train sample {i + 1}"
        self.make = lru_cache(maxsize=1 << 13)(self._make)  # a train.length_window up to that is not made twice

    def __len__(self) -> int:
        return self.blocks * self.task.block_size

    def __getitem__(self, i: int) -> Sample:
        return self.make(int(i))

    def order(self, start: int, stop: int, seed: Seed) -> np.ndarray:
        """Sample after sample, from a block that the seed draws: questions need no shuffling."""
        origin = int(np.random.default_rng(seed).integers(self.blocks)) * self.task.block_size
        return (origin + np.arange(start, stop)) % len(self)

    def fitted(self, limits: Limits, truncate: bool) -> "EndlessSplit":
        """The same without longer samples: they are cut, or left out."""
        fitted = EndlessSplit(self.task, self.tokenizer, self.held_out, limits, truncate)
        fitted[0]  # says now what training would say
        return fitted

    def prompts(self) -> frozenset[Prompt]:
        """No prompt: a split without end holds nothing out."""
        return frozenset()

    def without(self, prompts: Set[Prompt]) -> "EndlessSplit":
        return EndlessSplit(self.task, self.tokenizer, self.held_out.union(prompts), self.limits, self.truncate)

    def _make(self, i: int) -> Sample:
        block, first = divmod(i, self.task.block_size)
        for attempt in range(PATIENCE):
            entry = self.task.entry(1 + block, (first + attempt) % self.task.block_size)
            if entry["answer"] is not None and (sample := self._sample(entry["question"], entry["answer"])):
                return sample
        raise UserError(
            f"{self.task.shown}: {PATIENCE:,} questions in a row are held out for validation or too long for the model: "
            "lower data.val_samples, raise model.max_prompt_len or max_response_len, or change the task's options"
        )

    def _sample(self, question: str, answer: str) -> Sample | None:
        """None where the question is held out, or where the sample is longer than the model takes."""
        prompt, response = self.tokenizer.encode(question), self.tokenizer.encode(answer)
        if self.limits is None:
            return None if tuple(prompt) in self.held_out else Sample(prompt, response)
        most_prompt, most_labels = self.limits
        cut = prompt[:most_prompt]  # as a validation prompt may be
        fits = len(prompt) <= most_prompt and len(response) < most_labels
        if not self.held_out.isdisjoint([tuple(prompt), tuple(cut)]) or not (fits or self.truncate):
            return None
        return Sample(cut, response[:most_labels], ends=len(response) < most_labels)


def endless_dataset(config: DataConfig, task: Task, tokenizer: Callable[[], Tokenizer]) -> Splits:
    """`config.val_samples` questions of block 0, less those that are there twice, for validation; the others to train on.

    tokenizer: what `config.tokenizer` takes the place of. Raises UserError where no question has an answer.
    """
    entries: dict[str, dict[str, Any]] = {}
    spent: list[float] = []
    for i in range(config.val_samples):
        start = time.perf_counter()
        entry = task.entry(0, i)
        if entry["answer"] is not None:
            entries.setdefault(entry["question"], entry)
        if i < 3:
            spent.append(time.perf_counter() - start)
        if i == 2 and (seconds := expected(spent, config.val_samples, task.block_size) - sum(spent)) > 10:
            print(
                f"{task.shown}: makes data.val_samples={config.val_samples} in about {seconds:.0f} s", file=sys.stderr
            )
    if not entries:
        raise UserError(f"{task.shown}: the task has a verifier, but no answers to learn from")
    held_out, verdict = list(entries.values()), task.score
    splits = text_splits(
        config,
        [],
        [(entry["question"], entry["answer"]) for entry in held_out],
        tokenizer,
        place=lambda split, i: f"{config.dataset}: {split} sample {i + 1}",
        score=None if verdict is None else lambda i, answer: verdict(answer, held_out[i]),
    )
    train = EndlessSplit(task, splits.tokenizer, frozenset(splits.val.prompts()))
    return Splits(train, splits.val, splits.tokenizer, facets=lambda i: task.facets(held_out[i]))


def expected(spent: list[float], count: int, block_size: int) -> float:
    """Seconds that so many questions take. spent: what the first took, of which the very first may have made its block."""
    first, *others = spent
    each = sum(others) / len(others)
    return first * -(-count // block_size) + each * count if block_size > 1 else sum(spent) / len(spent) * count
