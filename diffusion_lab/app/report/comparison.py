"""From the rows of a sweep to one page: a chart of distance against cost, a table, and the pictures side by side.

The page holds all it shows, like a run's report. Rows come sorted; what may not be compared comes in groups, each with
its own chart, table and best row.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from diffusion_lab.app.report import figures, page
from diffusion_lab.app.sheet import First, Row, Sheet
from diffusion_lab.metrics.protocol import Record

# of a picture: pixels across, at most, before it is enlarged, and rows of images
ACROSS = 1280
ROWS = 4
COLUMNS = 10
NFE = "NFE: network evaluations per sample"


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
            *(_scores(sheet, group, number) for number, group in enumerate(sheet.groups, 1)),
            _pictures(sheet),
            _failures(sheet),
            page.section("Reproduce", f'<pre class="wrap"><code>{html.escape(sheet.command)}</code></pre>'),
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


# ---- words -----------------------------------------------------------------------------------------------


def variant(row: Mapping[str, str], *, leave: Sequence[str] = ()) -> str:
    """Return what was varied in a few words: `ddim · steps 8`.

    Args:
        row: Overrides, by key.
        leave: Keys to leave out.
    """
    last = [key.rpartition(".")[2] for key in row]
    words = []
    for key, value in row.items():
        if key in leave:
            continue
        name = key.rpartition(".")[2]
        # an option of a group, or a folder, says by itself what it is
        plain = "." not in key and not _is_number(value)
        words.append(value if plain else f"{name if last.count(name) == 1 else key} {value}")
    return " · ".join(words)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("null", "true", "false") or text.startswith("[")
    return True


def _number(value: float | None) -> str:
    # the zeros at the end stay, so that the points of a column stand below each other
    return "–" if value is None else f"{value:#.4g}".removesuffix(".")


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _best(group: Sequence[Row]) -> Row | None:
    """The nearest one, where there is something to be nearer than."""
    scored = [row for row in group if row.distance is not None]
    return scored[0] if len(scored) > 1 else None


def _heads(group: Sequence[Row]) -> tuple[Record | None, Record | None]:
    """The records that name the columns of distances and of accuracies."""
    return (
        next((row.distance for row in group if row.distance is not None), None),
        next((row.accuracy for row in group if row.accuracy is not None), None),
    )


def _real_n(distance: Record) -> str:
    return "" if distance.real_n in (None, distance.n) else f", n {distance.real_n:,}"


def table(sheet: Sheet, group: Sequence[Row]) -> Table:
    """Lay a group out for the terminal, the best row first."""
    distance, accuracy = _heads(group)
    out = Table(box=None, pad_edge=False, header_style="dim")
    for key in sheet.keys:
        out.add_column(Text(key))
    names = [distance.label if distance else "FD", "NFE", "seconds", "s/1000"]
    for name in [*names, *([accuracy.label] if accuracy else [])]:
        out.add_column(Text(name), justify="right")
    for row in group:
        cells = [row.varied[key] for key in sheet.keys]
        cells += [text + (f" ({mark})" if mark else "") for text, mark in _cells(sheet, row)]
        if accuracy:
            cells.append(_percent(row.accuracy.value if row.accuracy else None))
        out.add_row(*(Text(cell) for cell in cells), style="bold" if row is _best(group) else None)
    if distance is not None and distance.real is not None:
        real = [f"real data{_real_n(distance)}", *[""] * (len(sheet.keys) - 1)]
        numbers = [_number(distance.real), "", "", "", *([_percent(accuracy.real)] if accuracy else [])]
        out.add_row(*([*real, *numbers] if sheet.keys else numbers), style="dim")
    return out


def _cells(sheet: Sheet, row: Row) -> list[tuple[str, int | None]]:
    """Distance, NFE, seconds and seconds per 1000 as text, each with the number of its footnote."""
    notes = sheet.footnotes
    texts = {
        "distance": _number(row.distance.value if row.distance else None),
        "nfe": "–" if row.nfe is None else str(row.nfe),
        "seconds": _seconds(row.seconds),
        "seconds_per_1000": _seconds(row.seconds_per_1000),
    }
    return [
        (text, notes.index(row.why[column]) + 1 if column in row.why else None)
        for column, text in texts.items()
    ]


# ---- the sections ----------------------------------------------------------------------------------------


def _scores(sheet: Sheet, group: Sequence[Row], number: int) -> str:
    distance, accuracy = _heads(group)
    best = _best(group)
    head = "".join(f"<th>{html.escape(key)}</th>" for key in sheet.keys)
    names = [distance.label if distance else "FD", "NFE", "seconds", "s / 1000 samples"]
    names += [accuracy.label] if accuracy else []
    head += "".join(f'<th class="right">{html.escape(name)}</th>' for name in names)
    lines = []
    colours = _colours(sheet)
    for row in group:
        cells = [f"<td>{html.escape(row.varied[key])}</td>" for key in sheet.keys]
        if cells and distance is not None:
            colour = colours[_kind(sheet, row)] % len(figures.SERIES) + 1
            dot = f'<i class="dot" style="color:var(--series-{colour})">●</i>'
            cells[0] = cells[0].replace("<td>", f"<td>{dot}", 1)
        for place, (text, note) in enumerate(_cells(sheet, row)):
            mark = f"<sup>{note}</sup>" if note else ""
            first = '<span class="best">best&ensp;</span>' if row is best and place == 0 else ""
            cells.append(f'<td class="right">{first}{html.escape(text)}{mark}</td>')
        if accuracy:
            cells.append(f'<td class="right">{_percent(row.accuracy.value if row.accuracy else None)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    if distance is not None and distance.real is not None:
        real = [_number(distance.real), "–", "–", "–", *([_percent(accuracy.real)] if accuracy else [])]
        name = f"real training data, the floor{_real_n(distance)}" + (
            "; accuracy of the test data" if accuracy else ""
        )
        lines.append(
            f'<tr class="real"><td colspan="{max(1, len(sheet.keys))}">{name}</td>'
            + "".join(f'<td class="right">{text}</td>' for text in real)
            + "</tr>"
        )
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    title = "Scores" if len(sheet.groups) == 1 or distance is None else f"Scores: {distance.label}"
    charts = _chart(sheet, group, number) + _tradeoff(sheet, group, number)
    return page.section(title, charts + body + _notes(sheet, group))


def _notes(sheet: Sheet, group: Sequence[Row]) -> str:
    used = {line for row in group for line in row.why.values()}
    numbered = "".join(
        f'<li value="{number}">{html.escape(line)}</li>'
        for number, line in enumerate(sheet.footnotes, 1)
        if line in used
    )
    lines = [f'<ol class="notes">{numbered}</ol>'] if numbered else []
    distance, _ = _heads(group)
    if distance is not None:
        deviations = distance.deviations
        if deviations:
            text = f"Not by the protocol {distance.protocol.name}: {'; '.join(deviations)}."
            lines.append(f'<p class="warn"><small>{html.escape(text)}</small></p>')
        if len(sheet.groups) > 1:
            other = next(
                item for other in sheet.groups if other is not group if (item := _heads(other)[0]) is not None
            )
            text = f"Not comparable with {other.label}: {'; '.join(distance.differences(other))}."
            lines.append(f'<p class="faint"><small>{html.escape(text)}</small></p>')
    return "".join(lines)


def _colours(sheet: Sheet) -> dict[str, int]:
    """Return the number of the colour of each kind of row."""
    names = sorted({_kind(sheet, row) for row in sheet.rows})
    return {name: number for number, name in enumerate(names)}


def _kind(sheet: Sheet, row: Row) -> str:
    """What has a colour of its own: a sampler; where there is but one, whatever else was varied."""
    several = len({other.sampler for other in sheet.rows}) > 1
    return row.sampler if several else variant(row.varied, leave=["grid.steps"])


def _chart(sheet: Sheet, group: Sequence[Row], number: int) -> str:
    """The distance over the cost; the points that differ in the number of steps alone are joined."""
    drawn = [row for row in group if row.distance is not None and row.nfe is not None]
    if len(drawn) < 2:
        return ""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in drawn:
        label = variant(row.varied, leave=["grid.steps"])
        lines.setdefault((_kind(sheet, row), label or row.sampler.partition("(")[0]), []).append(row)
    colours = _colours(sheet)
    markers: dict[str, int] = {}
    series = []
    for (kind, label), found in sorted(lines.items()):
        rows = sorted(found, key=lambda row: row.nfe or 0)
        marker = markers[kind] = markers.get(kind, -1) + 1
        x, y = [float(row.nfe or 0) for row in rows], [row.distance.value for row in rows if row.distance]
        series.append(figures.Series(label, x, y, colours[kind], marker + colours[kind] // 8))
    distance, best = _heads(group)[0], _best(drawn)
    assert distance is not None
    svg = figures.scatter_chart(
        f"cost-{number}",
        series,
        labels=(NFE, distance.label),
        best=(float(best.nfe or 0), best.distance.value) if best and best.distance else None,
        floor=distance.real,
    )
    return f'<figure class="card">{svg}</figure>'


def _tradeoff(sheet: Sheet, group: Sequence[Row], number: int) -> str:
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
    distance, accuracy = _heads(group)
    assert distance is not None and accuracy is not None
    axes = (f"{accuracy.label}, %", distance.label)
    svg = figures.scatter_chart(f"tradeoff-{number}", series, labels=axes, floor=distance.real)
    text = f"Fidelity against diversity: along a line {', '.join(swept)} grows."
    return f'<figure class="card">{svg}<figcaption>{html.escape(text)}</figcaption></figure>'


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
    best = [_best(group) for group in sheet.groups]
    cards = []
    for row in sheet.rows:
        name = variant(row.varied) or row.sampler
        mark = ' <span class="best">best</span>' if any(row is one for one in best) else ""
        told = [f"{row.distance.label} {_number(row.distance.value)}"] if row.distance else []
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
