"""`task:<name>[,option=value...]`: tasks that are made on the fly, for models that recur. `TASKS` lists them.

They have a single right answer, easy questions beside hard ones, and a difficulty that options turn. Options that begin with
`val_` are for validation alone: a model can be tested beyond what it was trained on.

Question and answer are of the same characters, and in most tasks an answer is no longer than its question, so that
`model.architecture: puzzle` can answer in the question's places.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from hrm_lm.config import DataConfig
from hrm_lm.data.endless import endless_dataset
from hrm_lm.data.splits import Splits
from hrm_lm.data.tasks.arc import ARC_CHARACTERS, arc_question, arc_tasks
from hrm_lm.data.tasks.mazes import FREE, GOAL, START, WALL, WAY, maze
from hrm_lm.data.tasks.sequences import DIGITS, addition, prefix_sums
from hrm_lm.data.tasks.sudoku import BOXES, minimal_puzzles, variants, with_givens, with_hints
from hrm_lm.data.tokenizer import SimpleTokenizer, Tokenizer
from hrm_lm.errors import UserError
from hrm_lm.parsing import parse_yaml

Question = tuple[str, str, dict[str, Any]]
"""Question, answer, and what makes it easy or hard."""
LARGEST_MAZE = 201
LONGEST = 100_000
"""Elements of a sequence."""


@dataclass(frozen=True)
class NamedTask:
    """A task with its options, which are the fields of its class. block_size: questions that are made at once."""

    characters: ClassVar[str]
    block_size: ClassVar[int] = 256

    def make(self, count: int, validation: bool, rng: np.random.Generator) -> list[Question]:
        raise NotImplementedError

    def check(self) -> None:
        """Raises ValueError where an option has an impossible value."""


@dataclass(frozen=True)
class Sudoku(NamedTask):
    """Fill the blanks (`.`) of a sudoku with a single solution. 64 questions are symmetries of one another."""

    size: int = 9
    """Rows of the grid: 4, 6 or 9."""
    givens: int = 0
    """Cells that are given at least. A puzzle with fewer gets some more; without this it is minimal."""
    hints: float = 0.8
    """In training, each question has a random share of its blanks given, up to this: easy questions teach hard ones."""
    val_hints: list[float] = (0.0,)  # type: ignore[assignment]
    """The shares of blanks that are given in validation, in turn."""

    characters = "." + DIGITS[1:]
    block_size = 1024

    def make(self, count: int, validation: bool, rng: np.random.Generator) -> list[Question]:
        of_each = 1 if validation else 64
        puzzles, solutions = minimal_puzzles(self.size, -(-count // of_each), rng)
        puzzles, solutions = (np.repeat(side, of_each, axis=0)[:count] for side in (puzzles, solutions))
        puzzles, solutions = variants(puzzles, solutions, self.size, rng)
        puzzles = with_givens(puzzles, solutions, self.givens, rng)
        shares = rng.random(count) * self.hints
        if validation:
            shares = np.resize(np.array(self.val_hints), count)
        puzzles = with_hints(puzzles, solutions, shares, rng)
        order = np.arange(count) if validation else rng.permutation(count)
        return [
            (self.text(puzzles[i]), self.text(solutions[i]), {"hints": f"{shares[i]:.0%}"} if validation else {})
            for i in order.tolist()
        ]

    def text(self, cells: np.ndarray) -> str:
        return "".join(self.characters[cell] for cell in cells.tolist())

    def check(self) -> None:
        if self.size not in BOXES:
            raise ValueError(f"size must be {', '.join(map(str, BOXES))}, not {self.size}")
        if not 0 <= self.givens < self.size**2:
            raise ValueError(f"givens must be from 0 to {self.size**2 - 1}, not {self.givens}")
        for share in (self.hints, *self.val_hints):
            if not 0 <= share <= 1:
                raise ValueError(f"a share of hints is from 0 to 1, not {share}")


@dataclass(frozen=True)
class Maze(NamedTask):
    """Mark the way (`o`) from start to goal of a maze, whose rows follow one another."""

    size: int = 15
    """Rows and columns, odd."""
    least: int = 5
    """Rows of the smallest maze in training. Smaller mazes stand beside larger ones."""
    val_size: list[int] = ()  # type: ignore[assignment]
    """Sizes in validation, in turn; as `size` where it is left out."""

    characters = WALL + FREE + START + GOAL + WAY

    def make(self, count: int, validation: bool, rng: np.random.Generator) -> list[Question]:
        sizes = rng.choice(np.arange(self.least, self.size + 1, 2), count)
        if validation:
            sizes = np.resize(np.array(self.val_size or [self.size]), count)
        made = [(size, maze(size, rng)) for size in sizes.tolist()]
        return [
            (question, answer, {"size": size, "steps": 10 * (steps // 10)}) for size, (question, answer, steps) in made
        ]

    def check(self) -> None:
        for size in (self.size, self.least, *self.val_size):
            if not 5 <= size <= LARGEST_MAZE or size % 2 == 0:
                raise ValueError(f"a maze has an odd number of rows from 5 to {LARGEST_MAZE}, not {size}")
        if self.least > self.size:
            raise ValueError(f"least ({self.least}) is more than size ({self.size})")


@dataclass(frozen=True)
class Sequence(NamedTask):
    """Options of tasks on sequences."""

    length: int = 16
    """Elements of the longest question in training."""
    least: int = 1
    """Elements of the shortest."""
    val_length: list[int] = ()  # type: ignore[assignment]
    """Lengths in validation, in turn; as `length` where it is left out."""

    def make(self, count: int, validation: bool, rng: np.random.Generator) -> list[Question]:
        lengths = rng.integers(self.least, self.length + 1, count)
        if validation:
            lengths = np.resize(np.array(self.val_length or [self.length]), count)
        return [(*self.question(length, rng), {"length": length}) for length in lengths.tolist()]

    def question(self, length: int, rng: np.random.Generator) -> tuple[str, str]:
        raise NotImplementedError

    def check(self) -> None:
        if not all(1 <= length <= LONGEST for length in (self.least, self.length, *self.val_length)):
            raise ValueError(f"lengths are from 1 to {LONGEST:,}")
        if self.least > self.length:
            raise ValueError(f"least ({self.least}) is more than length ({self.length})")


@dataclass(frozen=True)
class Addition(Sequence):
    """Add two numbers of `length` digits. The sum has its units first, as one adds by hand."""

    characters = DIGITS + "+="

    def question(self, length: int, rng: np.random.Generator) -> tuple[str, str]:
        return addition(length, rng)


@dataclass(frozen=True)
class PrefixSums(Sequence):
    """Of each prefix of the question's digits, the sum modulo `modulus`."""

    modulus: int = 10
    """The digits are below this, from 2 to 10."""

    characters = DIGITS

    def question(self, length: int, rng: np.random.Generator) -> tuple[str, str]:
        return prefix_sums(length, self.modulus, rng)

    def check(self) -> None:
        super().check()
        if not 2 <= self.modulus <= 10:
            raise ValueError(f"modulus must be from 2 to 10, not {self.modulus}")


@dataclass(frozen=True)
class PrefixParity(Sequence):
    """Of each prefix of the question's bits, whether it has an odd number of ones."""

    characters = "01"

    def question(self, length: int, rng: np.random.Generator) -> tuple[str, str]:
        return prefix_sums(length, 2, rng)


@dataclass(frozen=True)
class ARC(NamedTask):
    """ARC-AGI: the output of a task's last input, after its demonstrations. Training has the public training tasks, with colours
    exchanged and grids turned; validation has the public evaluation tasks, as they are.
    """

    version: int = 1
    """1 or 2."""
    demonstrations: int = 2
    """The most that stand before a question."""

    characters = ARC_CHARACTERS
    block_size = 1024

    def make(self, count: int, validation: bool, rng: np.random.Generator) -> list[Question]:
        tasks = arc_tasks(self.version, validation)
        chosen = np.arange(count) % len(tasks) if validation else rng.integers(0, len(tasks), count)
        return [arc_question(tasks[i], self.demonstrations, validation, rng) for i in chosen.tolist()]

    def check(self) -> None:
        if self.version not in (1, 2):
            raise ValueError(f"version is 1 or 2, not {self.version}")
        if self.demonstrations < 0:
            raise ValueError(f"demonstrations must be at least 0, not {self.demonstrations}")


TASKS: dict[str, type[NamedTask]] = {
    "sudoku": Sudoku,
    "maze": Maze,
    "addition": Addition,
    "prefix_sums": PrefixSums,
    "prefix_parity": PrefixParity,
    "arc": ARC,
}


class Questions:
    """The questions of a named task, as `hrm_lm.data.endless.Task` wants them."""

    score = None

    def __init__(self, name: str):
        """name: with its options, `sudoku,size=6`. Raises UserError for an unknown task, option, or an impossible value."""
        name, *assignments = name.split(",") if "[" not in name else split_options(name)
        self.shown = f"data.dataset: task:{name}"
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=1)
            raise UserError(
                f"{self.shown}: no such task; {f'did you mean {close[0]}?' if close else 'known: ' + ', '.join(TASKS)}"
            )
        self.task = TASKS[name](**self.options(TASKS[name], assignments))
        try:
            self.task.check()
        except ValueError as error:
            raise UserError(f"{self.shown}: {error}") from None
        self.block_size = self.task.block_size
        self.tokenizer: Callable[[], Tokenizer] = lambda: SimpleTokenizer(self.task.characters)
        self.block = lru_cache(maxsize=16)(self._block)

    def options(self, kind: type[NamedTask], assignments: list[str]) -> dict[str, Any]:
        known = {field.name: field for field in fields(kind)}
        chosen: dict[str, Any] = {}
        for assignment in assignments:
            option, _, text = assignment.partition("=")
            if option not in known:
                raise UserError(f"{self.shown}: has no option {option!r}; it has {', '.join(known) or 'none'}")
            try:
                value = parse_yaml(text)
            except ValueError:
                raise UserError(f"{self.shown}: {assignment} is not valid YAML") from None
            default = known[option].default
            single = default if not isinstance(default, tuple) else (default or (0,))[0]
            values = value if isinstance(default, tuple) and isinstance(value, list) else [value]
            number = (int, float) if isinstance(single, float) else int
            if not values or any(not isinstance(v, number) or isinstance(v, bool) for v in values):
                what = "a number" if isinstance(single, float) else "an integer"
                several = ", or a list of such as [16,32]" if isinstance(default, tuple) else ""
                raise UserError(f"{self.shown}: {option} must be {what}{several}, not {text!r}")
            chosen[option] = tuple(values) if isinstance(default, tuple) else value
        return chosen

    def _block(self, block: int, part: int) -> list[Question]:
        rng = np.random.default_rng((block, part))
        return self.task.make(self.block_size, block == 0, rng)

    def entry(self, block: int, i: int) -> dict[str, Any]:
        question, answer, facets = self.block(block, i // self.block_size)[i % self.block_size]
        return {"question": question, "answer": answer, "facets": facets}

    def facets(self, entry: dict[str, Any]) -> Mapping[str, Any]:
        return entry["facets"]


def split_options(name: str) -> list[str]:
    """Parts between the commas that stand in no list."""
    parts, depth = [""], 0
    for character in name:
        depth += (character == "[") - (character == "]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def check_names(config: DataConfig) -> None:
    """Raises UserError where a task by name, of a mixture's too, has not that name or not those options. No question is made."""
    for name in (config.dataset, *(member.dataset for member in config.mixture.values())):
        kind, _, task = (name or "").partition(":")
        if kind == "task":
            Questions(task)


def build_task_dataset(config: DataConfig, seed: int) -> Splits:
    questions = Questions((config.dataset or "").partition(":")[2])
    return endless_dataset(config, questions, questions.tokenizer)
