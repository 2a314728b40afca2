"""Snapshots of the power-function averages, from which any other width can be made after training.

The averages of `EMACallback` whose profile is a `PowerFunction` are written to a folder every so many images. See
`diffusion_lab/ema_posthoc.py` for what is made of them, and `sample.py ema=posthoc_<width>` for where it is asked for.

So that the disk does not fill up in a long run, the interval doubles whenever there would be more than `at_most`
moments, and those between the new, wider ones are removed: there are always between half of `at_most` and all of it,
at even distances. Like every interval it is a function of the clock alone, so a resumed run ends with the same files.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor

from diffusion_lab.callbacks.base import StepCallback, check_interval, due, paused
from diffusion_lab.callbacks.ema import EMACallback
from diffusion_lab.ema import EMA, PowerFunction
from diffusion_lab.modules.diffusion import DiffusionModule
from diffusion_lab.modules.errors import RunError
from diffusion_lab.modules.snapshot_io import DTYPES, save_snapshot, snapshot_images


class EMASnapshots(StepCallback):
    """Writes `<dirpath>/<average>-<images seen>.safetensors` for every power-function average.

    Takes its place behind `EMACallback`, so that the averages of a step are complete when they are written and the
    checkpoint of that step comes after.

    Args:
        every_images: Interval, to begin with.
        at_most: Moments to keep.
        dtype: "float16" or "float32".
        dirpath: The folder; made if it is not there.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, *, every_images: int, at_most: int = 64, dtype: str = "float16", dirpath: str) -> None:
        super().__init__()
        check_interval(every_images, "EMASnapshots")
        if at_most < 2 or dtype not in DTYPES:
            raise ValueError(
                f"EMASnapshots needs at_most >= 2 and dtype float16 or float32, got {at_most} and {dtype}"
            )
        self.every_images, self.at_most, self.dtype = every_images, at_most, dtype
        self.dirpath = Path(dirpath)
        self._source: EMACallback | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the averages and stand behind them.

        Raises:
            RunError: If no average has a power-function profile.
        """
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = [item for item in callbacks if isinstance(item, EMACallback)]
        if not found or not any(isinstance(profile, PowerFunction) for profile in found[0].profiles.values()):
            raise RunError("EMASnapshots: no average has a power-function profile; choose averages=posthoc")
        self._source = found[0]
        # a new list: Lightning is iterating over the old one
        others = [item for item in callbacks if item is not self]
        place = others.index(found[0]) + 1
        trainer.callbacks = [*others[:place], self, *others[place:]]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what an interrupted run wrote beyond the point it is resumed from, and what it left half written.

        Those weights are not an earlier state of the ones that come now: on a GPU, or with other settings of what is
        free to change, the way from the checkpoint is another one.
        """
        if trainer.is_global_zero and isinstance(pl_module, DiffusionModule):
            for leftover in self.dirpath.glob(".*.safetensors.*.tmp"):
                leftover.unlink(missing_ok=True)
            for path, images in self._files():
                if images > pl_module.images_seen:
                    path.unlink(missing_ok=True)

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Write if due."""
        interval = self._interval(module.images_seen)
        if not due(module, interval):
            return
        module.guard.flush()
        if self._source is None:
            return
        with paused(module):
            if trainer.is_global_zero and interval > self.every_images:
                # only what doubling made too many: a run resumed with a longer interval keeps what it has
                self._thin_out(interval, module.global_batch_size)
            for name, average in self._source.averages.items():
                if isinstance(average.profile, PowerFunction):
                    # every process takes part: the average may be spread over them
                    state = average.state_dict(keep=trainer.is_global_zero)
                    if trainer.is_global_zero:
                        self._write(name, average, state, average.profile.sigma_rel, module.images_seen)

    def _interval(self, images_seen: int) -> int:
        """Double the interval until no more than `at_most` of them fit."""
        interval = self.every_images
        while images_seen // interval > self.at_most:
            interval *= 2
        return interval

    def _thin_out(self, interval: int, images_per_step: int) -> None:
        """Keep the moments at which a multiple of the interval was crossed."""
        for path, images in self._files():
            if images // interval == (images - images_per_step) // interval:
                path.unlink(missing_ok=True)

    def _files(self) -> list[tuple[Path, int]]:
        found = ((path, snapshot_images(path)) for path in self.dirpath.glob("*.safetensors"))
        return [(path, images) for path, images in found if images is not None]

    def _write(
        self, name: str, average: EMA, state: dict[str, Tensor], sigma_rel: float, images_seen: int
    ) -> None:
        learned = {key for key, _ in average.module.named_parameters(remove_duplicate=False)}
        save_snapshot(
            self.dirpath,
            state,
            average=name,
            sigma_rel=sigma_rel,
            images_seen=images_seen,
            buffers=[key for key in state if key not in learned],
            dtype=self.dtype,
        )
