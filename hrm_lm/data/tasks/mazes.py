"""Mazes without loops: there is a single way from start to goal, and the answer marks it.

A depth-first walk carves them (recursive backtracker), which leaves long winding ways.
"""

from itertools import pairwise

import numpy as np

WALL, FREE, START, GOAL, WAY = "#", " ", "S", "G", "o"


def maze(size: int, rng: np.random.Generator) -> tuple[str, str, int]:
    """The maze and its answer, row after row, and how many steps the way has. size: rows and columns, odd, at least 5.

    Start and goal are the ends of a longest way of the maze, so a size has mazes of like difficulty.
    """
    grid = np.full((size, size), WALL)
    cells = size // 2
    ways: dict[int, list[int]] = {0: []}
    stack, turns = [0], rng.random((cells * cells, 4)).argsort(axis=1).tolist()
    grid[1, 1] = FREE
    while stack:
        cell = stack[-1]
        row, column = divmod(cell, cells)
        for turn in turns[cell]:
            down, right = ((0, 1), (1, 0), (0, -1), (-1, 0))[turn]
            r, c = row + down, column + right
            if 0 <= r < cells and 0 <= c < cells and r * cells + c not in ways:
                ways[cell].append(r * cells + c)
                ways[r * cells + c] = [cell]
                grid[2 * row + 1 + down, 2 * column + 1 + right] = grid[2 * r + 1, 2 * c + 1] = FREE
                stack.append(r * cells + c)
                break
        else:
            stack.pop()
    start = farthest(0, ways)[-1]
    way = farthest(start, ways)
    answer = grid.copy()
    for a, b in pairwise(way):
        (ra, ca), (rb, cb) = divmod(a, cells), divmod(b, cells)
        answer[2 * ra + 1, 2 * ca + 1] = answer[ra + rb + 1, ca + cb + 1] = WAY
    for cell, sign in ((way[0], START), (way[-1], GOAL)):
        row, column = divmod(cell, cells)
        grid[2 * row + 1, 2 * column + 1] = answer[2 * row + 1, 2 * column + 1] = sign
    return "".join(grid.flat), "".join(answer.flat), 2 * (len(way) - 1)


def farthest(start: int, ways: dict[int, list[int]]) -> list[int]:
    """The way from `start` to a cell that is farthest from it."""
    before, order = {start: start}, [start]
    for cell in order:
        for other in ways[cell]:
            if other not in before:
                before[other] = cell
                order.append(other)
    way = [order[-1]]
    while way[-1] != start:
        way.append(before[way[-1]])
    return way[::-1]
