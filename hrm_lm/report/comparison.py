"""One self-contained page on several runs: their results, what their configs differ in, their curves over one another."""

import html
from collections.abc import Sequence
from typing import Any

from hrm_lm.pages import figure_html, page_html, table_html
from hrm_lm.report.figures import TITLES, Line, by_other, chart, colors
from hrm_lm.report.runs import Run, differing_fields, plain

AXES = {"step": "step", "tokens": "tokens", "seconds": "seconds of training"}
CURVES = ("loss", "val_exact_match", "val_score", "tokens_per_s", "lr", "grad_norm", "padding", "mfu")


def comparison_page(runs: Sequence[Run]) -> str:
    """The page, as text. The runs' names must differ."""
    title = f"{len(runs)} runs side by side"
    shades = dict(zip([run.name for run in runs], colors(len(runs))))
    chips = "".join(
        f'<span class="chip"><i style="background:{shades[run.name]}"></i>{html.escape(run.name)}</span>'
        for run in runs
    )
    sections = [f"<h1>{title}</h1>", f'<div class="chips">{chips}</div>']
    sections += ["<h2>Results</h2>", "<p>Click a heading to sort.</p>", _results(runs)]
    sections += ["<h2>What differs</h2>", _differences(runs)]
    figures = _figures(runs, shades)
    sections += ["<h2>Curves</h2>", '<div class="grid">', *map(figure_html, figures), "</div>"]
    return page_html(title, sections)


def _results(runs: Sequence[Run]) -> str:
    lowest = min((run.best["val_loss"] for run in runs if run.best), default=None)
    columns = ["run", "status", "step", "best val_loss", "at step", "exact match"]
    has_score, has_mfu = (any(name in run.written.curves for run in runs) for name in ("val_score", "mfu"))
    columns += ["score"] * has_score + ["tokens/s"] + ["MFU"] * has_mfu + ["seconds", "workers"]
    rows = []
    for run in runs:
        best, environment = run.best, run.environment
        cells: list[Any] = [run.name, run.status, max(run.written.step, run.result.get("step", 0))]
        cells += [best.get("val_loss"), best.get("step"), best.get("val_exact_match")]
        cells += [best.get("val_score")] * has_score + [run.tokens_per_s] + [run.last("mfu")] * has_mfu
        workers = f"{environment['workers']} × {environment['device']}" if environment else None
        cells += [run.seconds, workers]
        rows.append((cells, "best" if best and best["val_loss"] == lowest else run.status))
    return table_html(columns, rows, "named")


def _differences(runs: Sequence[Run]) -> str:
    """A row for each field of the config, version or kind of hardware that is not the same in all runs."""
    fields = differing_fields(list(runs))
    names = dict.fromkeys(name for run in runs for name in run.environment)
    others = {name: [run.environment.get(name, "") for run in runs] for name in names}
    differing = fields | {name: row for name, row in others.items() if any(value != row[0] for value in row)}
    if not differing:
        return "<p>Nothing: config, versions and hardware are the same.</p>"
    rows = [([name, *map(plain, values)], "") for name, values in differing.items()]
    return table_html(["", *(run.name for run in runs)], rows, "text")


def _figures(runs: Sequence[Run], shades: dict[str, str]) -> list[Any]:
    figures = []
    for other, label in AXES.items():
        lines = [
            Line(
                name=run.name,
                points=run.curve("val_loss") if other == "step" else by_other(run, "val_loss", other),
                color=shades[run.name],
                dots=True,
            )
            for run in runs
        ]
        if any(line.points for line in lines):
            figures.append(chart(lines, f"Validation loss by {label}", "val_loss", x=label, legend=False))
    datasets = dict.fromkeys(
        n for run in runs for n in run.written.curves if n.startswith(("val_loss/", "val_exact_match/"))
    )
    for name in [*CURVES, *datasets]:
        lines = [
            Line(name=run.name, points=run.curve(name), color=shades[run.name], dots=name.startswith("val_"))
            for run in runs
        ]
        if any(line.points for line in lines):
            metric, _, dataset = name.partition("/")
            title = TITLES[metric] + (f" on {dataset}" if dataset else "")
            figures.append(chart(lines, title, metric, legend=False))
    return figures
