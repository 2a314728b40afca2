"""What the callbacks share: hooks that run once an optimizer step, and intervals counted in images.

An interval is due when the clock crosses a multiple of it:

    images_seen // every  !=  (images_seen - global_batch) // every

which needs no state, so a resumed run acts at the same places as an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from diffusion_lab.modules.diffusion import DiffusionModule


def due(module: DiffusionModule, every_images: int) -> bool:
    """Whether the step that just ended crossed a multiple of `every_images`."""
    before = module.images_seen - module.global_batch_size
    return module.images_seen // every_images != before // every_images


def check_interval(every_images: int, owner: str) -> None:
    """Raise ValueError unless an interval is positive."""
    if every_images < 1:
        raise ValueError(f"{owner} needs every_images >= 1, got {every_images}")


@contextmanager
def paused(module: DiffusionModule) -> Iterator[None]:
    """Take the time of what is not training (sampling, saving) off the throughput."""
    synchronize(module.device)
    start = time.perf_counter()
    try:
        yield
    finally:
        synchronize(module.device)
        module.paused_s += time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that a clock read next to it means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepCallback(Callback):
    """A callback whose `on_step` runs after each optimizer step, with the clock already advanced."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Call `on_step` if this batch closed an optimizer step."""
        if isinstance(pl_module, DiffusionModule) and pl_module.stepped:
            self.on_step(trainer, pl_module)

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Act after an optimizer step."""
