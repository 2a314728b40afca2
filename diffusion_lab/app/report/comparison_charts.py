"""The charts of a comparison: distance over cost, and over accuracy where a guidance scale was swept."""

from __future__ import annotations

import html
from collections.abc import Sequence

from diffusion_lab.app.report import figures
from diffusion_lab.app.report.comparison_text import best_of, heads_of, variant
from diffusion_lab.app.scoring.sheet import Row, Sheet

NFE = "NFE: network evaluations per sample"


def colours_of(sheet: Sheet) -> dict[str, int]:
    """Return the number of the colour of each kind of row."""
    names = sorted({kind_of(sheet, row) for row in sheet.rows})
    return {name: number for number, name in enumerate(names)}


def kind_of(sheet: Sheet, row: Row) -> str:
    """What has a colour of its own: a sampler; where there is but one, whatever else was varied."""
    several = len({other.sampler for other in sheet.rows}) > 1
    return row.sampler if several else variant(row.varied, leave=["grid.steps"])


def chart(sheet: Sheet, group: Sequence[Row], number: int) -> str:
    """The distance over the cost; the points that differ in the number of steps alone are joined."""
    drawn = [row for row in group if row.distance is not None and row.nfe is not None]
    if len(drawn) < 2:
        return ""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in drawn:
        label = variant(row.varied, leave=["grid.steps"])
        lines.setdefault((kind_of(sheet, row), label or row.sampler.partition("(")[0]), []).append(row)
    colours = colours_of(sheet)
    markers: dict[str, int] = {}
    series = []
    for (kind, label), found in sorted(lines.items()):
        rows = sorted(found, key=lambda row: row.nfe or 0)
        marker = markers[kind] = markers.get(kind, -1) + 1
        x, y = [float(row.nfe or 0) for row in rows], [row.distance.value for row in rows if row.distance]
        series.append(figures.Series(label, x, y, colours[kind], marker + colours[kind] // 8))
    distance, best = heads_of(group)[0], best_of(drawn)
    assert distance is not None
    svg = figures.scatter_chart(
        f"cost-{number}",
        series,
        labels=(NFE, distance.label),
        best=(float(best.nfe or 0), best.distance.value) if best and best.distance else None,
        floor=distance.real,
    )
    return f'<figure class="card">{svg}</figure>'


def tradeoff(sheet: Sheet, group: Sequence[Row], number: int) -> str:
    """Where a guidance scale was swept: distance over accuracy, points that differ in the scale alone joined."""
    swept = [key for key in sheet.keys if key.rpartition(".")[2] == "scale"]
    drawn = [row for row in group if row.distance is not None and row.accuracy is not None]
    if not swept or len(drawn) < 3:
        return ""
    lines: dict[str, list[Row]] = {}
    for row in drawn:
        lines.setdefault(variant(row.varied, leave=swept) or "scale", []).append(row)
    series = []
    for colour, (label, rows) in enumerate(sorted(lines.items())):
        rows = sorted(rows, key=lambda row: [float(row.varied[key]) for key in swept])
        x = [100 * row.accuracy.value for row in rows if row.accuracy]
        y = [row.distance.value for row in rows if row.distance]
        series.append(figures.Series(label, x, y, colour, colour))
    distance, accuracy = heads_of(group)[0], drawn[0].accuracy
    assert distance is not None and accuracy is not None
    axes = (f"{accuracy.label}, %", distance.label)
    svg = figures.scatter_chart(f"tradeoff-{number}", series, labels=axes, floor=distance.real)
    text = f"Fidelity against diversity: along a line {', '.join(swept)} grows."
    return f'<figure class="card">{svg}<figcaption>{html.escape(text)}</figcaption></figure>'
