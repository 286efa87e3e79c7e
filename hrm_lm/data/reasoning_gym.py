"""`reasoning_gym:<task>[,option=value...]`: questions made as training asks for them, by the reasoning-gym library.

Sample i is question i % CHUNK of the library's dataset of seed (1 + i // CHUNK) * CHUNK, so training has 2^32 samples,
the same on every worker. The first so many of seed 0 are the validation set, whatever the run's seed; a training sample
whose question is among them, or too long for the model, gives way to its successor.
"""

import difflib
import re
from functools import lru_cache
from typing import Any

import numpy as np
import yaml

from hrm_lm.config import DataConfig
from hrm_lm.data.registry import Splits, text_splits
from hrm_lm.data.tokenizer import ByteTokenizer, Sample, Tokenizer, encode_pair
from hrm_lm.errors import UserError

CHUNK = 4096
"""Questions to a seed: some tasks plan so many at once, some take long to set up."""
NUM_CHUNKS = (1 << 32) // CHUNK - 1
PATIENCE = 1000
"""Questions in a row that may give way to the next."""


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
        self.options = {key: yaml.safe_load(value) for key, _, value in (a.partition("=") for a in assignments)}
        self.shown = f"data.dataset: reasoning_gym:{self.name}"
        self.create = lru_cache(maxsize=32)(
            lambda chunk: reasoning_gym.create_dataset(self.name, seed=chunk * CHUNK, size=CHUNK, **self.options)
        )
        if self.name not in DATASETS:
            close = difflib.get_close_matches(self.name, DATASETS, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "reasoning_gym.factory.DATASETS lists them"
            raise UserError(f"{self.shown}: no such task; {hint}")
        known = DATASETS[self.name][1].__dataclass_fields__.keys() - {"seed", "size"}  # those are ours
        for option in self.options.keys() - known:
            raise UserError(f"{self.shown}: has no option {option!r}; it has {', '.join(sorted(known))}")
        try:
            self.create(0)
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"{self.shown}: {error or 'an option has an impossible value'}") from None

    def entry(self, chunk: int, i: int) -> dict[str, Any]:
        return self.create(chunk)[i]

    def score(self, answer: str, entry: dict[str, Any]) -> float:
        """The verdict of the task's own verifier, from 0 to 1."""
        try:
            return float(self.create(0).score_answer(answer, entry))
        except Exception:  # a verifier may stumble over what an untrained model writes
            return 0.0


class EndlessSplit:
    """Training samples, made on demand."""

    def __init__(self, task: ReasoningGymTask, tokenizer: Tokenizer, held_out: frozenset[str]):
        self.task, self.tokenizer, self.held_out = task, tokenizer, held_out
        self.limits: tuple[int, int] | None = None
        self.truncate = False
        self.pair = lru_cache(maxsize=1 << 13)(self._pair)  # a train.length_window up to that is not made twice

    def __len__(self) -> int:
        return NUM_CHUNKS * CHUNK

    def __getitem__(self, i: int) -> Sample:
        return self._encode(*self.pair(int(i)))

    def stream(self, start: int, stop: int, seed: int | tuple[int, ...]) -> np.ndarray:
        """One sample after another, from a chunk that the seed draws: they need no shuffling."""
        origin = int(np.random.default_rng(seed).integers(NUM_CHUNKS)) * CHUNK
        return (origin + np.arange(start, stop)) % len(self)

    def fitted(self, longest_prompt: int, longest_response: int, truncate: bool) -> "EndlessSplit":
        """The same, but for samples that are longer: they are cut, or left out."""
        fitted = EndlessSplit(self.task, self.tokenizer, self.held_out)
        fitted.limits, fitted.truncate = (longest_prompt, longest_response), truncate
        fitted[0]  # says now what training would say
        return fitted

    def _pair(self, i: int) -> tuple[str, str]:
        chunk, first = divmod(i, CHUNK)
        for attempt in range(PATIENCE):
            entry = self.task.entry(1 + chunk, (first + attempt) % CHUNK)
            pair = entry["question"], entry["answer"]
            if pair[1] is not None and pair[0] not in self.held_out and self._fits(self._encode(*pair)):
                return pair
        raise UserError(
            f"{self.task.shown}: {PATIENCE:,} questions in a row are held out for validation or too long for the model: "
            "lower data.val_samples, raise model.max_prompt_len or max_response_len, or change the task's options"
        )

    def _encode(self, prompt: str, response: str) -> Sample:
        sample = encode_pair(self.tokenizer, prompt, response)
        if self.truncate:
            longest_prompt, longest_response = self.limits
            sample = sample[0][:longest_prompt], sample[1][:longest_response], sample[2][:longest_response]
        return sample

    def _fits(self, sample: Sample) -> bool:
        return self.limits is None or (len(sample[0]) <= self.limits[0] and len(sample[2]) <= self.limits[1])


def build_reasoning_gym_dataset(config: DataConfig, seed: int) -> Splits:
    task = ReasoningGymTask(config.dataset.partition(":")[2])
    drawn = (task.entry(0, i) for i in range(config.val_samples))
    entries = list({entry["question"]: entry for entry in drawn if entry["answer"] is not None}.values())
    if not entries:
        raise UserError(f"{task.shown}: the task has a verifier, but no answers to learn from")
    splits = text_splits(config, [], [(entry["question"], entry["answer"]) for entry in entries], ByteTokenizer)
    return splits._replace(
        train=EndlessSplit(task, splits.tokenizer, frozenset(entry["question"] for entry in entries)),
        place=lambda split, i: f"{config.dataset}: {split} sample {i + 1}",
        score=lambda i, answer: task.score(answer, entries[i]),
    )
