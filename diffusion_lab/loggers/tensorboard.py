"""TensorBoard files in the run folder, on the axis of images seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL.Image import Image


class TensorBoard(TensorBoardLogger):
    """Writes event files to `<dirpath>/tensorboard`; look with `tensorboard --logdir <runs>`.

    Args:
        dirpath: The run folder.
    """

    def __init__(self, *, dirpath: str) -> None:
        super().__init__(save_dir=Path(dirpath) / "tensorboard", name="", version="", default_hp_metric=False)

    @rank_zero_only
    def log_picture(self, name: str, image: Image, images_seen: int) -> None:
        """Store a picture."""
        pixels = np.asarray(image.convert("RGB"))
        self.experiment.add_image(name, pixels, images_seen, dataformats="HWC")

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Nothing: the run folder has config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Write the events out."""
        self.experiment.flush()

    @rank_zero_only
    def close(self) -> None:
        """Close the event file."""
        self.experiment.close()
