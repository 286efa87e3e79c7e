"""`reasoning_gym:<task>[,option=value...]`: questions made as training asks for them, by the reasoning-gym library.

The library makes a data set of any size from a seed; a seed gives a block of `hrm_lm.data.endless`.
"""

import difflib
import re
import sys
from functools import lru_cache
from typing import Any

from hrm_lm.config import DataConfig
from hrm_lm.data.endless import endless_dataset
from hrm_lm.data.splits import Splits
from hrm_lm.data.tokenizer import ByteTokenizer
from hrm_lm.errors import UserError
from hrm_lm.parsing import one_line, parse_yaml

SEED_SIZE = 4096
"""Questions of a seed: some tasks plan so many at once, some take long to set up."""

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

    block_size = SEED_SIZE

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


def build_reasoning_gym_dataset(config: DataConfig, seed: int) -> Splits:
    return endless_dataset(config, ReasoningGymTask((config.dataset or "").partition(":")[2]), ByteTokenizer)
