"""The end of a run, by the clock."""

from __future__ import annotations

import lightning.pytorch as pl

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.modules.diffusion import DiffusionModule


class StopAtImages(StepCallback):
    """Stops once `max_images` have been seen; a run resumed past that trains no further batch.

    Args:
        max_images: The length of the run. Rounded up to a whole global batch.

    Raises:
        ValueError: If `max_images` is negative.
    """

    def __init__(self, *, max_images: int) -> None:
        super().__init__()
        if max_images < 0:
            raise ValueError(f"max_images must not be negative, got {max_images}")
        self.max_images = max_images

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing more if the checkpoint already is at the end."""
        if isinstance(pl_module, DiffusionModule) and pl_module.images_seen >= self.max_images:
            trainer.should_stop = True

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Stop at the end."""
        if module.images_seen >= self.max_images:
            trainer.should_stop = True
