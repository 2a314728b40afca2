"""The loss curve: the mean loss since the last row, and the learning rate, at fixed points of the clock.

The running sum is part of the checkpoint, so the rows of a resumed run equal those of an uninterrupted one. Where the
data held unreadable samples, `skipped_samples` counts those replaced since the run began, over all processes.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from diffusion_lab.callbacks.base import StepCallback, check_interval, due
from diffusion_lab.loggers import log_metrics, rewind
from diffusion_lab.modules.diffusion import DiffusionModule
from diffusion_lab.modules.ranks import sum_over_ranks


class TrainingLog(StepCallback):
    """Logs `loss` and `learning_rate`, and cuts logs of a resumed run back to its checkpoint.

    Args:
        every_images: Interval between rows.

    Raises:
        ValueError: If `every_images` is not positive.
    """

    def __init__(self, *, every_images: int = 10_000) -> None:
        super().__init__()
        check_interval(every_images, "TrainingLog")
        self.every_images = every_images
        self._sum: Tensor | None = None
        self._steps = 0
        self._skipped = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop what an interrupted run logged beyond the point it is resumed from."""
        if isinstance(pl_module, DiffusionModule):
            rewind(trainer.loggers, pl_module.images_seen)

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Add up, and log if due."""
        loss = module.step_loss().double()
        self._sum = loss if self._sum is None else self._sum.to(loss.device) + loss
        self._steps += 1
        if due(module, self.every_images):
            self._gather(trainer)
            mean = float(self._sum) / self._steps
            # the rate that the step just taken used
            used = module.lr_schedule(module.images_seen - module.global_batch_size)
            metrics = {"loss": mean, "learning_rate": module.base_learning_rate * used}
            if self._skipped:
                metrics["skipped_samples"] = float(self._skipped)
            log_metrics(trainer.loggers, metrics, module.images_seen)
            self._sum, self._steps = None, 0

    def _gather(self, trainer: pl.Trainer) -> None:
        """Replace this process's sum by the mean over processes, and take over the data's count, on all of them."""
        data = getattr(trainer, "datamodule", None)
        new = int(getattr(data, "skipped", 0))
        if self._sum is not None and trainer.world_size > 1:
            total = sum_over_ranks(torch.stack([self._sum, self._sum.new_tensor(float(new))]))
            self._sum, new = total[0] / trainer.world_size, int(total[1])
        elif trainer.world_size > 1:
            return  # nothing was trained since the last time
        self._skipped += new
        if data is not None:
            data.skipped = 0

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the running sum; every process takes part, and goes on from the common value."""
        self._gather(trainer)
        kept: dict[str, Any] = {}
        if self._sum is not None:
            kept = {"sum": self._sum.cpu(), "steps": self._steps}
        if self._skipped:
            kept["skipped"] = self._skipped
        if kept:
            checkpoint["training_log"] = kept

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the running sum."""
        state = checkpoint.get("training_log")
        if state is not None:
            self._skipped = int(state.get("skipped", 0))
        if state is not None and "sum" in state:
            self._sum, self._steps = state["sum"].to(torch.float64), int(state["steps"])
