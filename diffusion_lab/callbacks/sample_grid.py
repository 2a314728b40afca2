"""Pictures of samples during training, on fixed seeds, so that those of different moments can be compared.

* `grid-<images seen>.png`: every class is a column (for data without labels, just rows of samples);
* `trajectory-<images seen>.png`: for a few samples, one a row, the prediction of x0 at several steps on the
  way from noise.

Data in the plane are drawn as dots: one cloud for each class, and one for each step of the trajectory.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor

from diffusion_lab.callbacks.base import StepCallback, check_interval, due, paused
from diffusion_lab.callbacks.pictures import scatter, tile
from diffusion_lab.callbacks.preemption import was_preempted
from diffusion_lab.callbacks.sampling import (
    chosen,
    conditions,
    evaluating,
    gather,
    labels_for,
    pick,
    share,
)
from diffusion_lab.loggers import log_image
from diffusion_lab.modules.diffusion import DiffusionModule
from diffusion_lab.samplers.generate import Generation
from diffusion_lab.typing import OnStep

POINTS = 256
"""Samples of each class where a sample is a dot."""


class SampleGrid(StepCallback):
    """Samples every so many images, and at the end of the run.

    Args:
        generation: How samples are made.
        every_images: Interval.
        num_per_class: Samples of each class (rows of the grid).
        trajectories: Samples whose way from the noise is shown; 0 shows none.
        ema: Which average to sample; "raw" for the live weights; None for the first average, or for these where there
            is none.
        dirpath: Folder for the PNG files.
        seed: Seed of the first sample.
        moments: Predictions shown on a trajectory, the last one included.

    Raises:
        ValueError: If a count is out of range.
    """

    def __init__(
        self,
        *,
        generation: Generation,
        every_images: int,
        num_per_class: int = 4,
        trajectories: int = 4,
        ema: str | None = None,
        dirpath: str,
        seed: int = 0,
        moments: int = 8,
    ) -> None:
        super().__init__()
        check_interval(every_images, "SampleGrid")
        if num_per_class < 1 or trajectories < 0 or moments < 1:
            raise ValueError(
                "SampleGrid needs num_per_class >= 1, trajectories >= 0 and moments >= 1, "
                f"got {num_per_class}, {trajectories}, {moments}"
            )
        self.generation, self.every_images = generation, every_images
        self.num_per_class, self.trajectories = num_per_class, trajectories
        self.ema, self.seed, self.moments = ema, seed, moments
        self.dirpath = Path(dirpath)
        self._drawn_at = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an average that is not there now, not at the first picture."""
        if isinstance(pl_module, DiffusionModule):
            chosen(pl_module, self.ema)

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Draw if due."""
        if due(module, self.every_images):
            self.draw(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the end, unless it was just drawn or nothing was trained.

        A run that a signal ends is not at its end, and has no time.
        """
        preempted = was_preempted(trainer.callbacks)  # type: ignore[attr-defined]
        if isinstance(pl_module, DiffusionModule) and pl_module.stepped and not preempted:
            self.draw(trainer, pl_module)

    def draw(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Sample on all processes and write the pictures on the first; every process must call this."""
        if self._drawn_at == module.images_seen:
            return
        self._drawn_at = module.images_seen
        module.guard.flush()
        flat = len(self.generation.shape) == 1
        num_classes = int(getattr(getattr(trainer, "datamodule", None), "num_classes", 0) or 0)
        columns = num_classes or (1 if flat else 8)
        with paused(module):
            n = columns * (POINTS if flat else self.num_per_class)
            samples = self._sample(trainer, module, n, num_classes)
            pictures = {"samples/grid": self._grid(samples, columns, flat)}
            if self.trajectories:
                pictures["samples/trajectory"] = self._trajectory(trainer, module, num_classes, flat)
            if trainer.is_global_zero:
                self.dirpath.mkdir(parents=True, exist_ok=True)
                for name, picture in pictures.items():
                    picture.save(self.dirpath / f"{name.split('/')[1]}-{module.images_seen:010d}.png")
                    log_image(trainer.loggers, name, picture, module.images_seen)

    def _sample(self, trainer: pl.Trainer, module: DiffusionModule, n: int, num_classes: int) -> Tensor:
        """Make `n` samples on all processes, and give all of them to each."""
        samples = self._generate(trainer, module, share(n, trainer), num_classes, None)
        return gather(samples, n, trainer)

    def _generate(
        self,
        trainer: pl.Trainer,
        module: DiffusionModule,
        indices: list[int],
        num_classes: int,
        on_step: OnStep | None,
    ) -> Tensor:
        denoiser = pick(module, self.ema)
        # a process without a share still helps to put a sharded denoiser together
        with evaluating(denoiser):
            if not indices:
                return torch.zeros((0, *self.generation.shape), device=module.device)
            seeds, labels = [self.seed + i for i in indices], labels_for(indices, num_classes)
            return self.generation(
                denoiser,
                seeds=seeds,
                cond=conditions(trainer, seeds, labels, module.device),
                device=module.device,
                on_step=on_step,
            )

    def _grid(self, samples: Tensor, columns: int, flat: bool) -> Image.Image:
        if flat:
            return tile(torch.stack([scatter(samples[c::columns]) for c in range(columns)]), min(columns, 5))
        return tile(samples, columns)

    def _trajectory(
        self, trainer: pl.Trainer, module: DiffusionModule, num_classes: int, flat: bool
    ) -> Image.Image:
        # few enough for every process to make all of them, so nothing has to be sent
        count = POINTS if flat else self.trajectories
        kept: list[Tensor] = []
        self._generate(
            trainer,
            module,
            list(range(count)),
            num_classes,
            lambda index, logsnr, x, x0: kept.append(x0.detach()),
        )
        moments = min(self.moments, len(kept))
        chosen = [kept[round(i * (len(kept) - 1) / max(1, moments - 1))] for i in range(moments)]
        if flat:
            return tile(torch.stack([scatter(x0) for x0 in chosen]), moments)
        return tile(torch.stack(chosen, dim=1).flatten(0, 1), moments)
