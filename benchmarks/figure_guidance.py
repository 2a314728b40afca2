"""Draw docs/images/guidance.png from the results of benchmarks/guidance.py: fidelity against diversity.

python benchmarks/figure_guidance.py
"""

from __future__ import annotations

import json
import statistics

import matplotlib as mpl
import matplotlib.pyplot as plt
from common import RESULTS, ROOT

PARTS = {"guidance_digits": "digits 8x8", "guidance_mnist": "MNIST 28x28"}
LINES = {
    ("cfg", "everywhere"): ("constant", "#1f6f8b", "o"),
    ("cfg", "[-3, 5]"): ("in log-SNR [-3, 5]", "#c8553d", "s"),
    ("cfg", "[-1, 3]"): ("in log-SNR [-1, 3]", "#6a8d3a", "D"),
    ("autoguidance", "everywhere"): ("autoguidance", "#8a5fa8", "^"),
    ("cfg + dynamic threshold", "everywhere"): ("constant + dynamic threshold", "#8a8f98", "v"),
}
PANELS = (
    ("accuracy", "FD", "share recognised as the class asked for", "Fréchet distance"),
    ("precision", "recall", "precision", "recall"),
)


def main() -> None:
    """Draw a row for each result that is there; bars are the range over seeds."""
    found = {name: title for name, title in PARTS.items() if (RESULTS / f"{name}.json").is_file()}
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(len(found), 2, figsize=(10.0, 3.9 * len(found)), squeeze=False)
    for row, (name, title) in zip(axes, found.items(), strict=True):
        result = json.loads((RESULTS / f"{name}.json").read_text())["figures"]["rows"]
        for ax, (x, y, x_label, y_label) in zip(row, PANELS, strict=True):
            for key, (label, colour, marker) in LINES.items():
                points = sorted(
                    (item for item in result if (item["method"], item["interval"]) == key),
                    key=lambda item: item["scale"],
                )
                if not points:
                    continue
                xs, ys = ([statistics.mean(s[k] for s in item["seeds"]) for item in points] for k in (x, y))
                spread = [[s[y] for s in item["seeds"]] for item in points]
                low = [m - min(values) for m, values in zip(ys, spread, strict=True)]
                high = [max(values) - m for m, values in zip(ys, spread, strict=True)]
                ax.errorbar(
                    xs,
                    ys,
                    yerr=[low, high],
                    color=colour,
                    marker=marker,
                    ms=4.5,
                    lw=1.3,
                    elinewidth=0.7,
                    label=label,
                )
                for item, px, py in zip(points, xs, ys, strict=True):
                    ax.annotate(
                        f"{item['scale']:g}", (px, py), (3, 4), textcoords="offset points", fontsize=7
                    )
            ax.set(xlabel=x_label, ylabel=y_label, title=title)
            if y == "FD":
                ax.set_yscale("log")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle("Guidance by scale (the numbers): mean over three seeds, bars their range", fontsize=10)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "guidance.png", dpi=130)


if __name__ == "__main__":
    main()
