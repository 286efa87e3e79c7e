"""report.html: one self-contained page on an evaluation, with its pictures, its scores, and answers to look at."""

import html
import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import plotly.graph_objects as go
from plotly.colors import qualitative, sample_colorscale

from hrm_lm.evaluation.results import LEVEL, RESAMPLES, Answered, Evaluation, Line, Score
from hrm_lm.evaluation.tasks import Task
from hrm_lm.pages import figure_html, page_html, table_html

SHOWN = 12
"""Right answers that are shown of a task, and as many wrong ones."""
LONGEST = 600
"""Characters of a text that are shown; what lies in between its beginning and its end is left out."""
MOST_LINES = 16
"""Values of a facet that a picture shows; a table has all of them."""

STYLE = """<style>
.scores td:first-child, .scores th:first-child { text-align: left; } .scores td, .scores th { white-space: nowrap; }
.scores td:last-child, .scores th:last-child { text-align: right; min-width: 0; } .scores tr.part td:first-child { padding-left: 28px; color: #555; }
.said td, .said th { text-align: left; vertical-align: top; overflow-wrap: anywhere; cursor: default; } .said td { white-space: pre-wrap; min-width: 120px; }
.said td:first-child { width: 50%; } .said tr.right td:last-child { color: #1a7f37; } .said tr.wrong td:last-child { color: #a33; }
h3 { font-size: 16px; margin: 22px 0 6px; }
</style>"""


def page(evaluation: Evaluation) -> str:
    """The page, as text."""
    name = evaluation.checkpoint.rstrip("/").rpartition("/")[2]
    lines, cycles = evaluation.lines, evaluation.points
    whole = [line for line in lines if not line.facet]
    sections = [
        STYLE,
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="lead">{lead(evaluation)}</p>',
        tiles(evaluation, whole),
    ]
    sections += ["<h2>Accuracy</h2>" if len(cycles) == 1 else "<h2>Accuracy against cycles</h2>"]
    sections += [
        f"<p>Bars are {LEVEL:.0%} intervals by bootstrap over samples ({RESAMPLES:,} resamples).</p>",
        figure_html(over_tasks(whole, cycles, evaluation.trained.h)),
    ]
    by_facet = [
        list(some) for _, some in groupby((line for line in lines if line.facet), lambda line: (line.task, line.facet))
    ]
    if by_facet:
        sections += ["<h2>By difficulty and subject</h2>", '<div class="grid">']
        sections += [figure_html(of_facet(some, cycles)) for some in by_facet]
        sections += ["</div>"]
    sections += [
        "<h2>Scores</h2>",
        "<p>Click a heading to sort.</p>",
        '<div class="scores">',
        scores(lines, cycles),
        "</div>",
    ]
    sections += ["<h2>Answers</h2>", f"<p>Greedy answers at {cycles[evaluation.shown][1]} H-cycles.</p>"]
    for task, answered in zip(evaluation.tasks, evaluation.answered, strict=True):
        sections += answers(task, answered[evaluation.shown])
    return page_html(f"Evaluation of {name}", sections)


def lead(evaluation: Evaluation) -> str:
    count = sum(len(task.split) for task in evaluation.tasks)
    tasks = "1 task" if len(evaluation.tasks) == 1 else f"{len(evaluation.tasks)} tasks"
    counts = ", ".join(name for _, name in evaluation.points)
    return (
        f"<b>{html.escape(evaluation.checkpoint)}</b> at step {evaluation.step:,}, on {count:,} samples of {tasks}, "
        f"with {counts} H-cycles (trained: {evaluation.trained.h}). Answers are greedy."
    )


def tiles(evaluation: Evaluation, whole: Sequence[Line]) -> str:
    """The headline of each task, at the cycle count that is shown."""
    made = []
    for line in whole[:12]:
        score = line.scores[evaluation.shown][line.headline]
        what = f"{words(line.headline)}, {line.name}"
        made.append(f'<div class="tile"><b>{score.value:.3f}</b><span>{html.escape(what)}</span></div>')
    return f'<div class="tiles">{"".join(made)}</div>'


def words(name: str) -> str:
    return name.replace("_", " ")


def bars(scores: Sequence[Score]) -> dict:
    """Intervals, as Plotly draws them around values."""
    up, down = [s.high - s.value for s in scores], [s.value - s.low for s in scores]
    return dict(type="data", symmetric=False, array=up, arrayminus=down, thickness=1.2, width=4)


def over_tasks(whole: Sequence[Line], cycles: Sequence[tuple[float, str]], trained: int) -> go.Figure:
    """A line for each task against the cycles; at a single count, a bar for each task."""
    figure, colors = go.Figure(), qualitative.Plotly
    order = in_order(cycles)
    headlines = [[scores[line.headline] for scores in line.scores] for line in whole]
    if len(cycles) == 1:
        chosen = [scores[0] for scores in headlines]
        figure.add_bar(
            x=[line.name for line in whole],
            y=[score.value for score in chosen],
            error_y=bars(chosen),
            text=[f"{score.value:.3f}" for score in chosen],
            textposition="inside",
            insidetextanchor="start",
            marker_color=colors[0],
            customdata=[[words(line.headline), line.samples] for line in whole],
            hovertemplate="%{x}<br>%{customdata[0]} %{y:.4f}<br>n=%{customdata[1]:,}<extra></extra>",
            width=[min(0.6, 0.12 * len(whole) + 0.1)] * len(whole),
        )
    else:
        for number, (line, unordered) in enumerate(zip(whole, headlines, strict=True)):
            values = [unordered[which] for which in order]
            figure.add_scatter(
                x=[cycles[which][0] for which in order],
                y=[score.value for score in values],
                error_y=bars(values),
                mode="lines+markers",
                name=f"{line.name} (n={line.samples:,})",
                line=dict(color=colors[number % len(colors)], width=2.5),
                marker=dict(size=8),
                hovertemplate=f"{html.escape(line.name)}<br>%{{x}} H-cycles<br>{words(line.headline)} %{{y:.4f}}<extra></extra>",
            )
        logarithmic = against_cycles(figure, cycles)
        if trained in [count for count, _ in cycles]:
            figure.add_vline(x=trained, line=dict(dash="dot", color="#999"))
            place = math.log10(trained) if logarithmic else trained  # an annotation wants it so, a line does not
            figure.add_annotation(
                x=place, y=1.04, yref="paper", text="trained", showarrow=False, font=dict(color="#777")
            )
    names = dict.fromkeys(words(line.headline) for line in whole)
    figure.update_layout(yaxis_title=" / ".join(names), height=420, showlegend=len(cycles) > 1)
    figure.update_yaxes(range=[-0.02, 1.05])
    return figure


def in_order(cycles: Sequence[tuple[float, str]]) -> list[int]:
    """The numbers of the cycle counts, the least first."""
    return sorted(range(len(cycles)), key=lambda which: cycles[which])


def against_cycles(figure: go.Figure, cycles: Sequence[tuple[float, str]]) -> bool:
    """Makes the axis of the cycles, and says whether it is logarithmic, as for counts that double."""
    counts, names = zip(*cycles)
    logarithmic = min(counts) > 0 and max(counts) >= 4 * min(counts)
    figure.update_xaxes(
        title="H-cycles",
        type="log" if logarithmic else "linear",
        tickvals=counts,
        ticktext=names,
    )
    return logarithmic


def of_facet(lines: Sequence[Line], cycles: Sequence[tuple[float, str]]) -> go.Figure:
    """Of a facet: a line for each value against the cycles; at a single count, a point for each value."""
    figure, shown = go.Figure(), lines[:MOST_LINES]
    headline, facet = lines[0].headline, lines[0].facet
    colors = sample_colorscale("Viridis", [i / max(len(shown) - 1, 1) * 0.9 for i in range(len(shown))])
    if len(cycles) == 1:
        chosen = [line.scores[0][headline] for line in shown]
        figure.add_scatter(
            x=[line.value for line in shown],
            y=[score.value for score in chosen],
            error_y=bars(chosen),
            mode="markers",
            marker=dict(size=11, color=colors),
            customdata=[line.samples for line in shown],
            hovertemplate=f"{html.escape(facet)} %{{x}}<br>{words(headline)} %{{y:.4f}}<br>n=%{{customdata:,}}<extra></extra>",
        )
        figure.update_xaxes(title=facet, type="category")
    else:
        for line, color in zip(shown, colors, strict=True):
            values = [line.scores[which][headline] for which in in_order(cycles)]
            figure.add_scatter(
                x=[cycles[which][0] for which in in_order(cycles)],
                y=[score.value for score in values],
                error_y=bars(values),
                mode="lines+markers",
                name=f"{line.value} (n={line.samples:,})",
                line=dict(color=color, width=2),
                hovertemplate=f"{html.escape(line.alias)}<br>%{{x}} H-cycles<br>{words(headline)} %{{y:.4f}}<extra></extra>",
            )
        against_cycles(figure, cycles)
    title = f"{lines[0].task}: {words(headline)} by {facet}" + (
        f" ({len(shown)} of {len(lines)})" if len(shown) < len(lines) else ""
    )
    figure.update_layout(
        title=dict(text=html.escape(title), font=dict(size=14)),
        height=340,
        showlegend=len(cycles) > 1,
        legend_title=facet,
    )
    figure.update_yaxes(range=[-0.02, 1.05])
    return figure


def scores(lines: Sequence[Line], cycles: Sequence[tuple[float, str]]) -> str:
    """All scores with their intervals."""
    names = list(dict.fromkeys(name for line in lines for scores in line.scores for name in scores))
    columns = ["task", "samples", "H-cycles"]
    columns += [text for name in names for text in (words(name), f"{LEVEL:.0%} interval")]
    rows = []
    for line in lines:
        for which, (_, count) in enumerate(cycles):
            cells = [line.alias, line.samples, count]
            for name in names:
                score = line.scores[which].get(name)
                cells += ["", ""] if score is None else [f"{score.value:.4f}", f"{score.low:.4f} to {score.high:.4f}"]
            rows.append((cells, "part" if line.facet else ""))
    return table_html(columns, rows)


def answers(task: Task, answered: Answered) -> Iterator[str]:
    """Wrong and right answers of a task, spread over its samples."""
    verdicts = answered.right if answered.verdicts is None else answered.verdicts
    there = np.array([answer is not None for answer in answered.answers])
    yield f"<h3>{html.escape(task.name)}</h3>"
    for kind, chosen in (("wrong", verdicts < 1), ("right", verdicts >= 1)):
        found = np.flatnonzero(chosen & there)
        some = found[np.arange(min(SHOWN, len(found))) * len(found) // max(min(SHOWN, len(found)), 1)]
        yield f"<p>{int(chosen.sum()):,} {kind}{f', of which {len(some)} are shown' if len(some) < chosen.sum() else ''}</p>"
        if not len(some):
            continue
        partial = any(0 < verdicts[i] < 1 for i in some)
        rows = []
        for i in some.tolist():
            prompt, response, _ = task.split[i]
            texts = [task.tokenizer.decode(prompt), task.tokenizer.decode(response), answered.answers[i] or ""]
            rows.append(([cut(texts[0]), cut(texts[1]), *[float(verdicts[i])] * partial, cut(texts[2])], kind))
        columns = ["prompt", "expected", *[words(task.metric)] * partial, "answer"]
        yield f'<div class="said">{table_html(columns, rows)}</div>'


def cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 2 // 3]} … {text[-LONGEST // 3 :]}"
