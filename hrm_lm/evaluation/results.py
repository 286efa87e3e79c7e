"""Scores to results: sums over samples, their intervals by bootstrap, and the layout of lm-evaluation-harness.

A document is what `lm_eval` writes as results, with the same keys, for one cycle count. The values of a facet are sub-tasks,
and a mixture is a group. Two keys are added: `h_cycles` and `l_cycles`, and `intervals` with the 95 % interval of each score.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hrm_lm.config import Cycles
from hrm_lm.evaluation.scoring import Scores, Slice
from hrm_lm.evaluation.tasks import Task, in_order

RESAMPLES = 1000
"""Of the bootstrap, which draws as many samples as there are, with replacement."""
SEED = 0
LEVEL = 0.95
AT_ONCE = 1 << 22
"""Draws that are held at a time."""
VERSION = 1
"""Of the tasks' definitions, as `lm_eval` tells it; a change of what a task asks or counts raises it."""
MEAN_CYCLES = "mean_h_cycles"
"""A score of `--h_cycles auto`: the H-cycles that samples took."""
HIGHER_IS_BETTER = {"val_loss": False, MEAN_CYCLES: False}
"""Of the scores; all others are better when higher."""


@dataclass
class Answered:
    """What came of a task at one cycle count; arrays are in the order of its samples."""

    loss: np.ndarray
    labels: np.ndarray
    right: np.ndarray
    answers: list[str | None]
    verdicts: np.ndarray | None
    """(n,), where the task has a verdict."""
    cycles: np.ndarray | None
    """(n,): the H-cycles of each, where samples halt."""

    @classmethod
    def of(cls, task: Task, done: Sequence[tuple[Slice, Scores]]) -> "Answered":
        """The task's samples, from slices that hold each of them once."""
        order = np.argsort(np.concatenate([piece.indices for piece, _ in done]))
        loss, labels, right = (
            np.concatenate([getattr(scores, name) for _, scores in done])[order] for name in ("loss", "labels", "right")
        )
        said = [answer for _, scores in done for answer in scores.answers]
        answers = [said[i] for i in order.tolist()]
        verdict = task.split.verdict
        verdicts = (
            None if verdict is None else np.array([verdict(i, a or "") for i, a in enumerate(answers)], dtype=float)
        )
        taken = [scores.cycles for _, scores in done if scores.cycles is not None]
        cycles = np.concatenate(taken)[order].astype(float) if taken else None
        return cls(loss, labels, right.astype(float), answers, verdicts, cycles)

    def ratios(self, metric: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Each score as two arrays (n,): it is the sum of the first over the sum of the second, over any of the samples."""
        one = np.ones_like(self.right)
        scores = {"exact_match": (self.right, one), "val_loss": (self.loss, self.labels)}
        scores |= {} if self.cycles is None else {MEAN_CYCLES: (self.cycles, one)}
        return scores | ({metric: (self.verdicts, one)} if self.verdicts is not None else {})


@dataclass(frozen=True)
class Score:
    value: float
    stderr: float
    low: float
    high: float
    """low, high: of the 95 % interval."""


Scored = dict[str, Score]
"""A score by its name."""


@dataclass(frozen=True)
class Line:
    """The scores of some samples at every cycle count: of a task, of a value of a facet, or of a mixture."""

    name: str
    task: str
    """The task that it is of; "" for a mixture."""
    samples: int
    scores: list[Scored]
    """At each cycle count."""
    headline: str
    """The score that says how good the answers are."""
    facet: str = ""
    value: str = ""

    @property
    def alias(self) -> str:
        return f"{self.facet}={self.value}" if self.facet else self.name


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation."""

    checkpoint: str
    """Where it is, for a reader."""
    step: int
    cycles: list[Cycles]
    trained: Cycles
    tasks: list[Task]
    answered: list[list[Answered]]
    """For each task, at each cycle count."""
    config: dict[str, Any]
    """Of the model and of how it was run, as `lm_eval` tells it."""
    date: float
    seconds: float

    @cached_property
    def lines(self) -> list[Line]:
        """Each task's line, with those of its facets behind it, and before the first member of a mixture that of the mixture."""
        lines, groups = [], {line.name: line for line in group_lines(self.tasks, self.answered)}
        for task, answered in zip(self.tasks, self.answered, strict=True):
            lines += [groups.pop(task.member_of)] if task.member_of in groups else []
            lines += task_lines(task, answered)
        return lines

    @property
    def points(self) -> list[tuple[float, str]]:
        """Of each cycle count, the H-cycles that samples took in the mean, and their name."""
        means = [
            cycles.h if cycles.halt is None else np.concatenate([one[which].cycles for one in self.answered]).mean()
            for which, cycles in enumerate(self.cycles)
        ]
        names = [
            str(cycles.h) if cycles.halt is None else f"auto ({mean:.1f})" for cycles, mean in zip(self.cycles, means)
        ]
        return list(zip(map(float, means), names))

    @property
    def shown(self) -> int:
        """The number of the cycle count whose answers are shown: as trained, else the first."""
        return self.cycles.index(self.trained) if self.trained in self.cycles else 0


def task_lines(task: Task, answered: list[Answered]) -> list[Line]:
    every = np.arange(len(task.split))
    lines = [Line(task.name, task.name, len(every), scored(answered, task.metric, every), task.headline)]
    for facet, values in task.facets.items():
        for value in in_order(values):
            chosen = every[values == value]
            scores = scored(answered, task.metric, chosen)
            name = f"{task.name}/{facet}={value}"
            lines.append(Line(name, task.name, len(chosen), scores, task.headline, facet, value))
    return lines


def group_lines(tasks: Sequence[Task], answered: Sequence[list[Answered]]) -> list[Line]:
    """A line for each mixture: its members' samples together, with the scores that all of them have."""
    lines = []
    for group in dict.fromkeys(task.member_of for task in tasks if task.member_of):
        members = [number for number, task in enumerate(tasks) if task.member_of == group]
        together = []
        for of_members in zip(*(answered[number] for number in members), strict=True):
            loss, labels, right = (
                np.concatenate([getattr(one, name) for one in of_members]) for name in ("loss", "labels", "right")
            )
            taken = [one.cycles for one in of_members if one.cycles is not None]
            together.append(Answered(loss, labels, right, [], None, np.concatenate(taken) if taken else None))
        count = len(together[0].loss)
        scores = scored(together, "score", np.arange(count))
        lines.append(Line(group, "", count, scores, "exact_match"))
    return lines


def scored(answered: Sequence[Answered], metric: str, chosen: np.ndarray) -> list[Scored]:
    """The scores of the samples `chosen` (m,) at each cycle count. All are resampled alike, so that they can be compared."""
    ratios = [one.ratios(metric) for one in answered]
    columns = [side[chosen] for scores in ratios for pair in scores.values() for side in pair]
    values = iter(bootstrap(np.stack(columns, axis=1)))
    return [{name: next(values) for name in scores} for scores in ratios]


def bootstrap(columns: np.ndarray) -> list[Score]:
    """A score of each two of the columns (m, 2 k): the sum of the first over that of the second, as it is, and over
    resamples of the m samples.
    """
    rng, count = np.random.default_rng(SEED), len(columns)
    sums = []
    step = max(min(AT_ONCE // count, RESAMPLES), 1)
    for _ in range(0, RESAMPLES, step):
        drawn = rng.integers(count, size=(step, count)) + np.arange(step)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=step * count).reshape(step, count)
        sums.append(times.astype(float) @ columns)
    resampled, whole = np.concatenate(sums)[:RESAMPLES], columns.sum(axis=0)
    scores = []
    for first in range(0, columns.shape[1], 2):
        ratio = resampled[:, first] / np.maximum(resampled[:, first + 1], 1e-12)
        low, high = np.quantile(ratio, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        value = whole[first] / max(whole[first + 1], 1e-12)
        scores.append(Score(float(value), float(ratio.std(ddof=1)), float(low), float(high)))
    return scores


# --- what is written ---------------------------------------------------------------------------------------------------


def documents(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The results at each cycle count."""
    return [document(evaluation, which) for which in range(len(evaluation.cycles))]


def document(evaluation: Evaluation, which: int) -> dict[str, Any]:
    cycles, lines = evaluation.cycles[which], evaluation.lines
    mixtures = {
        line.name: [t.name for t in evaluation.tasks if t.member_of == line.name] for line in lines if not line.task
    }
    subtasks = {t.name: [line.name for line in lines if line.task == t.name and line.facet] for t in evaluation.tasks}
    results = {line.name: numbers(line, which) for line in lines}
    counts = {line.name: {"original": line.samples, "effective": line.samples} for line in lines}
    counts |= {task.name: {"original": task.original, "effective": len(task.split)} for task in evaluation.tasks}
    configs = {
        task.name: {
            "task": task.name,
            **task.config,
            "output_type": "generate_until",
            "repeats": 1,
            "generation_kwargs": {"do_sample": False, "max_gen_toks": task.max_new_tokens},
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": HIGHER_IS_BETTER.get(name, True)}
                for name in next(line for line in lines if line.name == task.name).scores[which]
            ],
        }
        for task in evaluation.tasks
    }
    return {
        "h_cycles": cycles.name,
        "l_cycles": cycles.l,
        "step": evaluation.step,
        "results": results,
        **({"groups": {name: results[name] for name in mixtures}} if mixtures else {}),
        "group_subtasks": mixtures | subtasks,
        "configs": configs,
        "versions": {line.name: VERSION for line in lines},
        "n-shot": {task.name: task.config.get("num_fewshot", 0) for task in evaluation.tasks},
        "higher_is_better": {
            line.name: {name: HIGHER_IS_BETTER.get(name, True) for name in line.scores[which]} for line in lines
        },
        "n-samples": counts,
        "intervals": {
            line.name: {f"{name},none": [score.low, score.high] for name, score in line.scores[which].items()}
            for line in lines
        },
        "config": evaluation.config
        | {"model_args": f"checkpoint={evaluation.checkpoint},h_cycles={cycles.name},l_cycles={cycles.l}"},
        "model_source": "hrm_lm",
        "model_name": evaluation.checkpoint,
        "date": evaluation.date,
        "total_evaluation_time_seconds": f"{evaluation.seconds:.2f}",
    }


def numbers(line: Line, which: int) -> dict[str, Any]:
    """A line as `lm_eval` has it."""
    found: dict[str, Any] = {"alias": line.alias, "name": line.name, "sample_len": line.samples}
    for name, score in line.scores[which].items():
        found |= {f"{name},none": score.value, f"{name}_stderr,none": score.stderr}
    return found


def samples(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Each sample of each task at each cycle count, with its scores and, where there is one, its answer."""
    for task, answered in zip(evaluation.tasks, evaluation.answered, strict=True):
        tokenizer = task.tokenizer
        texts = [tuple(map(tokenizer.decode, task.split[i][:2])) for i in range(len(task.split))]
        for cycles, one in zip(evaluation.cycles, answered, strict=True):
            for i, (prompt, response) in enumerate(texts):
                row = {"task": task.name, "doc_id": i, "h_cycles": cycles.name, "l_cycles": cycles.l}
                row |= {"prompt": prompt, "target": response, "answer": one.answers[i]}
                row["facets"] = {name: values[i] for name, values in task.facets.items() if values[i]}
                row |= {"exact_match": one.right[i], "val_loss": one.loss[i] / max(one.labels[i], 1)}
                yield row | ({task.metric: one.verdicts[i]} if one.verdicts is not None else {})


def table(evaluation: Evaluation) -> str:
    """The scores as text, a row for each line and cycle count."""
    names = list(dict.fromkeys(name for line in evaluation.lines for scores in line.scores for name in scores))
    rows = [["task", "samples", "h_cycles", *names]]
    for line in evaluation.lines:
        for which, cycles in enumerate(evaluation.cycles):
            first = ["  " * bool(line.facet) + line.alias, f"{line.samples:,}"] if not which else ["", ""]
            scores = line.scores[which]
            rows.append(
                [*first, str(cycles.name), *(interval(scores[name]) if name in scores else "" for name in names)]
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows
    )


def interval(score: Score) -> str:
    return f"{score.value:.4f} [{score.low:.4f}, {score.high:.4f}]"
