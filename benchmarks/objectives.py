"""Objectives on real images: what the papers claim of schedules, weightings, predictions and averages.

    weighting     sigmoid, v and eps weighting, all else equal: Fréchet distance
    prediction    v and eps prediction under the same loss: Fréchet distance of few DDIM steps
    adaptive      the adaptive schedule and two fixed ones: images until the same loss
    resolution    digits of 16 and 32 pixels, the cosine schedule and its shift: Fréchet distance. Larger digits repeat
                  pixels and are averaged back to be scored: what the shift is for, and blind to detail
    posthoc       widths of the average made after training, beside the tracked ones: Fréchet distance
    vdm           the bound of one trained model under four schedules of the same ends, one learnt: mean, variance

    python benchmarks/objectives.py weighting prediction adaptive resolution posthoc vdm [--runs runs/benchmarks]

The recipe around the contenders is the quickstart's, which was tuned with sigmoid weighting and v prediction.
Digits, three seeds; a seed trains its own models, each in under four minutes on a core, and draws its own samples.
Models that are trained and figures that are known are kept below --runs: a script that was stopped goes on. Results:
benchmarks/results/objectives_<part>.json, docs/claims.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import ROOT, report
from models import RECIPES, trained
from torch import Tensor

from diffusion_lab.app.build import Loaded, data_module, load_denoiser
from diffusion_lab.app.runs.weights import averages_of
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.images import to_float, to_uint8
from diffusion_lab.losses.denoising import eps_error
from diffusion_lab.losses.weightings import SigmoidWeighting
from diffusion_lab.metrics.features import UpsampledDigitsCNN
from diffusion_lab.metrics.frechet import frechet_from_stats
from diffusion_lab.metrics.stats import gaussian_stats
from diffusion_lab.modules.checkpoint_io import load_checkpoint
from diffusion_lab.process.schedules import Cosine, LinearBeta, LinearLogSNR
from diffusion_lab.rng import StepRNG
from diffusion_lab.samplers import DDIM, DPMSolverPP2M, Generation
from diffusion_lab.samplers.grids import uniform_logsnr, uniform_u

N = 1000
SEEDS = (0, 1, 2)
QUIET = ["callbacks=default", "callbacks.sample_grid.every_images=1_000_000_000"]
DIGITS = ["experiment=digits/quickstart", *QUIET]
LARGE = {
    16: ["dataset.size=16", "metrics=digits_upsampled", "model.multipliers=[1,2,2]", "max_images=44_800"],
    32: [
        "dataset.size=32", "metrics=digits_upsampled", "model.multipliers=[1,2,2,2]", "model.channels=16",
        "max_images=32_000",
    ],
}  # fmt: skip
SHIFT = [
    "schedule=shifted_cosine",
    "schedule.reference_size=8",
    "schedule.logsnr_min=-10",
    "schedule.logsnr_max=10",
]
STEADY = [
    "lr_schedule=constant",
    "optimizer.lr=1e-3",
    "callbacks.checkpoints.every_images=6_400",
    "callbacks.checkpoints.keep=99",
]
RECIPES.update(
    {
        "sigmoid": [*DIGITS],
        "eps_mse": [*DIGITS, "weighting=eps_mse"],
        "v_mse": [*DIGITS, "weighting=v_mse"],
        "eps": [*DIGITS, "prediction=eps"],
        "cosine": [*DIGITS, *STEADY, "schedule=cosine_10"],
        "uniform": [*DIGITS, *STEADY, "schedule=linear_logsnr", "schedule.logsnr_min=-10", "schedule.logsnr_max=10"],
        "adaptive": [*DIGITS, *STEADY, "method=adaptive", "schedule=adaptive", "schedule.halflife_images=5_000"],
        "posthoc": ["experiment=digits/posthoc_ema", *QUIET[1:]],
        "vdm": ["experiment=vdm/digits", *QUIET, "max_images=51_200"],
        **{f"plain{s}": [*DIGITS, *words, "weighting=eps_mse"] for s, words in LARGE.items()},
        **{f"shifted{s}": [*DIGITS, *words, "weighting=eps_mse", *SHIFT] for s, words in LARGE.items()},
    }
)  # fmt: skip


# ---- what is measured ----------------------------------------------------------------------------------------


@cache
def reference() -> Any:
    """Statistics of the test images' features."""
    test, _ = data_module(
        {"dataset": {"_target_": "diffusion_lab.data.digits.Digits", "batch_size": 1, "seed": 0}}
    ).test_images()
    return gaussian_stats(UpsampledDigitsCNN()(test))


def distance(loaded: Loaded, generation: Generation, seed: int, first: int = 0) -> float:
    """Fréchet distance of N samples to the test images."""
    images = []
    for start in range(0, N, 100):
        seeds = [seed * 2**20 + first + start + i for i in range(100)]
        cond = {"label": torch.arange(100) % 10}
        with torch.no_grad():
            images.append(to_uint8(torch.nan_to_num(generation(loaded.denoiser, seeds=seeds, cond=cond))))
    return frechet_from_stats(gaussian_stats(UpsampledDigitsCNN()(torch.cat(images))), reference())


def recipe(size: int = 8, steps: int = 16, **options: Any) -> Generation:
    """The quickstart's way of sampling."""
    return Generation(
        **{
            "sampler": DPMSolverPP2M(),
            "grid": uniform_logsnr(-10.0, 10.0, steps),
            "guidance": lambda d: ClassifierFree(d, scale=1.2),
            "shape": (1, size, size),
            **options,
        }
    )


def weighting(runs: Path, seed: int) -> dict[str, float]:
    """Distances under three weightings."""
    return {
        name: distance(load_denoiser(trained(runs, name, seed)), recipe(), seed)
        for name in ("sigmoid", "v_mse", "eps_mse")
    }


def prediction(runs: Path, seed: int) -> dict[str, float]:
    """Distances of few steps of two predictions, and of many."""
    found = {}
    for name, run in (("v", "sigmoid"), ("eps", "eps")):
        loaded = load_denoiser(trained(runs, run, seed))
        for steps in (2, 4, 8, 64):
            generation = recipe(
                sampler=DDIM(), grid=uniform_u(Cosine(logsnr_min=-10.0, logsnr_max=10.0), steps)
            )
            found[f"{name}, {steps} steps"] = distance(loaded, generation, seed)
    return found


def evaluated_loss(loaded: Loaded) -> float:
    """The sigmoid-weighted loss on the test images: 64 levels of an even grid a batch, the same noise for everybody."""
    test, labels = data_module(loaded.config).test_images()
    x0, weight, total = to_float(test), SigmoidWeighting(bias=0.0), 0.0
    levels = torch.linspace(-10, 10, 64, dtype=torch.float64)
    with torch.no_grad():
        for k, level in enumerate(levels):
            rng = StepRNG(seed=0, step=k, positions=slice(None), total=len(x0))
            logsnr = level.expand(len(x0))
            eps = rng.randn("noise", x0.shape[1:])
            error = eps_error(loaded.denoiser, x0, eps, logsnr, {"label": labels})
            total += float((0.5 * weight(logsnr) * error).mean()) * 20.0 / len(levels)
    return total


def adaptive(runs: Path, seed: int) -> dict[str, float]:
    """Images that each schedule needs to reach the least loss that all of them reach."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for name in ("adaptive", "cosine", "uniform"):
        folder, curve = trained(runs, name, seed), []
        loaded = load_denoiser(folder)
        for path in sorted((folder / "checkpoints").glob("images-*.ckpt")):
            checkpoint = load_checkpoint(path)
            loaded.denoiser.load_state_dict(averages_of(checkpoint)["ema"])
            curve.append((float(checkpoint["images_seen"]), evaluated_loss(loaded)))
        curves[name] = curve
    goal = max(min(loss for _, loss in curve) for curve in curves.values())
    found = {"loss reached": goal}
    for name, curve in curves.items():
        found[f"{name}: images"] = reached(curve, goal)
        found[f"{name}: loss at the end"] = curve[-1][1]
    return found


def reached(curve: Sequence[tuple[float, float]], goal: float) -> float:
    """Images at which a curve first goes below a loss, between two checkpoints interpolated."""
    for (n0, l0), (n1, l1) in pairwise(curve):
        if l1 <= goal:
            return n0 + (n1 - n0) * min(1.0, max(0.0, (l0 - goal) / (l0 - l1)))
    return curve[-1][0]


def resolution(runs: Path, seed: int) -> dict[str, float]:
    """Distances at 16 and 32 pixels with the cosine schedule and with its shift, each on its own steps."""
    found = {}
    for size in LARGE:
        for name in ("plain", "shifted"):
            loaded = load_denoiser(trained(runs, f"{name}{size}", seed))
            found[f"{name}, {size} pixels"] = distance(
                loaded, recipe(size, 32, grid=own_steps(loaded, 32)), seed
            )
    return found


def own_steps(loaded: Loaded, steps: int) -> Tensor:
    """Steps uniform in u of the schedule that a model was trained with."""
    import hydra.utils

    return uniform_u(hydra.utils.instantiate(loaded.config["schedule"]), steps)


WIDTHS = (0.02, 0.03, 0.05, 0.075, 0.1, 0.13, 0.16, 0.2, 0.25)


def posthoc(runs: Path, seed: int) -> dict[str, float]:
    """The width that is best on one set of samples, judged on another, beside the tracked width of 0.10."""
    folder = trained(runs, "posthoc", seed)
    search = {w: distance(load_denoiser(folder, f"posthoc_{w:g}"), recipe(), seed) for w in WIDTHS}
    best = min(search, key=search.__getitem__)
    judged = {
        name: distance(load_denoiser(folder, ema), recipe(), seed, first=2**19)
        for name, ema in (("best", f"posthoc_{best:g}"), ("0.10", "power_010"), ("raw", "raw"))
    }
    return {
        **{f"width {w:g}": value for w, value in search.items()},
        "best width": best,
        **{f"{name}, on other samples": value for name, value in judged.items()},
    }


class Rescaled:
    """The part of a schedule between two log-SNRs, run through by u in [0, 1]."""

    def __init__(self, schedule: Any, logsnr_min: float, logsnr_max: float) -> None:
        self.schedule = schedule
        ends = torch.tensor([logsnr_max, logsnr_min], dtype=torch.float64)
        self.first, self.last = (float(u) for u in schedule.inverse(ends))

    def __call__(self, u: Tensor) -> Tensor:
        """Return logsnr."""
        return self.schedule(self.first + u * (self.last - self.first))

    def log_density(self, logsnr: Tensor) -> Tensor:
        """Return log p(logsnr)."""
        return self.schedule.log_density(logsnr) - math.log(self.last - self.first)


def learned(folder: Path) -> Any:
    """The schedule that a run of VDM learnt: it lives in the loss of its newest checkpoint."""
    import hydra.utils

    newest = max((folder / "checkpoints").glob("images-*.ckpt"))
    schedule = hydra.utils.instantiate(load_denoiser(folder).config["schedule"])
    state = load_checkpoint(newest)["state_dict"]
    prefix = "loss.schedule."
    schedule.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return schedule.double().requires_grad_(False)


@torch.no_grad()
def vdm(runs: Path, seed: int) -> dict[str, float]:
    """The diffusion term of the bound, in bits a dimension: its mean under each schedule, and the variance of one draw.

    Levels are drawn independently, as the paper's table of variances has it; a test image is drawn 64 times.
    """
    folder = trained(runs, "vdm", seed)
    loaded, own = load_denoiser(folder), learned(folder)
    low, high = (float(own(torch.tensor(u, dtype=torch.float64))) for u in (1.0, 0.0))
    schedules = {
        "learned": own,
        "linear in log-SNR": LinearLogSNR(logsnr_min=low, logsnr_max=high),
        "cosine": Cosine(logsnr_min=low, logsnr_max=high),
        "linear in beta": Rescaled(LinearBeta(s_min=1e-6), low, high),
    }
    test, labels = data_module(loaded.config).test_images()
    x0, found = to_float(test), {}
    for name, schedule in schedules.items():
        draws = []
        for k in range(64):
            rng = StepRNG(seed=seed, step=k, positions=slice(None), total=len(x0))
            logsnr = schedule(rng.rand("level"))
            error = eps_error(
                loaded.denoiser, x0, rng.randn("noise", x0.shape[1:]), logsnr, {"label": labels}
            )
            draws.append(0.5 * error.double() * torch.exp(-schedule.log_density(logsnr)) / math.log(2.0))
        values = torch.stack(draws)
        found[f"{name}: bits"] = float(values.mean())
        found[f"{name}: standard error"] = float(values.mean(1).std() / math.sqrt(len(values)))
        found[f"{name}: variance"] = float(values.var(0).mean())
    return found


# ---- running ---------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "weighting": weighting, "prediction": prediction, "adaptive": adaptive, "resolution": resolution,
    "posthoc": posthoc, "vdm": vdm,
}  # fmt: skip


def measured(runs: Path, part: str, seed: int) -> dict[str, float]:
    """What a part comes to with one seed; known figures are not measured again."""
    kept = runs / "benchmark" / f"objectives-{part}-{seed}.json"
    if not kept.is_file():
        torch.set_num_threads(1)
        found = PARTS[part](runs, seed)
        kept.write_text(json.dumps(found))
    known: dict[str, float] = json.loads(kept.read_text())
    return known


def main(words: Sequence[str] | None = None) -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmarks")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(words)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the trainings, which run side by side
    (options.runs / "benchmark").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.workers) as pool:
        # a seed's parts share models, so they wait for each other
        jobs = {seed: pool.submit(every_part, options.runs, options.parts, seed) for seed in SEEDS}
        by_seed = {seed: job.result() for seed, job in jobs.items()}
    for part in options.parts:
        seeds = [by_seed[seed][part] for seed in SEEDS]
        rows = []
        for key in seeds[0]:
            values = [found[key] for found in seeds]
            rows.append({"figure": key, f"mean of {len(SEEDS)}": statistics.mean(values), "seeds": values})
        table = [{key: value for key, value in row.items() if key != "seeds"} for row in rows]
        report(
            f"objectives_{part}",
            rows,
            {},
            {"table": table, "measure": f"FD@{N} (digits-cnn) where a distance"},
        )


def every_part(runs: Path, parts: Sequence[str], seed: int) -> dict[str, dict[str, float]]:
    """Measure the parts of one seed, one after the other."""
    found = {}
    for part in parts:
        found[part] = measured(runs, part, seed)
        print(f"seed {seed}: {part} done", flush=True)
    return found


if __name__ == "__main__":
    main()
