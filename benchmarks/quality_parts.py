"""What each part of the recipe of `quality.py` brings: the recipe with one part changed, for a short budget each.

    python benchmarks/quality_parts.py [--seconds 150] [--seeds 0] [--runs runs/quality_parts] [--only NAME ...]

Every variant trains for the same processor time of one thread, an eighth of the comparison's, and is scored alike: the
Fréchet distance of 1,000 samples in 50 steps of stochastic DDIM. A ratio is a variant's distance over the recipe's, so
above 1 the part is worth having. With one seed, what differs by less than a tenth says nothing. A script that was
stopped goes on; seeds and variants add up in benchmarks/results/quality_parts.json, also where their runs are gone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusion_lab  # noqa: F401  (first: it cures torchvision)

# isort: split

import torch
from common import ROOT, added_to, commit, report
from quality import MARKS, ON_CURVE, OURS, SAMPLERS, N, distance, draw, train_ours, trained

RECIPE = "the recipe"
PARTS = {
    RECIPE: (),
    "batch of 32, not 64": ("batch_size=32", "optimizer.lr=1.4e-3"),
    "batch of 128, not 64": ("batch_size=128", "optimizer.lr=2.8e-3"),
    "learning rate 1e-3, not 2e-3": ("optimizer.lr=1e-3",),
    "learning rate 4e-3, not 2e-3": ("optimizer.lr=4e-3",),
    "constant learning rate, not falling": ("lr_schedule=constant", "~lr_schedule.final"),
    "half-life average, not power": ("averages=ema",),
    "weighting eps_mse, not sigmoid": ("weighting=eps_mse",),
    "weighting snr_plus_one, not sigmoid": ("weighting=snr_plus_one",),
    "16 channels on pixels, not 32 on patches of 2": (
        "model.patch=1",
        "model.channels=16",
        "model.multipliers=[1,2,2]",
    ),
}


def place(runs: Path, name: str, seed: int) -> Path:
    """Folder of a variant."""
    return runs / f"{name.replace(' ', '_').replace(',', '')}-{seed}"


def run(name: str, seed: int, runs: Path, seconds: float) -> None:
    """Train and score a variant, unless that is known."""
    folder, words = place(runs, name, seed), PARTS[name]
    if not (folder / "score.json").is_file():
        train_ours(seed, folder, seconds, words)
        denoiser, grid = trained(OURS, folder, MARKS[-1], words)
        sampler, steps = SAMPLERS[ON_CURVE]
        facts = json.loads((folder / f"{MARKS[-1]}.json").read_text())
        facts["commit"] = commit()
        facts["fd"] = distance(draw(denoiser, grid(steps), sampler, N), runs)
        (folder / "score.json").write_text(json.dumps(facts))
    print(f"{name}, seed {seed}: done", flush=True)


def by_seed(runs: Path, seconds: float, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What is known here of each variant and seed."""
    files = {(name, seed): place(runs, name, seed) / "score.json" for name in PARTS for seed in seeds}
    return [
        {"variant": name, "seed": seed, "budget": seconds, **json.loads(file.read_text())}
        for (name, seed), file in files.items()
        if file.is_file()
    ]


def summary(each: Sequence[dict[str, Any]], seconds: float) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and ratios of what is known."""
    rows, ratios, best = [], {}, {}
    for name in PARTS:
        found = [one for one in each if (one["variant"], one["budget"]) == (name, seconds)]
        if not found:
            continue
        means = {key: statistics.mean(one[key] for one in found) for key in ("fd", "images", "seconds")}
        best[name] = means["fd"]
        row = {"variant": name, "parameters, M": found[0]["parameters"] / 1e6}
        row |= {"images a CPU-second": means["images"] / means["seconds"], f"FD@{N}": means["fd"]}
        rows.append(row | {"seeds": len(found)})
        if name != RECIPE and RECIPE in best:
            ratios[name] = means["fd"] / best[RECIPE]
    return rows, ratios


def main(words: Sequence[str] | None = None) -> None:
    """Train and score what is asked for, and report on all that is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality_parts")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    runs = options.runs.resolve() / f"{options.seconds:g}s"
    runs.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.only:
            run(name, seed, runs, options.seconds)
    each = added_to(
        "quality_parts", by_seed(runs, options.seconds, options.seeds), ("variant", "seed", "budget")
    )
    report("quality_parts", *summary(each, options.seconds), {"by_seed": each})


if __name__ == "__main__":
    main()
