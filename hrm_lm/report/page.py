"""report.html: one self-contained page on a run."""

import html
from collections.abc import Iterable
from typing import Any

import yaml

from hrm_lm.filesystem import without_secrets
from hrm_lm.pages import figure_html, page_html, short, table_html
from hrm_lm.report.figures import TITLES, Line, chart, colors, duration, moment
from hrm_lm.report.runs import Run, changed_fields, plain

BLUE, ORANGE, GREEN = "#1f77b4", "#ff7f0e", "#2ca02c"
RESTART, ROLLBACK = "#999999", "#d62728"
NOT_SHOWN = ("tokens", "seconds", "samples_per_s")
"""The first two are axes of comparisons, the last goes as tokens_per_s does."""
LEARNING = ("lr", "grad_norm")
SPEED = ("tokens_per_s", "padding", "mfu", "save_ms")
COUNTS = ("skipped", "rollbacks", "spikes")
ANSWER_STEPS = 6
"""Validations whose answers are shown, at most: the first, the last and some between."""


def run_page(run: Run) -> str:
    """The page, as text."""
    curves, marks = run.written.curves, _marks(run)
    sections = [f"<h1>{html.escape(run.name)}</h1>", f'<p class="lead">{_lead(run)}</p>', _tiles(run)]
    if not curves:
        sections += ["<p>The run has not logged any numbers yet.</p>"]
    else:
        sections += ["<h2>Curves</h2>", _legend_of_marks(run)]
        losses = [Line(name="loss", points=run.curve("loss"), color=BLUE)]
        losses += [Line(name="val_loss", points=run.curve("val_loss"), color=ORANGE, dots=True)]
        sections += [_grid([chart(losses, "Loss", "loss", marks=marks, height=400)])]
        scores = {"val_exact_match": ORANGE, "val_score": GREEN}
        matches = [Line(name=n, points=curves[n], color=c, dots=True) for n, c in scores.items() if n in curves]
        figures = [chart(matches, "Right answers", "val_exact_match", marks=marks)] if matches else []
        sections += [_grid([*figures, *_singles(run, LEARNING)])]
        sections += ["<h2>Throughput</h2>", _grid(_singles(run, SPEED))]
        if by_dataset := _by_dataset(run):
            sections += ["<h2>Validation by data set</h2>", _grid(by_dataset)]
        if counts := [n for n in COUNTS if max(run.curve(n).values(), default=0) > 0]:
            lines = [Line(name=n, points=curves[n], color=c) for n, c in zip(counts, colors(3))]
            sections += [
                "<h2>Skipped steps, rollbacks and spikes</h2>",
                _grid([chart(lines, "So far", "skipped", marks=marks)]),
            ]
        shown = {"loss", "val_loss", *scores, *LEARNING, *SPEED, *COUNTS, *NOT_SHOWN}
        if rest := [n for n in curves if n not in shown and "/" not in n]:
            sections += ["<h2>More numbers</h2>", _grid(_singles(run, rest))]
    sections += _answers(run)
    sections += ["<h2>Config</h2>", *_config(run)]
    sections += ["<h2>Versions and machine</h2>", *_environment(run)]
    return page_html(run.name, sections)


def _lead(run: Run) -> str:
    steps, best = run.config.get("train.steps"), run.best
    reached = max(run.written.step, run.result.get("step", 0))
    states = {
        "finished": "Finished",
        "early_stopped": "Ended early, as it got no better,",
        "diverged": "Diverged",
        "failed": "Failed",
        "unfinished": "Not finished:",
    }
    lead = f"{states.get(run.status, run.status)} at step <b>{reached:,}</b>"
    lead += f" of {steps:,}" if steps and reached != steps else ""
    if best:
        match = f", exact match <b>{best['val_exact_match']:.3f}</b>" if "val_exact_match" in best else ""
        lead += f". Best <b>val_loss {best['val_loss']:.4f}</b>{match} at step {best['step']:,.0f}"
    if run.status == "unfinished" and run.written.time:
        lead += f". Last heard of on {moment(run.written.time)}"
    error = f'</p><p class="error">{html.escape(without_secrets(run.result["error"]))}' if "error" in run.result else ""
    return f"{lead}.{error}"


def _tiles(run: Run) -> str:
    workers, restarts = run.environment.get("workers"), len(run.written.attempts) - 1
    tiles = {
        "tokens/s": short(run.tokens_per_s) if run.tokens_per_s else None,
        "tokens": _amount(run.last("tokens")),
        "of training": duration(run.seconds) or None,
        "MFU": f"{run.last('mfu'):.1%}" if "mfu" in run.written.curves else None,
        f"worker{'s' * (workers != 1)}": workers,
        f"restart{'s' * (restarts != 1)}": restarts if restarts > 0 else None,
    }
    cells = [f'<div class="tile"><b>{v}</b><span>{k}</span></div>' for k, v in tiles.items() if v is not None]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _amount(count: float | None) -> str | None:
    if count is None:
        return None
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def _marks(run: Run) -> dict[float, str]:
    restarts = dict.fromkeys((float(attempt["step"]) for attempt in run.written.attempts[1:]), RESTART)
    return restarts | dict.fromkeys(map(float, run.written.rollbacks), ROLLBACK)


def _legend_of_marks(run: Run) -> str:
    kinds = [(RESTART, "restart", len(run.written.attempts) - 1), (ROLLBACK, "rollback", len(run.written.rollbacks))]
    texts = [
        f'<span style="color:{color}">┊</span> {count} {name}{"s" * (count > 1)}, at the step that the run went on from'
        for color, name, count in kinds
        if count > 0
    ]
    return f"<p>{'; '.join(texts)}</p>" if texts else ""


def _singles(run: Run, names: Iterable[str]) -> list[Any]:
    """A figure of each of these curves that there is."""
    figures = []
    for name in names:
        if points := run.curve(name):
            line = Line(name=name, points=points, color=BLUE, dots=len(points) <= 30)
            figures.append(chart([line], TITLES.get(name, name), name, legend=False, marks=_marks(run)))
    return figures


def _by_dataset(run: Run) -> list[Any]:
    figures = []
    for metric in ("val_loss", "val_exact_match", "val_score"):
        names = [name for name in run.written.curves if name.startswith(f"{metric}/")]
        lines = [
            Line(name=name.partition("/")[2], points=run.curve(name), color=color, dots=True)
            for name, color in zip(names, colors(len(names)))
        ]
        if lines:
            figures.append(chart(lines, TITLES[metric], metric, marks=_marks(run)))
    return figures


def _grid(figures: Iterable[Any]) -> str:
    return f'<div class="grid">{"".join(map(figure_html, figures))}</div>'


def _answers(run: Run) -> list[str]:
    by_step = run.written.texts.get("answers", {})
    if not by_step:
        return []
    steps = sorted(by_step)
    every = max((len(steps) - 1) / (ANSWER_STEPS - 1), 1)
    steps = sorted({steps[round(len(steps) - 1 - i * every)] for i in range(min(ANSWER_STEPS, len(steps)))})
    cards = []
    for sample in by_step[steps[-1]]:
        rows = []
        for step in steps:
            for then in by_step[step]:
                if (then["prompt"], then["expected"]) == (sample["prompt"], sample["expected"]):
                    kind, sign = ("right", " ✓") if then["right"] else ("wrong", "")
                    rows.append(
                        f'<tr class="{kind}"><td class="label">step {step:,}</td><td>{_text(then["answer"])}{sign}</td></tr>'
                    )
        dataset = f'<span class="note">{html.escape(sample["dataset"])}</span>' if "dataset" in sample else ""
        cards.append(
            f'<div class="answers">{dataset}<table><tr><td class="label">prompt</td><td>{_text(sample["prompt"])}</td></tr>'
            f'<tr><td class="label">expected</td><td>{_text(sample["expected"])}</td></tr>{"".join(rows)}</table></div>'
        )
    told = "<p>Held-out prompts, always the same, answered greedily at validations.</p>"
    return ["<h2>Sample answers</h2>", told, f'<div class="grid">{"".join(cards)}</div>']


def _text(text: str) -> str:
    return f"<code>{html.escape(text)}</code>" if text else '<span class="note">nothing</span>'


def _config(run: Run) -> list[str]:
    changed = changed_fields(run.config)
    rows = [([path, plain(value), plain(default)], "") for path, (value, default) in changed.items()]
    whole = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    table = (
        table_html(["field", "value", "default"], rows, "text") if rows else "<p>All fields are at their defaults.</p>"
    )
    return [table, f"<details><summary>All {len(run.config)} fields</summary><pre>{html.escape(whole)}</pre></details>"]


def _environment(run: Run) -> list[str]:
    if not run.environment:
        return ["<p>Not known: trials do not tell, nor do runs of earlier versions.</p>"]
    rows = [([name, plain(value)], "") for name, value in run.environment.items()]
    sections = [table_html(["", "when last started"], rows, "text")]
    attempts = run.written.attempts
    if len(attempts) > 1:
        names = list(dict.fromkeys(name for attempt in attempts for name in attempt if name not in ("step", "time")))
        varied = [name for name in names if any(a.get(name) != attempts[0].get(name) for a in attempts)]
        cells = [
            [i + 1, moment(a["time"]), a["step"], *(plain(a.get(name, "")) for name in varied)]
            for i, a in enumerate(attempts)
        ]
        table = table_html(["start", "time", "from step", *varied], [(row, "") for row in cells], "text")
        sections += ["<h3>Starts of the workers</h3>", table]
    return sections
