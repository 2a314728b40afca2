"""The curves of a run, out of metrics.csv and loss_by_noise_level.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence

import numpy as np

from diffusion_lab.app.report import figures
from diffusion_lab.app.runs.run import RunFolder


def charts(folder: RunFolder, rows: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """Return every chart the files allow, as SVG with a caption.

    Args:
        folder: The run.
        rows: Its metrics.csv.
    """
    found_charts: list[tuple[str, str]] = []

    def curve(name: str) -> tuple[list[float], list[float]]:
        found = [(row["images_seen"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
        return [x for x, _ in found], [y for _, y in found]

    def add(name: str, title: str, caption: str, *, log: bool = False, from_zero: bool = False) -> None:
        x, y = curve(name)
        if x:
            log = log and min(y) > 0
            slug = "".join(c if c.isalnum() else "-" for c in name)
            found_charts.append(
                (figures.line_chart(slug, title, [(title, x, y)], log=log, from_zero=from_zero), caption)
            )

    add("loss", "Loss", "Mean over the interval; logarithmic.", log=True)
    rounds = _noise_levels(folder)
    if rounds:
        found_charts.append(
            (
                figures.noise_level_chart("noise", "Loss by noise level", rounds),
                "Where on the noise axis the loss sits: mean of each bin since the measurement before.",
            )
        )
    for name in sorted({name for row in rows for name in row if name.startswith("fd@")}):
        add(
            name,
            f"Fréchet distance {name.removeprefix('fd')}",
            "During training; not the score above.",
            from_zero=True,
        )
    add("learning_rate", "Learning rate", "With warm-up.", from_zero=True)
    add("gradient_norm", "Gradient norm", "Before clipping.", from_zero=True)
    add("images_per_s", "Throughput, images/s", "Sampling and saving not counted.", from_zero=True)
    return found_charts


def _noise_levels(folder: RunFolder) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Read loss_by_noise_level.csv: images seen, bin edges, losses of each measurement."""
    path = folder.path / "loss_by_noise_level.csv"
    if not path.is_file():
        return []
    by_images: dict[int, list[tuple[float, float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                cells = tuple(float(row[key]) for key in ("logsnr_from", "logsnr_to", "loss"))
                by_images.setdefault(int(row["images_seen"]), []).append((cells[0], cells[1], cells[2]))
            except (KeyError, TypeError, ValueError):
                continue
    out = []
    for images, bins in sorted(by_images.items()):
        edges = np.array([*(b[0] for b in bins), bins[-1][1]])
        out.append((images, edges, np.array([b[2] for b in bins])))
    return out
