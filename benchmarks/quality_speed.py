"""What memory layout, precision, compilation and the fused optimizer do to the speed of the recipe of `quality.py`.

    python benchmarks/quality_speed.py [--steps 30] [--rounds 3] [--only NAME ...]

Every variant is the recipe's own run with one thing changed, as `train.py` would train it, on one thread. Rounds
alternate in one process; a round is timed after its first steps, in which a compiled network is compiled. A ratio is
the recipe's speed over a variant's, the median over rounds: above 1 the recipe chose well.
Results: benchmarks/results/quality_speed.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import diffusion_lab  # noqa: F401  (first: it cures torchvision)

# isort: split

import torch
from common import median_ratio, report
from quality import configured
from train_step import lightning_round

RECIPE = "the recipe"
VARIANTS = {
    RECIPE: (),
    "channels-last": ("method.channels_last=true",),
    "bf16-mixed": ("trainer.precision=bf16-mixed",),
    "compiled": ("method.compile_network=true",),
    "optimizer not fused": ("optimizer.fused=false",),
}
WARMUP = 8
FOREVER = 1_000_000_000


def seconds_of(name: str, steps: int) -> float:
    """Seconds of so many steps of a variant."""
    # the picture at the end of the run is none of its steps
    words = ("~callbacks.sample_grid", *VARIANTS[name])
    return lightning_round(lambda folder: configured(folder, 0, FOREVER, words), steps, WARMUP)


def main(words: Sequence[str] | None = None) -> None:
    """Time all and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    names = dict.fromkeys([RECIPE, *options.only])
    batch = configured(Path("unused"), 0, FOREVER)["batch_size"]
    taken: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(options.rounds + 1):
        for name in names:
            seconds = seconds_of(name, options.steps)
            if round_:  # the first round warms the machine
                taken[name].append(seconds)
        print(f"round {round_} of {options.rounds}: done", flush=True)
    rows = [
        {"variant": name, "images/s": options.steps * batch / statistics.median(own), "rounds": len(own)}
        for name, own in taken.items()
    ]
    ratios = {name: median_ratio(own, taken[RECIPE]) for name, own in taken.items() if name != RECIPE}
    report("quality_speed", rows, ratios)


if __name__ == "__main__":
    main()
