"""The page of a sweep: a table that can be sorted, a line for each job across what was varied, and what failed.

The page holds all it shows; a few lines of script inside sort the table and light up a job's line. Links lead to the
runs' own reports, relative to the page.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Sequence
from pathlib import Path

from diffusion_lab.app.report import page, sortable
from diffusion_lab.app.sweep.journal import short
from diffusion_lab.app.sweep.table import Found, Row, cells, heads, number, what

WIDTH, HEIGHT = 1080.0, 330.0
LEFT, TOP, BOTTOM = 70.0, 40.0, 24.0
# an axis is logarithmic where the values span more than this
SPAN = 30.0
TICKS = 8
RIGHT = ' class="right"'
STYLE = """<style>
table.sweep tr.lit td { background: var(--code); }
.job { fill: none; stroke: var(--series-1); stroke-width: 1.6; opacity: .75; }
.job.best { stroke: var(--good); stroke-width: 2.6; opacity: 1; }
.job.open { stroke: var(--series-2); stroke-dasharray: 5 4; }
.job.lit, .job:hover { stroke-width: 4; opacity: 1; }
</style>"""
SCRIPT = """<script>
document.querySelectorAll("table.sweep").forEach(table => {
  const body = table.tBodies[0];
  [...body.rows].forEach(row => {
    const lines = document.querySelectorAll(`.job[data-job="${row.dataset.job}"]`);
    const light = on => [row, ...lines].forEach(part => part.classList.toggle("lit", on));
    [row, ...lines].forEach(part => { part.onmouseenter = () => light(true); part.onmouseleave = () => light(false); });
  });
});
</script>"""


def write_up(found: Found, folder: Path) -> str:
    """Return the page.

    Args:
        found: What the jobs came to.
        folder: Where the page will lie, for its links.
    """
    failed, done = found.count("failed"), sum(found.count(s) for s in ("finished", "stopped", "pruned"))
    best = found.best
    return page.render(
        title="sweep",
        heading="Sweep over " + (", ".join(found.keys) or "nothing"),
        status=f"{done} of {len(found.rows)} jobs",
        kind="failed" if failed else "finished" if done == len(found.rows) else "running",
        subtitle=f"{found.objective or 'no value'}, {'least' if found.direction == 'minimize' else 'most'} first",
        facts={
            "best": f"job {best.number}: {number(best.objective)}" if best else None,
            "with": " · ".join(f"{key} {short(value)}" for key, value in best.varied.items())
            if best
            else None,
            **{
                name: str(found.count(name)) if found.count(name) else None
                for name in ("failed", "pruned", "interrupted", "elsewhere", "not started")
            },
            "begun": found.created,
        },
        sections=[
            page.section("Jobs", sortable.STYLE + STYLE + _table(found, folder)),
            _lines(found),
            _reasons(found),
            page.section("Reproduce", f'<pre class="wrap"><code>{html.escape(found.command)}</code></pre>'),
            sortable.SCRIPT,
            SCRIPT,
        ],
    )


# ---- the table -----------------------------------------------------------------------------------------------


def _table(found: Found, folder: Path) -> str:
    names = [("job", True), *((key, False) for key in found.keys), *((name, True) for name in heads(found))]
    head = "".join(
        f"<th{RIGHT if right else ''}>{html.escape(name)}</th>" for name, right in [*names, ("status", False)]
    )
    lines = "".join(_line(found, row, folder) for row in found.rows)
    text = f'<table class="sweep sortable"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'
    return f'<div class="scroll">{text}</div>'


def _line(found: Found, row: Row, folder: Path) -> str:
    values = [
        *([row.objective] if found.objective else []),
        *(row.metrics.get(name) for name in found.columns),
        row.seconds,
    ]
    marks = ["best&ensp;" if row is found.best and place == 0 else "" for place in range(len(values))]
    parts = [f'<td class="right" data-v="{row.number}">{_link(row, folder)}</td>']
    parts += [_cell(row.varied.get(key, "–")) for key in found.keys]
    for mark, text, value in zip(marks, cells(found, row), values, strict=True):
        known = value is not None and math.isfinite(value)
        mark = f'<span class="best">{mark}</span>' if mark else ""
        parts.append(f'<td class="right" data-v="{value if known else ""}">{mark}{html.escape(text)}</td>')
    kind = ' class="warn"' if row.status in ("failed", "interrupted", "elsewhere", "not started") else ""
    parts.append(f"<td{kind}>{html.escape(what(row))}</td>")
    return f'<tr data-job="{row.number}">{"".join(parts)}</tr>'


def _cell(text: str) -> str:
    return f'<td data-v="{html.escape(text)}">{html.escape(short(text))}</td>'


def _link(row: Row, folder: Path) -> str:
    if row.run is None or not (row.run / "report.html").is_file():
        return str(row.number)
    where = os.path.relpath(row.run / "report.html", folder)
    return f'<a href="{html.escape(where)}">{row.number}</a>'


def _reasons(found: Found) -> str:
    rows = [row for row in sorted(found.rows, key=lambda row: row.number) if row.reason]
    if not rows:
        return ""
    lines = "".join(
        f"<tr><td>{row.number}</td><td>{html.escape(row.status)}</td>"
        f'<td class="warn">{html.escape(str(row.reason))}</td></tr>'
        for row in rows
    )
    head = "<thead><tr><th>job</th><th>status</th><th>why</th></tr></thead>"
    return page.section("Why", f'<div class="scroll"><table>{head}<tbody>{lines}</tbody></table></div>')


# ---- parallel coordinates --------------------------------------------------------------------------------------


class Axis:
    """One vertical axis: numbers at their place, words one below the other.

    Args:
        name: Written above it.
        values: Those of all jobs; None for a job that has none.
    """

    def __init__(self, name: str, values: Sequence[str | float | None]) -> None:
        self.name = name
        known = [value for value in values if value is not None]
        numbers = [_float(value) for value in known]
        self.words: list[str] = []
        self.low = self.high = 0.0
        self.log = False
        if known and all(value is not None for value in numbers):
            found = sorted(value for value in numbers if value is not None)
            self.log = found[0] > 0.0 and found[-1] / found[0] > SPAN
            self.low, self.high = self._scaled(found[0]), self._scaled(found[-1])
            self.ticks = sorted(set(found)) if len(set(found)) <= TICKS else self._spread()
        else:
            self.words = list(dict.fromkeys(str(value) for value in known))

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def _spread(self) -> list[float]:
        steps = [self.low + (self.high - self.low) * k / 4 for k in range(5)]
        return [10**step if self.log else step for step in steps]

    def height(self, value: str | float) -> float:
        """Return a value's place, 0 at the bottom and 1 at the top."""
        if self.words:
            count = len(self.words)
            return 0.5 if count == 1 else 1.0 - self.words.index(str(value)) / (count - 1)
        found = _float(value)
        assert found is not None
        return 0.5 if self.high == self.low else (self._scaled(found) - self.low) / (self.high - self.low)

    def labels(self) -> list[tuple[float, str]]:
        """Return heights and texts of the ticks."""
        if self.words:
            return [(self.height(word), word) for word in self.words]
        return [(self.height(tick), f"{tick:.4g}") for tick in self.ticks]


def _float(value: object) -> float | None:
    try:
        found = float(str(value))
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _lines(found: Found) -> str:
    """Draw a line for each job across the values that vary, to what it came to."""
    rows = found.rows
    axes = [Axis(key, [row.varied.get(key) for row in rows]) for key in found.keys]
    values = [
        row.objective if row.objective is not None and math.isfinite(row.objective) else None for row in rows
    ]
    if found.objective and any(value is not None for value in values):
        axes.append(Axis(found.objective, values))
    if len(axes) < 2 or len(rows) < 2:
        return ""
    step = (WIDTH - 2 * LEFT) / (len(axes) - 1)
    drawn = [_axis(axis, LEFT + k * step) for k, axis in enumerate(axes)]
    # the best one last, on top of the others
    for row, value in reversed(list(zip(rows, values, strict=True))):
        given: list[str | float | None] = [row.varied.get(key) for key in found.keys]
        given += [value] if len(axes) > len(found.keys) else []
        points = [
            (LEFT + k * step, _y(axis.height(one)))
            for k, (axis, one) in enumerate(zip(axes, given, strict=True))
            if one is not None
        ]
        if len(points) < 2:
            continue
        path = " ".join(f"{'L' if k else 'M'}{x:.1f},{y:.1f}" for k, (x, y) in enumerate(points))
        kind = " best" if row is found.best else "" if row.status in ("finished", "stopped") else " open"
        text = f"job {row.number}: {' '.join(f'{k}={v}' for k, v in row.varied.items())}, {row.status}"
        drawn.append(
            f'<path class="job{kind}" data-job="{row.number}" d="{path}"><title>{html.escape(text)}</title></path>'
        )
    caption = "A line for each job; dashed where it was not finished. The best one is green."
    svg = f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" font-size="11.5">{"".join(drawn)}</svg>'
    return page.section(
        "What leads where",
        f'<figure class="card">{svg}<figcaption>{caption}</figcaption></figure>',
    )


def _y(height: float) -> float:
    return HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM)


def _axis(axis: Axis, x: float) -> str:
    top, bottom = _y(1.0), _y(0.0)
    parts = [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="var(--faint)"/>',
        f'<text x="{x:.1f}" y="{top - 18:.1f}" text-anchor="middle" fill="var(--ink)" font-weight="600">'
        f"{html.escape(axis.name)}</text>",
    ]
    for height, text in axis.labels():
        parts.append(
            f'<text x="{x + 6:.1f}" y="{_y(height) - 4:.1f}" fill="var(--faint)">{html.escape(text)}</text>'
        )
    return "".join(parts)
