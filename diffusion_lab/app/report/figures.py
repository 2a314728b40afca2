"""Pictures for the report: charts as SVG that follow the page's colours, samples as PNG.

Matplotlib draws the charts in stand-in colours, which become CSS variables in the SVG text, so one chart serves the
light and the dark page. Texts stay texts, so the file is small and can be searched.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# stand-ins, found again in the SVG
INK, FAINT, LINE = "#010203", "#0a0b0c", "#0d0e0f"
SERIES = [f"#a1000{k}" for k in range(1, 9)]
VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    LINE: "--rule",
    **{c: f"--series-{i + 1}" for i, c in enumerate(SERIES)},
}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlepad": 10,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "ytick.left": False,
    "ytick.minor.left": False,
    "text.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": FAINT,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}
SIZE = (5.6, 2.9)
MARKERS = "osD^vPX*"


def tile(images: np.ndarray, columns: int, *, smallest: int = 480, gap: int = 1) -> Image.Image:
    """Lay images out in rows on a transparent sheet.

    Args:
        images: uint8 `(N, H, W, C)`, C being 1 or 3.
        columns: Images in a row.
        smallest: Small sheets are enlarged by a whole factor to about this width.
        gap: Pixels between images, before that.
    """
    n, height, width, channels = images.shape
    colour = images[..., :3] if channels >= 3 else np.repeat(images[..., :1], 3, axis=-1)
    rows = -(-n // columns)
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), dtype=np.uint8)
    for i, image in enumerate(colour):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width, :3] = image
        sheet[top : top + height, left : left + width, 3] = 255
    picture = Image.fromarray(sheet)
    factor = max(1, round(smallest / picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _figure(width: float = SIZE[0], height: float = SIZE[1]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.set_axisbelow(True)
    return figure, axes


def svg(figure: Any, name: str) -> str:
    """Return a figure as SVG to put into a page: no prolog, page colours, ids of its own, width left to the page.

    Args:
        figure: The matplotlib figure.
        name: What makes ids different from those of other figures of the page.
    """
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # the width and height in points give way to the page's
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return re.sub(r"font: ([^;]*?)'[^;\"]*", r"font: \1'Inter', system-ui, sans-serif", text)


def _images_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def short(value: float, _: object) -> str:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:g}{letter}"
        return f"{value:g}"

    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.set_xlabel("images seen")


def line_chart(
    name: str,
    title: str,
    series: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    log: bool = False,
    from_zero: bool = False,
) -> str:
    """Draw curves over images seen.

    Args:
        name: Id of the chart on the page.
        title: Its title.
        series: Label, images seen, values of each curve.
        log: Whether the values' axis is logarithmic.
        from_zero: Whether it starts at zero.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure, axes = _figure()
        for (label, x, y), colour in zip(series, SERIES, strict=False):
            dots = "o" if len(x) < 12 else None
            axes.plot(x, y, color=colour, label=label, marker=dots, markersize=3.5)
        axes.set_title(title)
        if log:
            axes.set_yscale("log")
            _plain_log_axis(axes)
        if from_zero and not log:
            axes.set_ylim(bottom=0)
        if len(series) > 1:
            axes.legend(loc="best", fontsize=9)
        axes.set_xlim(left=0)
        _images_axis(axes)
        return svg(figure, name)


def _plain_log_axis(axes: Any) -> None:
    """Write 0.2 and not 2 x 10^-1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    narrow = high / low < 30
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if narrow else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True)
class Series:
    """Points of one kind: label, coordinates, and the numbers of their colour and marker."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    marker: int = 0


def scatter_chart(
    name: str,
    series: Sequence[Series],
    *,
    labels: tuple[str, str],
    best: tuple[float, float] | None = None,
    floor: float | None = None,
) -> str:
    """Draw points, those of one series joined in their order: what was reached against what it cost.

    Logarithmic axes: where costs span more than a factor of 5, results (with the floor) more than 20.

    Args:
        name: Id of the chart on the page.
        series: The points.
        labels: Of both axes.
        best: The point to mark.
        floor: A level to draw as a line: that of real data.
    """
    import matplotlib as mpl
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    every_x = sorted({x for one in series for x in one.x})
    levels = [y for one in series for y in one.y] + ([floor] if floor is not None else [])
    with mpl.rc_context({**STYLE, "axes.grid.axis": "both", "font.size": 11.5}):
        figure, axes = _figure(9.2, 4.1)
        for one in series:
            axes.plot(
                one.x,
                one.y,
                color=SERIES[one.colour % len(SERIES)],
                marker=MARKERS[one.marker % len(MARKERS)],
                markersize=7,
                linewidth=1.4,
                label=one.label,
            )
        if min(every_x) > 0 and max(every_x) >= 5 * min(every_x):
            axes.set_xscale("log")
        if min(levels) > 0 and max(levels) > 20 * min(levels):
            axes.set_yscale("log")
            _plain_log_axis(axes)
        else:
            axes.set_ylim(bottom=min(0.0, *levels), top=1.08 * max(levels))
        if best is not None:
            axes.plot(
                *best, "o", markersize=15, fillstyle="none", color=INK, markeredgewidth=1.3, label="best"
            )
        if floor is not None:
            axes.axhline(floor, color=FAINT, linewidth=1.2, linestyle=(0, (5, 3)), label="real data")
        if len(every_x) <= 12:
            axes.xaxis.set_major_locator(FixedLocator(_apart(every_x, axes.get_xscale() == "log")))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.margins(x=0.06)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        figure.legend(loc="outside right upper", labelspacing=0.7)
        return svg(figure, name)


def _apart(values: Sequence[float], log: bool) -> list[float]:
    """Leave out values whose labels would touch that of the one before."""
    scale = math.log if log else float
    kept = [values[0]]
    for value in values[1:]:
        if scale(value) - scale(kept[-1]) >= 0.05 * (scale(values[-1]) - scale(values[0])):
            kept.append(value)
    return kept


def noise_level_chart(name: str, title: str, rounds: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> str:
    """Draw the loss over log-SNR, an early measurement, a middle one and the last.

    Args:
        name: Id of the chart on the page.
        title: Its title.
        rounds: Images seen, bin edges `(K + 1,)`, loss `(K,)` with nan where no example fell, oldest first.
    """
    import matplotlib as mpl

    chosen = sorted({0, len(rounds) // 2, len(rounds) - 1})
    with mpl.rc_context(STYLE):
        figure, axes = _figure()
        for place, index in enumerate(chosen):
            images, edges, loss = rounds[index]
            last = index == chosen[-1]
            axes.plot(
                (edges[1:] + edges[:-1]) / 2,
                loss,
                color=SERIES[0] if last else FAINT,
                alpha=1.0 if last else 0.35 + 0.25 * place,
                linewidth=1.9 if last else 1.2,
                marker="o",
                markersize=3.5 if last else 2.0,
                label=f"up to {images:,} images",
            )
        axes.set_title(title)
        axes.set_xlabel("log-SNR  (noise ← → clean)")
        axes.set_ylim(bottom=0)
        axes.legend(loc="best", fontsize=9)
        return svg(figure, name)


def points_png(
    sets: Sequence[tuple[str, np.ndarray, np.ndarray | None]],
    *,
    most: int = 4000,
    extent: tuple[float, float] | None = None,
) -> bytes:
    """Draw sets of points side by side on the same axes, coloured by label.

    Args:
        sets: Title, points `(N, D)` of which the first two coordinates are drawn, labels `(N,)` or None.
        most: Points drawn of each set.
        extent: Lower and upper end of both axes; None takes that of the points.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    low, high = extent or points_extent([points[:most] for _, points, _ in sets])
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(4.2 * len(sets), 4.2), layout="constrained", dpi=130)
        figure.patch.set_facecolor("white")
        for index, (title, points, labels) in enumerate(sets):
            axes = figure.add_subplot(1, len(sets), index + 1)
            xy = points[:most, :2] if points.shape[1] > 1 else np.pad(points[:most], ((0, 0), (0, 1)))
            one_colour = labels is None or bool((labels < 0).all())
            colours = np.zeros(len(xy)) if one_colour or labels is None else labels[:most]
            axes.scatter(
                xy[:, 0],
                xy[:, 1],
                s=2.5 * min(3.0, max(1.0, 2000 / len(xy))),
                c=colours,
                cmap="tab10",
                vmin=0,
                vmax=9,
                linewidths=0,
            )
            axes.set(
                xlim=(low, high),
                ylim=(low, high),
                aspect="equal",
                xticks=[],
                yticks=[],
            )
            axes.set_title(title, color="#222222")
            for side in axes.spines.values():
                side.set_visible(True)
                side.set_color("#dddddd")
        out = io.BytesIO()
        figure.savefig(out, format="png")
    return out.getvalue()


def points_extent(sets: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the ends of axes on which nearly all points of all sets have room."""
    low, high = np.percentile(np.concatenate([points.ravel() for points in sets]), [0.2, 99.8])
    room = 0.1 * (high - low) + 1e-6
    return float(low - room), float(high + room)
