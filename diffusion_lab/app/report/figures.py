"""Pictures for the report: charts as SVG that follow the page's colours, samples as PNG.

Matplotlib draws the charts in stand-in colours, which become CSS variables in the SVG text, so one chart serves the
light and the dark page. Texts stay texts, so the file is small and can be searched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

# stand-ins, found again in the SVG
INK, FAINT, LINE = "#010203", "#0a0b0c", "#0d0e0f"
SERIES = ["#a10001", "#a10002", "#a10003", "#a10004"]
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


def points_png(sets: Sequence[tuple[str, np.ndarray, np.ndarray | None]], *, most: int = 4000) -> bytes:
    """Draw sets of points side by side on the same axes, coloured by label.

    Args:
        sets: Title, points `(N, D)` of which the first two coordinates are drawn, labels `(N,)` or None.
        most: Points drawn of each set.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    everything = np.concatenate([points[:most] for _, points, _ in sets])
    low, high = (np.percentile(everything, q) for q in (0.2, 99.8))
    room = 0.1 * (high - low) + 1e-6
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
                s=2.5,
                c=colours,
                cmap="tab10",
                vmin=0,
                vmax=9,
                linewidths=0,
            )
            axes.set(
                xlim=(low - room, high + room),
                ylim=(low - room, high + room),
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
