"""`reasoning_gym:<task>[,option=value...]`: questions made as training asks for them, by the reasoning-gym library.

The library makes a data set of any size from a seed. Here it makes blocks of SEED_SIZE questions: sample i is question
i % SEED_SIZE of block 1 + i // SEED_SIZE, so training has 2^32 samples, the same on every worker. Block 0 gives the
validation set, whatever the run's seed. A training sample whose question is in the validation set, or is too long for
the model, gives way to its successor.

Nothing but the question says how long it is: `train.length_window` makes that many before the first step.
"""

import difflib
import re
import sys
import time
from collections.abc import Set
from functools import lru_cache
from typing import Any

import numpy as np

from hrm_lm.config import DataConfig
from hrm_lm.data.order import Seed
from hrm_lm.data.splits import Limits, Prompt, Sample, Split, Splits
from hrm_lm.data.text import text_splits
from hrm_lm.data.tokenizer import ByteTokenizer, Tokenizer
from hrm_lm.errors import UserError
from hrm_lm.parsing import one_line, parse_yaml

SEED_SIZE = 4096
"""Questions of a seed: some tasks plan so many at once, some take long to set up."""
NUM_BLOCKS = (1 << 32) // SEED_SIZE - 1
PATIENCE = 1000
"""Questions in a row that may give way to the next."""

# Of version 0.1: what these ask depends on the order of Python's sets, hence on its hash seed,
HASH_SEEDED = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
# and of these on more than that: the first runs programs of unknown origin.
UNSEEDED = ("codeio", "list_functions")
# The verifiers of these evaluate the answer as Python. What a model writes must neither run nor take for ever.
EVALUATING = ("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication")
EVALUATING += ("puzzle24", "simple_integration", "spiral_matrix", "string_insertion")
HARMLESS = re.compile(r"(?!.*\*\s*\*)[\d\s+\-*/().,\[\]]*", re.DOTALL)
"""Numbers, lists of them and sums without powers."""


class ReasoningGymTask:
    """A task and its options, as `name` says: `chain_sum,min_terms=2,max_terms=3`.

    Raises UserError where the library or the task is missing, or an option is not one of the task's.
    """

    def __init__(self, name: str):
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise UserError(
                f"data.dataset: reasoning_gym:{name} needs the reasoning-gym library: pip install 'hrm-lm[reasoning]'"
            ) from None
        self.name, *assignments = re.split(r",(?=\w+=)", name)
        self.shown = f"data.dataset: reasoning_gym:{self.name}"
        if self.name not in DATASETS:
            close = difflib.get_close_matches(self.name, DATASETS, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "reasoning_gym.factory.DATASETS lists them"
            raise UserError(f"{self.shown}: no such task; {hint}")
        if self.name in HASH_SEEDED and sys.flags.hash_randomization:
            raise UserError(
                f"{self.shown}: its questions depend on Python's hash seed: set PYTHONHASHSEED=0 for this command and for Ray"
            )
        if self.name in UNSEEDED:
            raise UserError(f"{self.shown}: its questions are others every time, so none can be held out")
        try:
            options = {key: parse_yaml(value) for key, _, value in (a.partition("=") for a in assignments)}
        except ValueError:
            raise UserError(f"{self.shown}: a value of {','.join(assignments)} is not valid YAML") from None
        known = DATASETS[self.name][1].__dataclass_fields__.keys() - {"seed", "size"}  # those are ours
        for option in options.keys() - known:
            raise UserError(f"{self.shown}: has no option {option!r}; it has {', '.join(sorted(known))}")
        self.create = lru_cache(maxsize=32)(
            lambda block: reasoning_gym.create_dataset(self.name, seed=block * SEED_SIZE, size=SEED_SIZE, **options)
        )
        try:
            self.create(0)
        except Exception as error:  # a task may stumble over its options in any way
            raise UserError(f"{self.shown}: {one_line(error) or 'an option has an impossible value'}") from None

    def entry(self, block: int, i: int) -> dict[str, Any]:
        try:
            return self.create(block)[i]
        except Exception as error:
            raise UserError(f"{self.shown}: makes no question of these options: {one_line(error)}") from None

    def score(self, answer: str, entry: dict[str, Any]) -> float:
        """The verdict of the task's own verifier, from 0 to 1; where that would be unsafe, whether it is the answer."""
        if self.name in EVALUATING and not HARMLESS.fullmatch(answer):
            return float(answer == entry["answer"])
        try:
            return float(self.create(0).score_answer(answer, entry))
        except Exception:  # a verifier may stumble over what an untrained model writes
            return 0.0

    @staticmethod
    def facets(entry: dict[str, Any]) -> dict[str, Any]:
        """What makes the question easy or hard, as far as the task tells it of a single question: `difficulty` names
        the options that do, and mostly has their ranges.
        """
        metadata = entry["metadata"]
        values = {
            name: metadata.get(name, metadata.get(f"num_{name}", value))
            for name, value in metadata.get("difficulty", {}).items()
        }
        return {name: value for name, value in values.items() if isinstance(value, int | float | str)}


class EndlessSplit(Split):
    """Training samples, made on demand. held_out: prompts, as token ids, that no sample has."""

    def __init__(
        self,
        task: ReasoningGymTask,
        tokenizer: Tokenizer,
        held_out: frozenset[Prompt],
        limits: Limits | None = None,
        truncate: bool = False,
    ):
        self.task, self.tokenizer, self.held_out = task, tokenizer, held_out
        self.limits, self.truncate = limits, truncate
        self.places = lambda i: f"{task.shown}: train sample {i + 1}"
        self.make = lru_cache(maxsize=1 << 13)(self._make)  # a train.length_window up to that is not made twice

    def __len__(self) -> int:
        return NUM_BLOCKS * SEED_SIZE

    def __getitem__(self, i: int) -> Sample:
        return self.make(int(i))

    def order(self, start: int, stop: int, seed: Seed) -> np.ndarray:
        """Sample after sample, from a block that the seed draws: questions need no shuffling."""
        origin = int(np.random.default_rng(seed).integers(NUM_BLOCKS)) * SEED_SIZE
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
        block, first = divmod(i, SEED_SIZE)
        for attempt in range(PATIENCE):
            entry = self.task.entry(1 + block, (first + attempt) % SEED_SIZE)
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


def build_reasoning_gym_dataset(config: DataConfig, seed: int) -> Splits:
    task = ReasoningGymTask((config.dataset or "").partition(":")[2])
    entries: dict[str, dict[str, Any]] = {}
    start = time.perf_counter()
    for i in range(config.val_samples):
        entry = task.entry(0, i)
        if entry["answer"] is not None:
            entries.setdefault(entry["question"], entry)
        if i == 2 and (seconds := (time.perf_counter() - start) / 3 * config.val_samples) > 10:
            print(
                f"{task.shown}: makes data.val_samples={config.val_samples} in about {seconds:.0f} s", file=sys.stderr
            )
    if not entries:
        raise UserError(f"{task.shown}: the task has a verifier, but no answers to learn from")
    held_out = list(entries.values())
    splits = text_splits(
        config,
        [],
        [(entry["question"], entry["answer"]) for entry in held_out],
        ByteTokenizer,
        place=lambda split, i: f"{config.dataset}: {split} sample {i + 1}",
        score=lambda i, answer: task.score(answer, held_out[i]),
    )
    train = EndlessSplit(task, splits.tokenizer, frozenset(splits.val.prompts()))
    return Splits(train, splits.val, splits.tokenizer, facets=lambda i: task.facets(held_out[i]))
