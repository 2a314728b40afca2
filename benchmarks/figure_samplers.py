"""Draw docs/images/samplers.png from the results of benchmarks/samplers.py: error and distance by cost.

python benchmarks/figure_samplers.py
"""

from __future__ import annotations

import json

import matplotlib as mpl
import matplotlib.pyplot as plt
from common import RESULTS, ROOT

PANELS = (
    ("samplers_exact", "RMSE", "64-D mixture: error against the ODE"),
    ("samplers_digits", "RMSE", "digits 8x8: error against the network's ODE"),
    ("samplers_digits", "FD@", "digits 8x8: Fréchet distance"),
    ("samplers_mnist", "FD@", "MNIST 28x28: Fréchet distance"),
)
SHOWN = {
    "ddim": "#8a8f98", "addim": "#b58900", "heun": "#6a8d3a", "dpmpp_2m": "#1f6f8b", "dpmpp_3m": "#2aa198",
    "unipc": "#c8553d", "deis": "#8a5fa8", "dpm_solver_v3": "#d33682", "covariance": "#111318",
    "dpmpp_2m_sde": "#5b7fde",
}  # fmt: skip


def main() -> None:
    """Draw one panel for each result that is there."""
    found = [panel for panel in PANELS if (RESULTS / f"{panel[0]}.json").is_file()]
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.6))
    for (name, figure_name, title), panel in zip(found, axes.flat, strict=False):
        rows = json.loads((RESULTS / f"{name}.json").read_text())["figures"]["rows"]
        for sampler, colour in SHOWN.items():
            best: dict[int, tuple[int, float]] = {}
            for row in rows:
                value = next((row[key] for key in row if key.startswith(figure_name)), None)
                if row["sampler"] == sampler and row["by"] == "diffusion_lab" and value is not None:
                    if row["budget"] not in best or value < best[row["budget"]][1]:
                        best[row["budget"]] = (row.get("NFE", row["budget"]), value)
            if best:
                points = sorted(best.values())
                panel.plot(*zip(*points, strict=True), "o-", ms=3.5, lw=1.3, color=colour, label=sampler)
        panel.set(xscale="log", yscale="log", xlabel="evaluations of the denoiser", title=title)
        panel.set_xticks([5, 8, 10, 15, 20, 50], ["5", "8", "10", "15", "20", "50"])
        panel.minorticks_off()
        if figure_name == "FD@":
            # what diverges leaves the panel, so that the others part
            lowest = min(line.get_ydata().min() for line in panel.lines)
            panel.set_ylim(0.95 * lowest, 4 * lowest)
        panel.grid(alpha=0.25)
    # the distances have all samplers, the errors only those of the ODE
    handles, labels = axes.flat[len(found) - 1].get_legend_handles_labels()
    axes[0, 1].legend(handles, labels, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    out = ROOT / "docs" / "images" / "samplers.png"
    figure.savefig(out, dpi=130)
    print(out)


if __name__ == "__main__":
    main()
