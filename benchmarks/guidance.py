"""Guidance on real images: fidelity against diversity, and what the papers claim of it.

    digits    the quickstart's model, trained with three seeds
    mnist     a model of MNIST, three sampling seeds; needs DIFFUSION_LAB_DATA

Each setting draws the same seeds, by the sampler and grid that the run recorded, and is judged by Fréchet distance,
the share recognised as the class asked for, precision (fidelity) and recall (diversity), all against real test images
on the features of a small classifier. Weak models, for autoguidance, are smaller and trained for a quarter. For
inpainting the right half of test images is missing and no class is given: the class is that of the test image.

    python benchmarks/guidance.py digits mnist [--runs runs/benchmarks] [--workers 2]

Results: benchmarks/results/guidance_<part>.json; docs/images/guidance.png is drawn from them by figure_guidance.py.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, report
from models import RECIPES, extractor, loaded, trained
from torch import Tensor

from diffusion_lab.app.build import data_module, generation_of, load_denoiser
from diffusion_lab.guidance import AutoGuidance, ClassifierFree, DynamicThreshold
from diffusion_lab.images import to_float, to_uint8
from diffusion_lab.measurements import Inpaint
from diffusion_lab.metrics.frechet import frechet_from_stats
from diffusion_lab.metrics.neighbours import precision_recall
from diffusion_lab.metrics.stats import gaussian_stats
from diffusion_lab.posterior import ReconstructionGuidance, Replacement
from diffusion_lab.samplers import Generation
from diffusion_lab.typing import MEASUREMENT, NO_LABEL

EVERYWHERE = (-math.inf, math.inf)
# log-SNRs; in EDM's noise levels sigma = exp(-logsnr / 2): 0.08 to 4.5, and 0.22 to 1.6
INTERVALS = {"everywhere": EVERYWHERE, "[-3, 5]": (-3.0, 5.0), "[-1, 3]": (-1.0, 3.0)}
SCALES = {"digits": (1.0, 1.5, 2.0, 3.0, 5.0, 8.0), "mnist": (1.0, 2.0, 4.0, 8.0)}
WEAK = {
    "digits": ["model.channels=16", "max_images=22400"],
    "mnist": ["model.channels=8", "model.head_channels=8", "max_images=25600"],
}
RECIPES.update({f"{part}-weak": [*RECIPES[part], *words] for part, words in WEAK.items()})
HALF = Inpaint(mask="half", side="right")
N = {"digits": 400, "mnist": 128}


@dataclass(frozen=True)
class Setting:
    """One point of the sweep."""

    method: str
    scale: float
    interval: str = "everywhere"


def settings(part: str) -> list[Setting]:
    """All points of a part."""
    scales = SCALES[part]
    found = [Setting("cfg", scale) for scale in scales]
    found += [Setting("cfg", s, i) for s in scales if s > 1 for i in INTERVALS if i != "everywhere"]
    found += [Setting("autoguidance", scale) for scale in scales if 1 < scale < 5]
    found += [Setting("cfg + dynamic threshold", scale) for scale in scales if scale >= 5]
    found += [Setting("replacement", 0.0), *(Setting("reconstruction", w) for w in (1.0, 2.0))]
    return found


@cache
def weak(runs: Path, part: str, seed: int) -> Any:
    """The weak model beside the one of this seed."""
    return load_denoiser(trained(runs, f"{part}-weak", seed)).denoiser


def factory(setting: Setting, runs: Path, part: str, model_seed: int) -> Callable[[Any], Any]:
    """What wraps the denoiser."""
    interval = INTERVALS[setting.interval]
    match setting.method:
        case "cfg":
            return partial(ClassifierFree, scale=setting.scale, interval=interval)
        case "autoguidance":
            return partial(AutoGuidance, weak=weak(runs, part, model_seed), scale=setting.scale)
        case "cfg + dynamic threshold":
            return lambda d: DynamicThreshold(ClassifierFree(d, setting.scale), quantile=0.995)
        case "replacement":
            return partial(Replacement, operator=HALF)
        case "reconstruction":
            return partial(ReconstructionGuidance, operator=HALF, weight=setting.scale, replace=True)
    raise ValueError(setting.method)


def judged(runs: Path, part: str, setting: Setting, seed: int) -> dict[str, float]:
    """Draw one setting with one seed and judge it."""
    model_seed = seed if part == "digits" else 0
    folder = trained(runs, part, model_seed)
    denoiser, _, _, reference = loaded(folder)
    config = load_denoiser(folder).config
    recipe: Generation = generation_of(config)
    guidance = factory(setting, runs, part, model_seed)
    test, test_labels = data_module(config).test_images()
    n, inpaint = N[part], setting.method in ("replacement", "reconstruction")
    known = to_float(test)
    images, asked = [], []
    for first in range(0, n, 100):
        rows = torch.arange(first, min(first + 100, n))
        seeds = [seed * 2**20 + int(i) for i in rows]
        if inpaint:
            which = rows % len(test)
            cond = {"label": torch.full((len(rows),), NO_LABEL), MEASUREMENT: HALF(known[which])}
            labels = test_labels[which]
        else:
            labels = rows % 10
            cond = {"label": labels}
        wrapped = Generation(sampler=recipe.sampler, grid=recipe.grid, guidance=guidance, shape=recipe.shape)
        with torch.no_grad():
            images.append(to_uint8(torch.nan_to_num(wrapped(denoiser, seeds=seeds, cond=cond))))
        asked.append(labels)
    return judge(torch.cat(images), torch.cat(asked), test, reference)


@torch.no_grad()
def judge(images: Tensor, labels: Tensor, test: Tensor, reference: Any) -> dict[str, float]:
    """Fréchet distance, accuracy, precision and recall of images."""
    features = extractor(tuple(test.shape[1:]))
    found, logits = features.features_and_logits(images)
    # as many real images as samples, or both depend on the numbers
    real = features(test[torch.linspace(0, len(test) - 1, min(len(test), len(images))).long()])
    precision, recall = precision_recall(found[: len(real)], real)
    accuracy = float((logits.argmax(1) == labels).double().mean())
    return {
        "FD": frechet_from_stats(gaussian_stats(found), reference),
        "accuracy": accuracy,
        "precision": precision,
        "recall": recall,
    }


def run(part: str, options: argparse.Namespace) -> None:
    """Judge every setting with three seeds."""
    torch.set_num_threads(1)
    for seed in range(3) if part == "digits" else (0,):
        trained(options.runs, part, seed)
        trained(options.runs, f"{part}-weak", seed)
    tasks = [(setting, seed) for setting in settings(part) for seed in range(3)]
    with ProcessPoolExecutor(options.workers) as pool:
        results = []
        jobs = pool.map(judged, *zip(*((options.runs, part, s, seed) for s, seed in tasks), strict=True))
        for k, found in enumerate(jobs):
            results.append(found)
            if k % 10 == 0:
                print(f"{part} {k}/{len(tasks)}", flush=True)
    groups: dict[Setting, list[dict[str, float]]] = {}
    for (setting, _), found in zip(tasks, results, strict=True):
        groups.setdefault(setting, []).append(found)
    rows: list[dict[str, Any]] = []
    for setting, found in groups.items():
        row: dict[str, Any] = {"method": setting.method, "scale": setting.scale, "interval": setting.interval}
        for key in found[0]:
            name = f"FD@{N[part]}" if key == "FD" else key
            row[name] = statistics.mean(f[key] for f in found)
        row["seeds"] = found
        rows.append(row)
    table = [{key: value for key, value in row.items() if key != "seeds"} for row in rows]
    report(f"guidance_{part}", rows, {}, {"table": table})


def main(words: Sequence[str] | None = None) -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=["digits", "mnist"])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmarks")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(words)
    for part in options.parts:
        run(part, options)


if __name__ == "__main__":
    main()
