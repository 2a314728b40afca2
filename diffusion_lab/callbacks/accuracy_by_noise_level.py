"""How often a classifier of noisy images is right, by noise level: on test images, with noise that is always the same.

At high log-SNR it is an ordinary classifier; at low ones no classifier can beat the share of the largest class. What
lies between says from where on its gradient can guide.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.callbacks.base import StepCallback, check_interval, due, paused
from diffusion_lab.callbacks.preemption import was_preempted
from diffusion_lab.callbacks.sampling import chosen
from diffusion_lab.images import to_float
from diffusion_lab.loggers import CSVMetrics, log_metrics
from diffusion_lab.modules.diffusion import DiffusionModule
from diffusion_lab.modules.errors import RunError
from diffusion_lab.modules.noisy_classifier import NoisyClassifierModule
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.rng import SampleRNG
from diffusion_lab.sharded import unsharded

FILE = "accuracy_by_noise_level.csv"
COLUMNS = ("images_seen", "logsnr", "accuracy", "cross_entropy", "n")


class AccuracyByNoiseLevel(StepCallback):
    """Writes `<dirpath>/accuracy_by_noise_level.csv`, prints the last of it, and logs `accuracy`, the mean over levels.

    Args:
        every_images: Interval between measurements; the end of the run is measured too.
        levels: The log-SNRs.
        n: Test images, the first ones, at most.
        ema: Which average to ask; "raw" for the live weights; None for the first average, or for these where there is
            none.
        seed: Image i has the noise of seed + i, the same at every level.
        dirpath: The run folder; None writes no file.

    Attributes:
        last: Rows of the newest measurement, one dict a level with the keys of the file's columns.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        every_images: int,
        levels: Sequence[float],
        n: int = 1000,
        ema: str | None = None,
        seed: int = 0,
        dirpath: str | None = None,
    ) -> None:
        super().__init__()
        check_interval(every_images, "AccuracyByNoiseLevel")
        if n < 1 or not levels:
            raise ValueError(
                f"AccuracyByNoiseLevel needs n >= 1 and at least one level, got {n} and {list(levels)}"
            )
        self.every_images, self.levels, self.n = every_images, [float(level) for level in levels], n
        self.ema, self.seed = ema, seed
        self.path = None if dirpath is None else Path(dirpath) / FILE
        self.last: list[dict[str, float | int]] = []
        self._measured_at = -1

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Measure if due."""
        if due(module, self.every_images):
            self.measure(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the end, and print it; a run that a signal ends is not at its end."""
        preempted = was_preempted(trainer.callbacks)  # type: ignore[attr-defined]
        if isinstance(pl_module, DiffusionModule) and pl_module.stepped and not preempted:
            self.measure(trainer, pl_module)
            if trainer.is_global_zero:
                cells = (f"{row['logsnr']:+g}: {100 * row['accuracy']:.1f} %" for row in self.last)
                print(f"accuracy by log-SNR  {'   '.join(cells)}", flush=True)

    def measure(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Measure and write, on the first process alone; every process must call this.

        Raises:
            RunError: If the module trains no classifier, or there is no average of that name.
        """
        if not isinstance(module, NoisyClassifierModule):
            raise RunError(
                "accuracy_by_noise_level is for method=noisy_classifier: leave it out of callbacks"
            )
        if self._measured_at == module.images_seen:
            return
        self._measured_at = module.images_seen
        classifier = module.classifiers()[chosen(module, self.ema)]
        # the others help to put a sharded classifier together
        with paused(module), torch.no_grad(), unsharded(classifier):
            if not trainer.is_global_zero:
                return
            training = classifier.training
            classifier.eval()
            x0, label = self._examples(trainer)
            self.last = [
                {"images_seen": module.images_seen, **self._row(classifier, x0, label, level, module.device)}
                for level in self.levels
            ]
            classifier.train(training)
        self._write(trainer, module.images_seen)

    def _examples(self, trainer: pl.Trainer) -> tuple[Tensor, Tensor]:
        images, labels = trainer.datamodule.test_images()  # type: ignore[attr-defined]
        if labels is None:
            raise RunError("accuracy_by_noise_level: this data set has no labels")
        images = images[: self.n]
        return to_float(images) if images.dtype == torch.uint8 else images.float(), labels[: self.n]

    def _row(
        self, classifier: torch.nn.Module, x0: Tensor, label: Tensor, level: float, device: torch.device
    ) -> dict[str, float | int]:
        eps = SampleRNG([self.seed + i for i in range(len(x0))]).randn_like(x0)
        logsnr = torch.full((len(x0),), level)
        x = marginal(classifier.interpolant, x0, eps, logsnr)  # type: ignore[arg-type]
        parts = zip(x.split(250), logsnr.split(250), strict=True)
        logits = torch.cat([classifier(part.to(device), at.to(device)).float().cpu() for part, at in parts])
        return {
            "logsnr": level,
            "accuracy": float((logits.argmax(1) == label).float().mean()),
            "cross_entropy": float(F.cross_entropy(logits, label)),
            "n": len(label),
        }

    def _write(self, trainer: pl.Trainer, images_seen: int) -> None:
        mean = sum(row["accuracy"] for row in self.last) / len(self.last)
        log_metrics(trainer.loggers, {"accuracy": mean}, images_seen)
        each = {f"accuracy_by_logsnr/{row['logsnr']:+.2f}": row["accuracy"] for row in self.last}
        log_metrics([x for x in trainer.loggers if not isinstance(x, CSVMetrics)], each, images_seen)
        if self.path is None:
            return
        kept = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                # rows of an interrupted run beyond the point it was resumed from are made again
                kept = [row for row in csv.DictReader(file) if (row["images_seen"] or "").isdigit()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows([row for row in kept if int(row["images_seen"]) < images_seen])
            writer.writerows(self.last)
