"""The loss curve: the mean loss since the last row, and the learning rate, at fixed points of the clock.

Where several networks learn in turns, `loss` is the mean over all steps, and `loss_<turn>` that over each one's own.
The running sums are part of the checkpoint, so the rows of a resumed run equal those of an uninterrupted one. Where the
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
        # by turn; "" is all of them
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._skipped = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop what an interrupted run logged beyond the point it is resumed from."""
        if isinstance(pl_module, DiffusionModule):
            rewind(trainer.loggers, pl_module.images_seen)

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Add up, and log if due."""
        loss = module.step_loss().double()
        for turn in ("", *filter(None, [module.turn])):
            before = self._sums.get(turn)
            self._sums[turn] = loss if before is None else before.to(loss.device) + loss
            self._steps[turn] = self._steps.get(turn, 0) + 1
        if due(module, self.every_images):
            self._gather(trainer)
            means = {turn: float(total) / self._steps[turn] for turn, total in self._sums.items()}
            # the rate that the step just taken used
            used = module.lr_schedule(module.images_seen - module.global_batch_size)
            metrics = {"loss": means.pop(""), "learning_rate": module.base_learning_rate * used}
            metrics |= {f"loss_{turn}": mean for turn, mean in sorted(means.items())}
            if self._skipped:
                metrics["skipped_samples"] = float(self._skipped)
            log_metrics(trainer.loggers, metrics, module.images_seen)
            self._sums, self._steps = {}, {}

    def _gather(self, trainer: pl.Trainer) -> None:
        """Replace this process's sums by means over processes, and take over the data's count, on all of them."""
        data = getattr(trainer, "datamodule", None)
        new = int(getattr(data, "skipped", 0))
        if self._sums and trainer.world_size > 1:
            mine = torch.stack([*self._sums.values()])
            total = sum_over_ranks(torch.cat([mine, mine.new_tensor([float(new)])]))
            self._sums = dict(zip(self._sums, total[:-1] / trainer.world_size, strict=True))
            new = int(total[-1])
        elif trainer.world_size > 1:
            return  # nothing was trained since the last time
        self._skipped += new
        if data is not None:
            data.skipped = 0

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the running sums; every process takes part, and goes on from the common value."""
        self._gather(trainer)
        kept: dict[str, Any] = {}
        if self._sums:
            kept = {
                "sums": {turn: total.cpu() for turn, total in self._sums.items()},
                "steps": dict(self._steps),
            }
        if self._skipped:
            kept["skipped"] = self._skipped
        if kept:
            checkpoint["training_log"] = kept

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the running sums."""
        state = checkpoint.get("training_log")
        if state is not None:
            self._skipped = int(state.get("skipped", 0))
        if state is not None and "sums" in state:
            self._sums = {turn: total.to(torch.float64) for turn, total in state["sums"].items()}
            self._steps = dict(state["steps"])
