"""Self-contained HTML pages of figures and tables, readable from a file without network: reports are made of these.

Drawn by Plotly, whose script is put into the page. All but `page_html`'s sections is escaped here.
"""

import html
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs


def page_html(title: str, sections: Iterable[str]) -> str:
    """The page. sections: HTML, in their order."""
    return PAGE.format(title=html.escape(title), plotly=get_plotlyjs(), body="\n".join(sections))


def figure_html(figure: go.Figure) -> str:
    figure.update_layout(
        template="plotly_white",
        font=dict(family="system-ui, sans-serif"),
        margin=figure.layout.margin.to_plotly_json() or dict(l=60, r=20, t=40, b=50),
    )
    return f'<div class="figure">{figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})}</div>'


def table_html(columns: Sequence[str], rows: Iterable[tuple[Sequence[Any], str]], kind: str = "") -> str:
    """A table that a click on a heading sorts. rows: the cells, None for an empty cell, and a class of PAGE's style.

    kind: `text` for a table of words, which stand at the left; `named` where the first column is a name.
    """
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = []
    for cells, row_kind in rows:
        tds = "".join(
            f'<td data-v="{"" if c is None else html.escape(str(c))}">{"" if c is None else html.escape(short(c))}</td>'
            for c in cells
        )
        body.append(f'<tr class="{row_kind}">{tds}</tr>')
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 0 auto; padding: 24px; }}
h1 {{ font-size: 26px; margin: 0 0 4px; }} h2 {{ font-size: 19px; margin: 36px 0 4px; }} p {{ margin: 4px 0 10px; color: #555; }}
.lead {{ font-size: 17px; color: #222; }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0; }}
.tile {{ border: 1px solid #ddd; border-radius: 8px; padding: 8px 16px; }}
.tile b {{ display: block; font-size: 22px; }} .tile span {{ color: #666; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 12px; margin-bottom: 12px; }}
.figure {{ border: 1px solid #eee; border-radius: 8px; overflow: hidden; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }}
th {{ cursor: pointer; text-align: right; border-bottom: 2px solid #bbb; padding: 6px 10px; white-space: nowrap; user-select: none; }}
td {{ text-align: right; padding: 5px 10px; border-bottom: 1px solid #eee; }} td:last-child, th:last-child {{ text-align: left; min-width: 240px; }}
th.up::after {{ content: " \\25B2"; }} th.down::after {{ content: " \\25BC"; }}
table.text {{ width: auto; }} table.text th, table.text td {{ text-align: left; vertical-align: top; overflow-wrap: anywhere; }}
table.text td:first-child {{ white-space: nowrap; }} table.text td:last-child, table.text th:last-child {{ min-width: 0; }}
table.named td:first-child, table.named th:first-child {{ text-align: left; overflow-wrap: anywhere; min-width: 120px; }}
table.named td:last-child, table.named th:last-child {{ min-width: 120px; }}
.error {{ color: #a33; }} .note {{ color: #888; font-size: 13px; }}
details {{ margin: 10px 0; }} summary {{ cursor: pointer; color: #555; }} pre {{ background: #f7f7f7; border-radius: 8px; padding: 12px; overflow-x: auto; font-size: 13px; }}
.answers {{ border: 1px solid #eee; border-radius: 8px; padding: 8px 12px; overflow-x: auto; }}
.answers td {{ text-align: left; vertical-align: top; padding: 3px 8px; border-bottom: 1px solid #f3f3f3; width: 100%; }}
.answers td.label {{ color: #777; white-space: nowrap; width: 1%; }} .answers tr.right td:last-child {{ color: #1a7f37; }} code {{ font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; }}
.chips {{ display: flex; flex-wrap: wrap; gap: 8px 18px; position: sticky; top: 0; background: #fffe; padding: 8px 0; z-index: 1; }}
.chip i {{ display: inline-block; width: 14px; height: 14px; border-radius: 4px; margin-right: 6px; vertical-align: -2px; }}
tr.best td {{ background: #fff6d6; font-weight: 600; }} tr.diverged td, tr.failed td, tr.invalid td {{ color: #a33; }} tr.stopped td {{ color: #777; }}
</style>
<script>{plotly}</script></head><body>
{body}
<script>
addEventListener("load", () => dispatchEvent(new Event("resize")));  // figures drawn before the grid was whole
document.querySelectorAll("th").forEach(th => th.onclick = () => {{
  const up = !th.classList.contains("up"), i = th.cellIndex, body = th.closest("table").tBodies[0];
  th.closest("tr").querySelectorAll("th").forEach(other => other.className = "");
  th.className = up ? "up" : "down";
  const key = row => {{ const v = row.cells[i].dataset.v; return v === "" ? null : isNaN(v) ? v : Number(v); }};
  [...body.rows].sort((a, b) => {{
    const x = key(a), y = key(b);
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
  }}).forEach(row => body.append(row));
}});
</script>
</body></html>
"""
