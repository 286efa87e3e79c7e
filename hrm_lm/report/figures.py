"""Curves of runs as figures, and what their tables share."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative, sample_colorscale

from hrm_lm.report.runs import Run

POINTS = 1000
"""Of a curve, at most: a page holds all of them as text."""
PERCENT = ("padding", "mfu", "val_exact_match", "val_score")
TITLES = {
    "loss": "Loss",
    "val_loss": "Validation loss",
    "val_exact_match": "Exact match",
    "val_score": "Score",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Tokens per second",
    "padding": "Padding",
    "mfu": "Use of the GPU's matrix units (MFU)",
    "save_ms": "Waiting for each checkpoint (ms)",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    name: str
    points: Mapping[int, float] | Mapping[float, float]
    """y by x, of steps for example."""
    color: str
    dots: bool = False
    """Whether each point shows: there are few of them."""


def chart(
    lines: Iterable[Line],
    title: str,
    metric: str,
    x: str = "step",
    legend: bool = True,
    marks: Mapping[float, str] | None = None,
    height: int = 320,
) -> go.Figure:
    """metric: what the lines are of. marks: where a dotted line stands, and its colour."""
    percent = metric in PERCENT
    figure, values = go.Figure(), []
    for line in lines:
        points = thinned(line.points)
        if not points:
            continue
        values += [y for _, y in points]
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            name=line.name,
            mode="lines+markers" if line.dots or len(points) == 1 else "lines",
            line=dict(color=line.color, width=2 if line.dots else 1.5),
            marker=dict(size=6),
            hovertemplate=f"{line.name}<br>{x} %{{x:,}}<br>%{{y:{'.2%' if percent else '.5g'}}}<extra></extra>",
        )
    shapes = [
        dict(type="line", x0=place, x1=place, y0=0, y1=1, yref="paper", line=dict(color=color, width=1, dash="dot"))
        for place, color in (marks or {}).items()
    ]
    spread = max(values) / min(values) if values and min(values) > 0 else 0
    y: dict[str, Any] = dict(rangemode="tozero" if percent or metric == "tokens_per_s" else "normal")
    if percent:
        y["tickformat"] = ".3~%"
    elif spread > 100 and metric != "lr":
        y |= dict(type="log", dtick=1)
    figure.update_layout(
        title=dict(text=title, font=dict(size=15), x=0.02, xanchor="left"),
        xaxis=dict(title=x, rangemode="tozero"),
        yaxis=y,
        shapes=shapes,
        showlegend=legend,
        legend=dict(orientation="h", x=1, xanchor="right", y=1.02, yanchor="bottom"),
        hovermode="closest",
        margin=dict(l=64, r=20, t=56, b=48),
        height=height,
    )
    return figure


def thinned(points: Mapping[Any, float], most: int = POINTS) -> list[tuple[float, float]]:
    """In order of x, without what is not finite. Of many points the least and the greatest of each stretch are left, so
    that spikes stay.
    """
    ordered = [(x, points[x]) for x in sorted(points) if math.isfinite(points[x])]
    if len(ordered) <= most:
        return ordered
    width = math.ceil(2 * len(ordered) / most)
    stretches = [ordered[i : i + width] for i in range(0, len(ordered), width)]
    kept = {choose(stretch, key=lambda point: point[1]) for stretch in stretches for choose in (min, max)}
    return sorted(kept | {ordered[0], ordered[-1]})


def by_other(run: Run, name: str, other: str) -> dict[float, float]:
    """The curve `name` over what the run had used of `other` at each step, `tokens` or `seconds`."""
    axis = run.curve(other)
    return {axis[step]: value for step, value in run.curve(name).items() if step in axis}


def colors(count: int) -> Sequence[str]:
    return (
        qualitative.D3[:count]
        if count <= 10
        else sample_colorscale("Turbo", [0.05 + 0.9 * i / (count - 1) for i in range(count)])
    )


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def moment(time: float) -> str:
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC"
