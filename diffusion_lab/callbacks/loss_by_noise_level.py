"""Where on the noise axis the loss sits: mean per-example loss in bins of log-SNR.

The loss is the one the optimizer sees, ½ (w/p) |eps - eps_hat|²; a bin that stays high or never fills tells about the
schedule and the weighting. Each interval starts afresh. The sums are part of the checkpoint. Where networks learn in
turns, the losses of the turns in which the denoiser does count.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from diffusion_lab.callbacks.base import StepCallback, check_interval, due
from diffusion_lab.loggers import CSVMetrics, log_metrics
from diffusion_lab.modules.diffusion import DiffusionModule
from diffusion_lab.modules.ranks import sum_over_ranks

FILE = "loss_by_noise_level.csv"
BACKLOG = 64
"""Batches whose losses are kept before they are sorted into bins: a few large operations instead of many
small ones."""

COLUMNS = ("images_seen", "logsnr_from", "logsnr_to", "loss", "count")


class LossByNoiseLevel(StepCallback):
    """Writes `<dirpath>/loss_by_noise_level.csv`, and logs `loss_by_logsnr/<bin centre>` to TensorBoard and W&B.

    Args:
        every_images: Interval between measurements.
        bins: Number of bins of equal width.
        logsnr_min: Lower end; the first bin also takes everything below.
        logsnr_max: Upper end; the last bin also takes everything above.
        dirpath: The run folder; None takes that of the trainer's CSVMetrics, and writes no file where there is none.

    Attributes:
        last: Rows of the newest measurement, one dict per bin with the keys of the file's columns.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        every_images: int = 50_000,
        bins: int = 20,
        logsnr_min: float = -15.0,
        logsnr_max: float = 15.0,
        dirpath: str | None = None,
    ) -> None:
        super().__init__()
        check_interval(every_images, "LossByNoiseLevel")
        if bins < 1 or not logsnr_min < logsnr_max:
            raise ValueError(
                f"LossByNoiseLevel needs bins >= 1 and logsnr_min < logsnr_max, got {bins}, {logsnr_min}, {logsnr_max}"
            )
        self.every_images, self.bins = every_images, bins
        self.logsnr_min, self.logsnr_max = logsnr_min, logsnr_max
        self.path = None if dirpath is None else Path(dirpath) / FILE
        self.last: list[dict[str, float | int]] = []
        self._sums: Tensor | None = None
        self._fresh: list[tuple[Tensor, Tensor]] = []

    def _edges(self) -> list[float]:
        width = (self.logsnr_max - self.logsnr_min) / self.bins
        return [self.logsnr_min + i * width for i in range(self.bins + 1)]

    @torch.no_grad()
    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Keep the losses, and write if due."""
        if module.denoiser_learns:
            self._fresh += [(terms.logsnr, terms.per_example) for terms in module.terms]
        if len(self._fresh) >= BACKLOG:
            self._digest()
        if due(module, self.every_images):
            self._share(trainer)
            if trainer.is_global_zero and self._sums is not None:
                self._write(trainer, module.images_seen, self._sums.cpu())
            self._sums = None

    def _digest(self) -> None:
        """Add the losses kept so far to the sums of their bins."""
        if not self._fresh:
            return
        logsnr = torch.cat([pair[0] for pair in self._fresh])
        per_example = torch.cat([pair[1] for pair in self._fresh])
        self._fresh = []
        if self._sums is None:
            self._sums = torch.zeros(2, self.bins, dtype=torch.float64)
        self._sums = self._sums.to(logsnr.device)
        place = (logsnr - self.logsnr_min) * (self.bins / (self.logsnr_max - self.logsnr_min))
        index = place.clamp(0, self.bins - 1).long()
        values = torch.stack([per_example.double(), torch.ones_like(index, dtype=torch.float64)])
        self._sums.index_add_(1, index, values)

    def _write(self, trainer: pl.Trainer, images_seen: int, sums: Tensor) -> None:
        edges, (totals, counts) = self._edges(), sums.tolist()
        self.last = [
            {
                "images_seen": images_seen,
                "logsnr_from": edges[i],
                "logsnr_to": edges[i + 1],
                "loss": totals[i] / counts[i] if counts[i] else math.nan,
                "count": int(counts[i]),
            }
            for i in range(self.bins)
        ]
        metrics = {
            f"loss_by_logsnr/{(row['logsnr_from'] + row['logsnr_to']) / 2:+.2f}": row["loss"]
            for row in self.last
            if row["count"]
        }
        # twenty columns would drown the others in metrics.csv; the file below has them in order
        log_metrics([x for x in trainer.loggers if not isinstance(x, CSVMetrics)], metrics, images_seen)
        if self.path is not None:
            new = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerows(self.last)

    def _share(self, trainer: pl.Trainer) -> None:
        """Give rank 0 the sums of all processes and the others zeros, so that nothing counts twice."""
        self._digest()
        if self._sums is not None and trainer.world_size > 1:
            sum_over_ranks(self._sums)
            if not trainer.is_global_zero:
                self._sums.zero_()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the run folder."""
        for logger in trainer.loggers:
            if self.path is None and isinstance(logger, CSVMetrics):
                self.path = logger.dirpath / FILE

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop rows of an interrupted run beyond the point it is resumed from."""
        if not isinstance(pl_module, DiffusionModule) or not trainer.is_global_zero:
            return
        if self.path is not None and self.path.exists():
            with self.path.open(newline="") as file:
                lines = file.readlines()
            kept = [line for line in lines[1:] if _images(line) <= pl_module.images_seen]
            with self.path.open("w", newline="") as file:
                file.writelines([",".join(COLUMNS) + "\r\n", *kept])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the sums of all processes."""
        self._share(trainer)
        if self._sums is not None:
            checkpoint["loss_by_noise_level"] = self._sums.cpu()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore them, on one process only."""
        sums = checkpoint.get("loss_by_noise_level")
        if sums is not None and sums.shape == (2, self.bins):
            self._sums = sums.double() if trainer.is_global_zero else torch.zeros_like(sums).double()


def _images(line: str) -> float:
    """Clock of a row; infinite for a half-written one, which is dropped."""
    cells = line.rstrip("\r\n").split(",")
    if len(cells) != len(COLUMNS) or not line.endswith("\n") or not cells[0].isdigit():
        return math.inf
    return int(cells[0])
