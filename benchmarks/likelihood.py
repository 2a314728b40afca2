"""Bits per dimension of three models on their test images: the bound, in continuous time and of T steps, and the ODE.

    digits, quickstart      a model trained for samples (sigmoid weighting, log-SNR -10 to 10)
    digits, VDM             trained by the bound, with end points that learn, a few minutes of a core
    MNIST, VDM              experiment=vdm/mnist, nine minutes of a core

    python benchmarks/likelihood.py [--runs runs/benchmarks] [--only "digits, VDM"] [--images 64]

MNIST is looked for below DIFFUSION_LAB_DATA and left out without it. Models that are trained and blocks that are
measured are kept below --runs: a script that was stopped goes on. Everything is one seed; the intervals are over test
images, and say nothing of another training. The ODE's log p is estimated with one probe of Hutchinson's.

Ratios: the bound over the least of the ODE's, on the same images, upper bounds both of -log2 P(x), by one network's SDE
and its ODE; and, where the schedule learnt, the standard deviation of the bound from one level drawn uniform in
log-SNR over that of one drawn by the schedule. Results: docs/likelihood.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, report
from models import RECIPES, trained
from objectives import QUIET

from diffusion_lab.data.errors import DataError
from diffusion_lab.data.mnist import MNIST

RECIPES["vdm_mnist"] = ["experiment=vdm/mnist", *QUIET[1:]]
MODELS = {"digits, quickstart": "sigmoid", "digits, VDM": "vdm", "MNIST, VDM": "vdm_mnist"}
BOUNDS = {
    "bound, continuous": ["metrics=bpd"],
    "bound, T = 10": ["metrics=bpd_discrete", "metrics.steps=10", "metrics.draws=10"],
    "bound, T = 100": ["metrics=bpd_discrete", "metrics.steps=100"],
    "bound, T = 1000": ["metrics=bpd_discrete", "metrics.steps=1000"],
}
ODES = {
    "ODE, truncated normal": ["metrics=bpd_ode"],
    "ODE, uniform": ["metrics=bpd_ode", "metrics.dequantisation=uniform"],
    "ODE, variational": [
        "metrics=bpd_ode",
        "metrics.dequantisation=variational",
        "metrics.dequantisation_images=20_000",
    ],
}
# test images by model: of the bound, of the ODE
# steps looked at an image, of many; a schedule that was not made for the bound has few that matter
DRAWS = {"sigmoid": 100, "vdm": 100, "vdm_mnist": 16}
IMAGES = {"sigmoid": (360, 360), "vdm": (360, 360), "vdm_mnist": (1000, 64)}


def has_mnist() -> bool:
    """Whether MNIST can be read here."""
    root = os.environ.get("DIFFUSION_LAB_DATA")
    try:
        return (
            root is not None
            and len(MNIST(root=root, batch_size=1, seed=0, download=False).source("test")) > 0
        )
    except DataError:
        return False


def measured(run: Path, words: Sequence[str], images: int, out: Path) -> dict[str, Any]:
    """Return the record of one measure, from the command line's own file; one that is there is not made again."""
    asked = [f"run={run}", f"num_images={images}", f"out={out}", *words]
    found = known(out, asked)
    if found is None:
        subprocess.run([sys.executable, "evaluate.py", *asked], cwd=ROOT, check=True)
        found = known(out, asked)
        assert found is not None
    return found


def known(out: Path, asked: Sequence[str]) -> dict[str, Any] | None:
    """Return the record that a command line came to, if it did."""
    try:
        evaluations = json.loads((out / "metrics.json").read_text())["evaluations"]
    except (OSError, ValueError):
        return None
    for evaluation in reversed(evaluations):
        if sorted(shlex.split(evaluation["command"])[2:]) == sorted(asked):
            with np.load(Path(evaluation["images"]) / "images.npz") as stored:
                return {**evaluation["records"][0], "images": stored["value"]}
    return None


def main(words: Sequence[str] | None = None) -> None:
    """Train, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmarks")
    parser.add_argument("--only", choices=list(MODELS), action="append")
    parser.add_argument("--images", type=int, help="at most so many test images")
    options = parser.parse_args(words)
    options.runs = options.runs.resolve()
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for name, recipe in MODELS.items():
        if options.only and name not in options.only:
            continue
        if recipe == "vdm_mnist" and not has_mnist():
            print("MNIST, VDM: left out, DIFFUSION_LAB_DATA does not lead to MNIST")
            continue
        run = trained(options.runs, recipe, 0)
        found = {}
        # on large images a dequantisation that is learned first would take longest
        measures = {
            measure: [*words, f"metrics.draws={DRAWS[recipe]}"] if "T = 100" in measure else words
            for measure, words in BOUNDS.items()
        }
        measures |= ODES if recipe != "vdm_mnist" else dict(list(ODES.items())[:2])
        for measure, given in measures.items():
            images = min(IMAGES[recipe][measure in ODES], options.images or 10**9)
            out = (
                options.runs
                / "benchmark"
                / "likelihood"
                / f"{recipe}-{re.sub('[^a-z0-9]+', '-', measure.lower())}"
            )
            found[measure] = told = measured(run, given, images, out)
            rows.append(
                {
                    "model": name,
                    "measure": measure,
                    "bits/dim": told["value"],
                    "95 %": f"± {(told['interval_95'][1] - told['interval_95'][0]) / 2:.3f}",
                    **{term: part["value"] for term, part in told["terms"].items()},
                    "images": told["n"],
                    "calls an image": told["source"]["nfe"],
                }
            )
        bound = found["bound, continuous"]
        best = min(
            (told for measure, told in found.items() if measure in ODES), key=lambda told: told["value"]
        )
        # on the same images
        ratios[f"{name}: bound over ODE"] = float(bound["images"][: best["n"]].mean()) / best["value"]
        if "learnt" in bound["protocol"]["schedule"]:
            drawn = bound["deviation_of_one_draw"]
            ratios[f"{name}: deviation, uniform over learnt"] = (
                drawn["uniform in log-SNR"] / drawn["the run's schedule"]
            )
    shown = [
        {
            **{key: row[key] for key in ("model", "measure")},
            "bits/dim": f"{row['bits/dim']:.3f} {row['95 %']}",
            "terms": ", ".join(
                f"{key} {row[key]:.3f}"
                for key in ("prior", "reconstruction", "diffusion", "density", "dequantisation")
                if key in row
            ),
            **{key: row[key] for key in ("images", "calls an image")},
        }
        for row in rows
    ]
    report("likelihood", rows, ratios, {"table": shown})


if __name__ == "__main__":
    main()
