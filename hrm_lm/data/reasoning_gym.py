"""`reasoning_gym:<task>[,option=value...]`: questions made as training asks for them, by the reasoning-gym library.

Sample i is question i % CHUNK of the library's dataset of seed (1 + i // CHUNK) * CHUNK, so training has 2^32 samples,
the same on every worker. The first so many of seed 0 are the validation set, whatever the run's seed; a training sample
whose question is among them, or too long for the model, gives way to its successor.

Nothing but the question says how long it is: `train.length_window` makes that many before the first step.
"""

import difflib
import re
import sys
import time
from functools import lru_cache
from typing import Any, Iterable

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
            options = {key: yaml.safe_load(value) for key, _, value in (a.partition("=") for a in assignments)}
        except yaml.YAMLError:
            raise UserError(f"{self.shown}: a value of {','.join(assignments)} is not valid YAML") from None
        known = DATASETS[self.name][1].__dataclass_fields__.keys() - {"seed", "size"}  # those are ours
        for option in options.keys() - known:
            raise UserError(f"{self.shown}: has no option {option!r}; it has {', '.join(sorted(known))}")
        self.create = lru_cache(maxsize=32)(
            lambda chunk: reasoning_gym.create_dataset(self.name, seed=chunk * CHUNK, size=CHUNK, **options)
        )
        try:
            self.create(0)
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"{self.shown}: {error or 'an option has an impossible value'}") from None

    def entry(self, chunk: int, i: int) -> dict[str, Any]:
        return self.create(chunk)[i]

    def score(self, answer: str, entry: dict[str, Any]) -> float:
        """The verdict of the task's own verifier, from 0 to 1; where that would be unsafe, whether it is the answer."""
        if self.name in EVALUATING and not HARMLESS.fullmatch(answer):
            return float(answer == entry["answer"])
        try:
            return float(self.create(0).score_answer(answer, entry))
        except Exception:  # a verifier may stumble over what an untrained model writes
            return 0.0


class EndlessSplit:
    """Training samples, made on demand. held_out: prompts, as token ids, that are none of them."""

    def __init__(
        self,
        task: ReasoningGymTask,
        tokenizer: Tokenizer,
        held_out: frozenset[tuple[int, ...]],
        limits: tuple[int, int] | None = None,
        truncate: bool = False,
    ):
        self.task, self.tokenizer, self.held_out = task, tokenizer, held_out
        self.limits, self.truncate = limits, truncate
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
        limits = (longest_prompt, longest_response)
        fitted = EndlessSplit(self.task, self.tokenizer, self.held_out, limits, truncate)
        fitted[0]  # says now what training would say
        return fitted

    def without(self, prompts: Iterable[tuple[int, ...]]) -> "EndlessSplit":
        """The same, but for samples of these prompts."""
        held_out = self.held_out.union(prompts)
        return EndlessSplit(self.task, self.tokenizer, held_out, self.limits, self.truncate)

    def _pair(self, i: int) -> tuple[str, str]:
        chunk, first = divmod(i, CHUNK)
        for attempt in range(PATIENCE):
            entry = self.task.entry(1 + chunk, (first + attempt) % CHUNK)
            pair = entry["question"], entry["answer"]
            if pair[1] is not None and self._usable(*pair):
                return pair
        raise UserError(
            f"{self.task.shown}: {PATIENCE:,} questions in a row are held out for validation or too long for the model: "
            "lower data.val_samples, raise model.max_prompt_len or max_response_len, or change the task's options"
        )

    def _usable(self, prompt: str, response: str) -> bool:
        ids, _, labels = encode_pair(self.tokenizer, prompt, response)
        fits = self.limits is None or (len(ids) <= self.limits[0] and len(labels) <= self.limits[1])
        cut = ids[: self.limits[0]] if self.limits else ids  # as validation samples may be
        return self.held_out.isdisjoint([tuple(ids), tuple(cut)]) and (fits or self.truncate)

    def _encode(self, prompt: str, response: str) -> Sample:
        ids, inputs, labels = encode_pair(self.tokenizer, prompt, response)
        longest_prompt, longest_response = self.limits or (None, None)
        return ids[:longest_prompt], inputs[:longest_response], labels[:longest_response]


def build_reasoning_gym_dataset(config: DataConfig, seed: int) -> Splits:
    task = ReasoningGymTask(config.dataset.partition(":")[2])
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
    splits = text_splits(config, [], [(entry["question"], entry["answer"]) for entry in held_out], ByteTokenizer)
    return splits._replace(
        train=EndlessSplit(task, splits.tokenizer, frozenset(tuple(prompt) for prompt, _, _ in splits.val)),
        place=lambda split, i: f"{config.dataset}: {split} sample {i + 1}",
        score=lambda i, answer: task.score(answer, held_out[i]),
    )
