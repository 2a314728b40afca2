"""Checkpoints at fixed points of the clock, the newest few kept.

A checkpoint is written last of all callbacks, after the averages are updated and the log rows of its step are
on disk: whatever it does not hold is made again, bitwise, by the run that resumes from it.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from diffusion_lab.callbacks.base import StepCallback, check_interval, due, paused
from diffusion_lab.modules.checkpoint_io import (
    AtomicCheckpointIO,
    checkpoint_name,
    images_of,
    list_checkpoints,
)
from diffusion_lab.modules.diffusion import DiffusionModule


class Checkpoints(StepCallback):
    """Writes `<dirpath>/images-<images seen>.ckpt` every so many images, and at the end of the run.

    Puts itself last among the trainer's callbacks and makes the trainer use `AtomicCheckpointIO`.

    Args:
        every_images: Interval.
        keep: How many of the newest checkpoints to keep.
        dirpath: The folder; made if it is not there.

    Raises:
        ValueError: If `every_images` or `keep` is not positive.
    """

    def __init__(self, *, every_images: int, keep: int = 3, dirpath: str) -> None:
        super().__init__()
        check_interval(every_images, "Checkpoints")
        if keep < 1:
            raise ValueError(f"Checkpoints needs keep >= 1, got {keep}")
        self.every_images = every_images
        self.keep = keep
        self.dirpath = Path(dirpath)
        self._last_saved: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the last place, install the atomic writer, sweep up after a killed run."""
        # a new list: Lightning is iterating over the old one
        trainer.callbacks = [c for c in trainer.callbacks if c is not self] + [self]  # type: ignore[attr-defined]
        if not isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.is_global_zero:
            self.dirpath.mkdir(parents=True, exist_ok=True)
            for leftover in self.dirpath.glob(".images-*.tmp"):
                leftover.unlink(missing_ok=True)

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Save if due."""
        if due(module, self.every_images):
            self.save(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of the run, or the point where it was asked to stop."""
        if isinstance(pl_module, DiffusionModule):
            self.save(trainer, pl_module)

    def save(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Save now, unless this very state has been saved; every process must call this.

        Raises:
            NonFiniteLoss: If a step before this one went wrong; nothing is written then.
            CheckpointNotSaved: If the disk refuses.
        """
        module.guard.flush()
        path = self.dirpath / checkpoint_name(module.images_seen)
        if self._last_saved == module.images_seen:
            return
        if self._last_saved is None and not module.stepped and path.exists():
            # resumed at the very end and trained nothing: the file is the one just read
            return
        with paused(module):
            for logger in trainer.loggers:
                logger.save()
            trainer.save_checkpoint(path, weights_only=False)
            self._last_saved = module.images_seen
            if trainer.is_global_zero:
                self._forget(module.images_seen)

    def _forget(self, images_seen: int) -> None:
        # files beyond the clock are left alone: they belong to a run that went further, whole or not
        past = [p for p in list_checkpoints(self.dirpath) if (images_of(p) or 0) <= images_seen]
        for path in past[self.keep :]:
            path.unlink(missing_ok=True)
