"""What a comparison says in words and numbers: the cells of its table, on the page and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from diffusion_lab.app.scoring.sheet import Row, Sheet
from diffusion_lab.metrics.protocol import Record


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


def number_of(value: float | None) -> str:
    """Return a number as text, a dash for none."""
    # the zeros at the end stay, so that the points of a column stand below each other
    return "–" if value is None else f"{value:#.4g}".removesuffix(".")


def seconds_of(value: float | None) -> str:
    """Return seconds as text, a dash for none."""
    if value is None:
        return "–"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def value_of(item: Record | None, value: float | None) -> str:
    """Return a value of a record's kind as text, a dash for none."""
    if item is None or value is None:
        return "–"
    return f"{100 * value:.2f} %" if item.percent else number_of(value)


def best_of(group: Sequence[Row]) -> Row | None:
    """The nearest one, where there is something to be nearer than."""
    scored = [row for row in group if row.distance is not None]
    return scored[0] if len(scored) > 1 else None


def heads_of(group: Sequence[Row]) -> tuple[Record | None, list[Record]]:
    """The records that name the columns: of distances, and of what else was measured."""
    others = {item.metric: item for row in reversed(group) for item in reversed(row.others)}
    return (
        next((row.distance for row in group if row.distance is not None), None),
        list(reversed(others.values())),
    )


def real_n(distance: Record) -> str:
    """Return in words how many real images stood in for samples, where they were not as many."""
    return "" if distance.real_n in (None, distance.n) else f", n {distance.real_n:,}"


def table(sheet: Sheet, group: Sequence[Row]) -> Table:
    """Lay a group out for the terminal, the best row first."""
    distance, others = heads_of(group)
    out = Table(box=None, pad_edge=False, header_style="dim")
    for key in sheet.keys:
        out.add_column(Text(key))
    names = [distance.label if distance else "FD", "NFE", "seconds", "s/1000"]
    for name in [*names, *(item.label for item in others)]:
        out.add_column(Text(name), justify="right")
    for row in group:
        cells = [row.varied[key] for key in sheet.keys]
        cells += [text + (f" ({mark})" if mark else "") for text, mark in cells_of(sheet, row)]
        cells += others_of(row, others)
        out.add_row(*(Text(cell) for cell in cells), style="bold" if row is best_of(group) else None)
    if distance is not None and distance.real is not None:
        real = [f"real data{real_n(distance)}", *[""] * (len(sheet.keys) - 1)]
        numbers = [number_of(distance.real), "", "", "", *(value_of(item, item.real) for item in others)]
        out.add_row(*([*real, *numbers] if sheet.keys else numbers), style="dim")
    return out


def others_of(row: Row, heads: Sequence[Record]) -> list[str]:
    """What else was measured, as text, by column."""
    found = [row.other(head.metric) for head in heads]
    return [value_of(item, None if item is None else item.value) for item in found]


def cells_of(sheet: Sheet, row: Row) -> list[tuple[str, int | None]]:
    """Distance, NFE, seconds and seconds per 1000 as text, each with the number of its footnote."""
    notes = sheet.footnotes
    texts = {
        "distance": number_of(row.distance.value if row.distance else None),
        "nfe": "–" if row.nfe is None else str(row.nfe),
        "seconds": seconds_of(row.seconds),
        "seconds_per_1000": seconds_of(row.seconds_per_1000),
    }
    return [
        (text, notes.index(row.why[column]) + 1 if column in row.why else None)
        for column, text in texts.items()
    ]
