"""report.html: one self-contained page on a sweep."""

import html
import math
import statistics
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from hrm_lm.pages import figure_html, page_html, short, table_html
from hrm_lm.tuning.results import Trial
from hrm_lm.tuning.space import Sweep

SCALE = "Viridis"
STATUS_HELP = {
    "finished": "ran all its steps",
    "early_stopped": "ended by its own patience",
    "stopped": "stopped by the scheduler",
    "diverged": "its loss was no longer finite",
    "invalid": "its values are impossible together",
    "failed": "crashed",
    "unfinished": "interrupted",
}


def render(trials: list[Trial], best: Trial | None, sweep: Sweep, name: str) -> str:
    """The page, as text."""
    metric = sweep.tune.metric
    scored = [trial for trial in trials if trial.score is not None]
    counts = {s: sum(t.status == s for t in trials) for s in STATUS_HELP}
    tiles = "".join(
        f'<div class="tile" title="{STATUS_HELP[s]}"><b>{n}</b><span>{s.replace("_", " ")}</span></div>'
        for s, n in counts.items()
        if n
    )
    sections = [
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="lead">{_lead(trials, best, sweep)}</p>',
        f'<div class="tiles">{tiles}</div>',
    ]
    if scored:
        sections += ["<h2>Learning curves</h2>", figure_html(_curves(scored, best, metric))]
        sections += ["<h2>All trials at once</h2>", "<p>A line a trial; drag along an axis to pick some.</p>"]
        sections += [figure_html(_parallel(scored, sweep))]
        sections += [f"<h2>Effect of each value on {metric}</h2>"]
        sections += [
            f"<p>Best {metric} of each trial against its value; n is how many trials stand behind a value.</p>"
        ]
        sections += [
            '<div class="grid">',
            *(figure_html(_effect(scored, best, dotted, sweep)) for dotted in sweep.space),
            "</div>",
        ]
    sections += ["<h2>Trials</h2>", "<p>Click a heading to sort.</p>", _table(trials, best, sweep)]
    return page_html(name, sections)


def _lead(trials: list[Trial], best: Trial | None, sweep: Sweep) -> str:
    if best is None:
        return f"None of {len(trials)} trials succeeded; the table has each one's error."
    values = ", ".join(f"{_name(dotted)} <b>{short(value)}</b>" for dotted, value in best.params.items())
    return (
        f"Best of {len(trials)} trials: <b>trial {best.number}</b>, {sweep.tune.metric} <b>{best.score:.4f}</b> at step "
        f"{best.best_step} (exact match {best.val_exact_match:.3f}) with {values}."
    )


def _curves(trials: list[Trial], best: Trial | None, metric: str) -> go.Figure:
    figure = go.Figure()
    for trial, color in zip(trials, _colors(trials)):
        values = ", ".join(f"{_name(p)} {short(v)}" for p, v in trial.params.items())
        is_best = best is not None and trial.number == best.number
        figure.add_scatter(
            x=[row["step"] for row in trial.history],
            y=[row[metric] for row in trial.history],
            mode="lines+markers",
            name=f"{trial.number}",
            line=dict(color=color, width=4 if is_best else 1.5),
            marker=dict(size=8 if is_best else 4),
            hovertemplate=f"trial {trial.number} ({trial.status})<br>step %{{x}}<br>{metric} %{{y:.4f}}<br>{values}<extra></extra>",
        )
    positive = all(row[metric] > 0 for trial in trials for row in trial.history)
    figure.update_layout(
        xaxis_title="step",
        yaxis_title=metric,
        yaxis_type="log" if positive else "linear",
        legend_title="trial",
        height=440,
    )
    return figure


def _parallel(trials: list[Trial], sweep: Sweep) -> go.Figure:
    dimensions = [
        _axis(_name(dotted), [t.params[dotted] for t in trials], sweep.space[dotted][0] == "loguniform")
        for dotted in sweep.space
    ]
    scores = [trial.score for trial in trials]
    dimensions += [_axis("steps", [t.steps for t in trials]), _axis(sweep.tune.metric, scores, log=min(scores) > 0)]
    line = dict(color=_ranks(trials), colorscale=SCALE, cmin=0, cmax=max(len(trials) - 1, 1))
    figure = go.Figure(go.Parcoords(line=line, dimensions=dimensions, labelfont=dict(size=13)))
    figure.update_layout(height=380, margin=dict(l=70, r=70, t=60, b=30))
    return figure


def _axis(label: str, values: list[Any], log: bool = False) -> dict[str, Any]:
    """An axis of the parallel coordinates: numbers, logarithms of numbers, or categories."""
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        options = sorted(set(map(str, values)))
        return dict(
            label=label,
            values=[options.index(str(v)) for v in values],
            tickvals=list(range(len(options))),
            ticktext=options,
        )
    if log and max(values) > 1.5 * min(values):
        logs = [math.log10(v) for v in values]
        ticks = [min(logs) + (max(logs) - min(logs)) * i / 4 for i in range(5)]
        return dict(label=label, values=logs, tickvals=ticks, ticktext=[f"{10**t:.2g}" for t in ticks])
    options = sorted(set(values))
    few = dict(tickvals=options, ticktext=[short(v) for v in options]) if len(options) <= 6 else {}
    return dict(label=label, values=values, **few)


def _effect(trials: list[Trial], best: Trial | None, dotted: str, sweep: Sweep) -> go.Figure:
    kind, metric = sweep.space[dotted][0], sweep.tune.metric
    hover = f"trial %{{customdata}}<br>{_name(dotted)} %{{x}}<br>{metric} %{{y:.4f}}<extra></extra>"
    figure = go.Figure()
    discrete = kind in ("choice", "grid", "randint", "quniform") and len({str(t.params[dotted]) for t in trials}) <= 12
    x = [str(t.params[dotted]) if discrete else t.params[dotted] for t in trials]
    y = [t.score for t in trials]
    if discrete:
        options = sorted(set(x), key=lambda text: (float(text) if _is_number(text) else math.inf, text))
        for option in options:
            scores = [score for score, value in zip(y, x) if value == option]
            figure.add_scatter(
                x=[option], y=[statistics.median(scores)], mode="markers", hoverinfo="skip",
                marker=dict(symbol="line-ew", size=46, line=dict(width=3, color="#d1495b")),
            )  # fmt: skip
        counts = {option: x.count(option) for option in options}
        figure.update_xaxes(
            type="category", categoryorder="array", categoryarray=options,
            tickvals=options, ticktext=[f"{option}<br>n={counts[option]}" for option in options],
        )  # fmt: skip
    else:
        figure.update_xaxes(type="log" if kind == "loguniform" else "linear")
    figure.add_scatter(
        x=x, y=y, mode="markers", customdata=[t.number for t in trials], hovertemplate=hover,
        marker=dict(size=[13 if best and t.number == best.number else 8 for t in trials], color=_colors(trials), line=dict(width=1, color="white")),
    )  # fmt: skip
    title = f"{dotted} (n={len(trials)})" + (", bar: median" if discrete else "")
    figure.update_layout(title=dict(text=title, font=dict(size=14)), yaxis_title=metric, showlegend=False, height=320)
    figure.update_yaxes(type="log" if min(y) > 0 else "linear")
    return figure


def _table(trials: list[Trial], best: Trial | None, sweep: Sweep) -> str:
    metric = [sweep.tune.metric] if sweep.tune.metric not in ("val_loss", "val_exact_match") else []
    columns = ["trial", *map(_name, sweep.space), "status", "steps", *metric, "val_loss", "at step", "exact match"]
    columns += ["tokens/s", "seconds", "error"]
    rows = []
    for t in trials:
        cells = [t.number, *(t.params.get(p) for p in sweep.space), t.status, t.steps, *[t.score for _ in metric]]
        cells += [t.val_loss, t.best_step, t.val_exact_match, t.tokens_per_s, t.seconds, t.error]
        rows.append((cells, f"{'best ' if best and t.number == best.number else ''}{t.status}"))
    return table_html(columns, rows)


def _ranks(trials: list[Trial]) -> list[int]:
    """0 for the highest score: ranks spread colours evenly, whatever the outliers."""
    order = sorted(range(len(trials)), key=lambda i: -trials[i].score)
    return [order.index(i) for i in range(len(trials))]


def _colors(trials: list[Trial]) -> list[str]:
    return sample_colorscale(SCALE, [rank / max(len(trials) - 1, 1) * 0.92 for rank in _ranks(trials)])


def _name(dotted: str) -> str:
    return dotted.rsplit(".", 1)[-1]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
