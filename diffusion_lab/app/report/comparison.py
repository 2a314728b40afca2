"""From the rows of a sweep to one page: a chart of distance against cost, a table, and the pictures side by side.

The page holds all it shows, like a run's report. Rows come sorted; what may not be compared comes in groups, each with
its own chart, table and best row.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

from diffusion_lab.app.report import figures, page, sortable
from diffusion_lab.app.report.comparison_charts import chart, colours_of, kind_of, tradeoff
from diffusion_lab.app.report.comparison_text import (
    best_of,
    cells_of,
    heads_of,
    number_of,
    others_of,
    real_n,
    value_of,
    variant,
)
from diffusion_lab.app.scoring.sheet import First, Row, Sheet

# of a picture: pixels across, at most, before it is enlarged, and rows of images
ACROSS = 1280
ROWS = 4
COLUMNS = 10


def write_up(sheet: Sheet) -> str:
    """Return the page of a sweep."""
    total = len(sheet.rows) + len(sheet.failures)
    heading = " and ".join(sheet.names[:3]) + (" ..." if len(sheet.names) > 3 else "")
    guidance = _common([str(row.told.get("guidance", "")).removesuffix("()") for row in sheet.rows])
    return page.render(
        title=f"comparison {heading}",
        heading=heading,
        status=f"{len(sheet.rows)} of {total} jobs" if sheet.failures else f"{total} jobs",
        kind="failed" if sheet.failures else "finished",
        subtitle=f"compared over {', '.join(sheet.keys) or 'nothing'}"
        + (f" · guidance {guidance}" if guidance else ""),
        facts=_facts(sheet),
        sections=[
            sortable.STYLE,
            *(_scores(sheet, group, number) for number, group in enumerate(sheet.groups, 1)),
            _pictures(sheet),
            _failures(sheet),
            page.section("Reproduce", f'<pre class="wrap"><code>{html.escape(sheet.command)}</code></pre>'),
            sortable.SCRIPT,
        ],
    )


def _common(values: Sequence[Any]) -> str | None:
    """Return what all are, as text; None if they differ."""
    return str(values[0]) if values and all(value == values[0] for value in values) else None


def _facts(sheet: Sheet) -> dict[str, str | None]:
    told = [row.told for row in sheet.rows]
    weights = [item.get("weights") or {} for item in told]
    scored = [row.distance for row in sheet.rows if row.distance is not None]
    images = _common([item.get("images_seen") for item in weights])
    return {
        "samples of each job": _common([f"{row.n:,}" for row in sheet.rows]),
        "weights": _common([item.get("ema", "?") for item in weights]),
        "images seen": f"{int(images):,}" if images and images.isdigit() else None,
        "seed": _common([item.get("seed", "?") for item in told]),
        "distances to": _common([f"{item.reference} split (n {item.reference_n:,})" for item in scored]),
        "drawn on": sheet.device,
        "made": sheet.created,
    }


# ---- the sections ----------------------------------------------------------------------------------------


def _scores(sheet: Sheet, group: Sequence[Row], number: int) -> str:
    distance, others = heads_of(group)
    best = best_of(group)
    head = "".join(f"<th>{html.escape(key)}</th>" for key in sheet.keys)
    names = [distance.label if distance else "FD", "NFE", "seconds", "s / 1000 samples"]
    names += [item.label for item in others]
    head += "".join(f'<th class="right">{html.escape(name)}</th>' for name in names)
    lines, foot = [], ""
    colours = colours_of(sheet)
    for row in group:
        cells = [f"<td>{html.escape(row.varied[key])}</td>" for key in sheet.keys]
        if cells and distance is not None:
            colour = colours[kind_of(sheet, row)] % len(figures.SERIES) + 1
            dot = f'<i class="dot" style="color:var(--series-{colour})">●</i>'
            cells[0] = cells[0].replace("<td>", f"<td>{dot}", 1)
        values = [row.distance.value if row.distance else None, row.nfe, row.seconds, row.seconds_per_1000]
        for place, (text, note) in enumerate(cells_of(sheet, row)):
            mark = f"<sup>{note}</sup>" if note else ""
            first = '<span class="best">best&ensp;</span>' if row is best and place == 0 else ""
            value = sortable.cell_value(values[place])
            cells.append(f'<td class="right"{value}>{first}{html.escape(text)}{mark}</td>')
        for head_, text in zip(others, others_of(row, others), strict=True):
            found = row.other(head_.metric)
            value = sortable.cell_value(None if found is None else found.value)
            cells.append(f'<td class="right"{value}>{text}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    if distance is not None and distance.real is not None:
        real = [number_of(distance.real), "–", "–", "–", *(value_of(item, item.real) for item in others)]
        name = f"real training data{real_n(distance)}" + (
            "; accuracy of the test data" if any(item.metric == "accuracy" for item in others) else ""
        )
        foot = (
            f'<tfoot><tr class="real"><td colspan="{max(1, len(sheet.keys))}">{name}</td>'
            + "".join(f'<td class="right">{text}</td>' for text in real)
            + "</tr></tfoot>"
        )
    body = (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody>{foot}</table></div>"
    )
    title = "Scores" if len(sheet.groups) == 1 or distance is None else f"Scores: {distance.label}"
    charts = chart(sheet, group, number) + tradeoff(sheet, group, number)
    return page.section(title, charts + body + _notes(sheet, group))


def _notes(sheet: Sheet, group: Sequence[Row]) -> str:
    used = {line for row in group for line in row.why.values()}
    numbered = "".join(
        f'<li value="{number}">{html.escape(line)}</li>'
        for number, line in enumerate(sheet.footnotes, 1)
        if line in used
    )
    lines = [f'<ol class="notes">{numbered}</ol>'] if numbered else []
    distance, _ = heads_of(group)
    if distance is not None:
        deviations = distance.deviations
        if deviations:
            text = f"Not by the protocol {distance.protocol.name}: {'; '.join(deviations)}."
            lines.append(f'<p class="warn"><small>{html.escape(text)}</small></p>')
        if len(sheet.groups) > 1:
            other = next(
                item
                for other in sheet.groups
                if other is not group
                if (item := heads_of(other)[0]) is not None
            )
            text = f"Not comparable with {other.label}: {'; '.join(distance.differences(other))}."
            lines.append(f'<p class="faint"><small>{html.escape(text)}</small></p>')
    return "".join(lines)


def _pictures(sheet: Sheet) -> str:
    alike = len({(row.told.get("seed"), str(row.told.get("labels"))) for row in sheet.rows}) == 1
    known = all("seed" in row.told for row in sheet.rows)
    points = sheet.rows[0].first.images.ndim != 4
    if not (alike and known):
        text = "Seeds or classes differ: the pictures cannot be compared position by position."
    elif points:
        text = "The same seeds, on the same axes; points beyond them are not drawn."
    else:
        text = "At the same position: the same seed and the same class."
    # axes that real data fill: a sampler that diverges must not make dots of the others
    fitting = sheet.real if sheet.real is not None else sheet.rows[0].first
    extent = figures.points_extent([fitting.images]) if points else None
    best = [best_of(group) for group in sheet.groups]
    cards = []
    for row in sheet.rows:
        name = variant(row.varied) or row.sampler
        mark = ' <span class="best">best</span>' if any(row is one for one in best) else ""
        told = [f"{row.distance.label} {number_of(row.distance.value)}"] if row.distance else []
        told += [f"NFE {row.nfe}"] if row.nfe is not None else []
        cards.append(
            f"<figure>{page.image(_picture(row.first, extent), name)}<figcaption><b>{html.escape(name)}</b>{mark}<br>"
            f"{html.escape(' · '.join(told))}</figcaption></figure>"
        )
    if sheet.real is not None:
        cards.append(
            f"<figure>{page.image(_picture(sheet.real, extent), 'real training data')}"
            "<figcaption><b>real training data</b><br>laid out alike</figcaption></figure>"
        )
    return page.section(
        "First samples", f'<p class="faint">{text}</p><div class="gallery">{"".join(cards)}</div>'
    )


def _picture(first: First, extent: tuple[float, float] | None) -> bytes:
    if first.images.ndim != 4:
        return figures.points_png([("", first.images, first.labels)], extent=extent)
    # classes in turn make columns
    classes = len(set(first.labels[first.labels >= 0].tolist()))
    columns = classes * max(1, COLUMNS // classes) if 1 < classes <= 16 else COLUMNS
    if columns * first.images.shape[2] > ACROSS:
        columns = max(4, ACROSS // first.images.shape[2])
    out = io.BytesIO()
    figures.tile(first.images[: columns * ROWS], columns).save(out, format="PNG")
    return out.getvalue()


def _failures(sheet: Sheet) -> str:
    if not sheet.failures:
        return ""
    lines = "".join(
        f'<tr><td>{html.escape(variant(varied) or "–")}</td><td class="warn">{html.escape(line)}</td></tr>'
        for varied, line in sheet.failures
    )
    head = "<thead><tr><th>job</th><th>why</th></tr></thead>"
    return page.section("Failed", f'<div class="scroll"><table>{head}<tbody>{lines}</tbody></table></div>')
