"""Sudoku of 4x4, 6x6 and 9x9 cells, each with a single solution.

A SAT solver (the python-sat library) makes them. Of a full grid it is asked for another solution under the grid's cells as
assumptions. There is none, and the solver names the cells that its proof needed: these givens alone have a single solution.
Dropping givens one by one, with what each proof needed, leaves a minimal puzzle after some 30 questions to the solver, 9x9
with about 24 givens, in a few milliseconds.

A grid and its puzzle stand for many: digits, rows within a band, bands, columns and the diagonal may change places.
"""

from functools import cache
from itertools import combinations

import numpy as np

from hrm_lm.errors import UserError

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Rows and columns of a box, by the size of the grid."""


@cache
def rules(size: int) -> list[list[int]]:
    """The clauses of a full grid. Variable `size * cell + digit`, from 1, says that a cell (from 0) has a digit (from 1)."""
    rows, columns = BOXES[size]
    cells = np.arange(size * size).reshape(size, size)
    boxes = cells.reshape(size // rows, rows, size // columns, columns).swapaxes(1, 2).reshape(size, size)
    units = [*cells, *cells.T, *boxes]

    def variables(some: np.ndarray, digit: int) -> list[int]:
        return (size * some + digit).tolist()

    groups = [variables(np.full(size, cell), 0) for cell in range(size * size)]
    groups = [[first + digit for digit, first in enumerate(group, start=1)] for group in groups]
    groups += [variables(unit, digit) for unit in units for digit in range(1, size + 1)]
    return [clause for group in groups for clause in (group, *([-a, -b] for a, b in combinations(group, 2)))]


def minimal_puzzles(size: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Puzzles and their solutions, each (count, size * size) int8, 0 for a blank. No given of a puzzle can be spared.

    Raises UserError where python-sat is missing.
    """
    try:
        from pysat.solvers import Solver
    except ImportError:
        raise UserError("data.dataset: task:sudoku needs the python-sat library: pip install 'hrm-lm[tasks]'") from None
    puzzles, solutions = (np.zeros((count, size * size), np.int8) for _ in range(2))
    variables, apart = size**3, size**3
    with Solver(name="minisat22", bootstrap_with=rules(size)) as solver:

        def spared(givens: list[int]) -> list[int] | None:
            """Those of the givens that suffice for a single solution; None where they do not."""
            if solver.solve(assumptions=[apart, *givens]):
                return None
            needed = set(solver.get_core() or ())
            return [given for given in givens if given in needed]

        for n in range(count):
            solver.set_phases([int(v) for v in np.arange(1, variables + 1) * rng.choice([-1, 1], variables)])
            first_row = size * np.arange(size) + rng.permutation(size) + 1
            solver.solve(assumptions=first_row.tolist())
            solution = [v for v in solver.get_model()[:variables] if v > 0]
            apart += 1  # as an assumption, it asks for another solution
            solver.add_clause([-apart, *(-v for v in solution)])
            givens = spared(rng.permutation(solution).tolist())
            assert givens is not None
            givens, kept = rng.permutation(givens).tolist(), 0
            while kept < len(givens):
                fewer = spared(givens[:kept] + givens[kept + 1 :])
                if fewer is None:
                    kept += 1
                else:
                    givens = fewer
            solver.add_clause([-apart])
            solutions[n] = [(v - 1) % size + 1 for v in solution]
            for given in givens:
                puzzles[n, (given - 1) // size] = (given - 1) % size + 1
    return puzzles, solutions


def variants(
    puzzles: np.ndarray, solutions: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(N, size * size) each: of every puzzle another that is as hard, by a random symmetry."""
    rows, columns = BOXES[size]
    count = len(puzzles)

    def lines(within: int) -> np.ndarray:
        """(N, size): rows or columns in an order that keeps bands of `within` together."""
        bands = rng.permuted(np.tile(np.arange(size // within), (count, 1)), axis=1)
        inside = rng.permuted(np.tile(np.arange(within), (count, size // within, 1)), axis=2)
        return (within * bands[:, :, None] + inside).reshape(count, size)

    cells = (size * lines(rows)[:, :, None] + lines(columns)[:, None, :]).reshape(count, -1)
    if rows == columns:
        turned = cells.reshape(count, size, size).swapaxes(1, 2).reshape(count, -1)
        cells = np.where(rng.random((count, 1)) < 0.5, turned, cells)
    digits = np.concatenate(
        [np.zeros((count, 1), int), 1 + rng.permuted(np.tile(np.arange(size), (count, 1)), axis=1)], axis=1
    )
    number = np.arange(count)[:, None]
    puzzles, solutions = (digits[number, side[number, cells]].astype(np.int8) for side in (puzzles, solutions))
    return puzzles, solutions


def with_hints(puzzles: np.ndarray, solutions: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The puzzles with a share (N,) of their blanks given, each blank with that probability."""
    given = rng.random(puzzles.shape) < shares[:, None]
    return np.where((puzzles == 0) & given, solutions, puzzles)


def with_givens(puzzles: np.ndarray, solutions: np.ndarray, least: int, rng: np.random.Generator) -> np.ndarray:
    """The puzzles with at least so many givens: of those that have fewer, random blanks are given."""
    order = rng.random(puzzles.shape) + 2 * (puzzles != 0)  # givens first
    rank = (-order).argsort(axis=1).argsort(axis=1)
    return np.where(rank < least, solutions, puzzles)
