"""Models that benchmarks sample: trained where they are not there yet, and what their samples are compared with."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from torch import Tensor

from diffusion_lab.app.build import data_module, load_denoiser
from diffusion_lab.images import to_float
from diffusion_lab.metrics.features import MNISTCNN, DigitsCNN
from diffusion_lab.metrics.stats import gaussian_stats

RECIPES = {
    "digits": ["experiment=digits/quickstart"],
    "mnist": [
        "experiment=mnist/quickstart", "model.channels=16", "lr_schedule=linear",
        "lr_schedule.warmup_images=6400", "max_images=102400", "optimizer.lr=2e-3",
        "callbacks.sample_grid.every_images=102400",
    ],
}  # fmt: skip


def trained(runs: Path, part: str, seed: int) -> Path:
    """Train a model unless it is there, and return its folder."""
    folder = runs / "benchmark" / f"{part}-{seed}"
    if not (folder / "export").is_dir():
        words = [
            *RECIPES[part],
            f"seed={seed}",
            f"paths.runs={runs}",
            f"run_id={folder.name}",
            "name=benchmark",
        ]
        subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True)
    return folder


@cache
def loaded(folder: Path) -> tuple[Any, Tensor, Tensor, Any]:
    """Denoiser, training images and labels as floats, and the statistics of the test images."""
    torch.set_num_threads(1)
    model = load_denoiser(folder)
    data = data_module(model.config)
    images, labels = data.train_images()
    assert labels is not None
    test, _ = data.test_images()
    features = extractor(data.shape)
    return model.denoiser, to_float(images), labels, gaussian_stats(features(test))


@cache
def extractor(shape: tuple[int, ...]) -> Any:
    """The features that distances are measured in."""
    return (DigitsCNN() if shape[-1] == 8 else MNISTCNN()).eval()
