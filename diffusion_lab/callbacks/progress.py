"""A progress bar with loss, images per second and time left; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.callbacks.gradient_norm import GradientNorm
from diffusion_lab.callbacks.stop import StopAtImages
from diffusion_lab.modules.diffusion import DiffusionModule


def clock(seconds: float) -> str:
    """Write seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


class Progress(StepCallback):
    """Shows how far the run is. The loss is read from the device only when it is shown.

    With several processes it is the mean over them, which `GradientNorm` has at hand: the processes look at their own
    clocks, so none may ask the others here. Without that callback it is the first process's, and says so.

    Args:
        refresh_s: Seconds between updates of the bar on a terminal.
        plain_s: Seconds between lines where the output is not a terminal.

    Raises:
        ValueError: If an interval is not positive.
    """

    def __init__(self, *, refresh_s: float = 0.25, plain_s: float = 5.0) -> None:
        super().__init__()
        if refresh_s <= 0.0 or plain_s <= 0.0:
            raise ValueError(f"Progress needs positive intervals, got {refresh_s} and {plain_s}")
        self.refresh_s = refresh_s
        self.plain_s = plain_s
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._end: int | None = None
        self._interval = plain_s
        self._shown_at = 0.0
        self._window: tuple[float, int, float] = (0.0, 0, 0.0)
        self._speed = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar, on the first process only."""
        if not trainer.is_global_zero or not isinstance(pl_module, DiffusionModule):
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._end = next((c.max_images for c in callbacks if isinstance(c, StopAtImages)), None)
        self._window = (time.perf_counter(), pl_module.images_seen, pl_module.paused_s)
        self._shown_at = time.perf_counter()
        self._speed = 0.0
        console = Console(file=sys.stdout)
        if console.is_terminal:
            self._bar = RichProgress(
                TextColumn("training"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                console=console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task("", total=self._end, completed=pl_module.images_seen, text="")
            self._bar.start()
            self._interval = self.refresh_s
        else:
            self._interval = self.plain_s

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Show, at most once an interval."""
        if not trainer.is_global_zero:
            return
        now = time.perf_counter()
        if now - self._shown_at >= self._interval:
            self._show(trainer, module, now)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the end."""
        if trainer.is_global_zero and isinstance(pl_module, DiffusionModule) and pl_module.terms:
            self._show(trainer, pl_module, time.perf_counter())
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal usable."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @staticmethod
    def _loss(trainer: pl.Trainer, module: DiffusionModule) -> tuple[float, str]:
        """Return the loss of the newest step, and what to call it."""
        if trainer.world_size == 1:
            return float(module.step_loss()), "loss"
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        norm = next((c for c in callbacks if isinstance(c, GradientNorm)), None)
        if norm is None or norm.loss is None:
            return float(module.step_loss()), "loss of process 0"
        return float(norm.loss), "loss"

    def _show(self, trainer: pl.Trainer, module: DiffusionModule, now: float) -> None:
        start, images, paused_s = self._window
        seconds = now - start - (module.paused_s - paused_s)
        if seconds > 0.0 and module.images_seen > images:
            speed = (module.images_seen - images) / seconds
            # smoothed, or the time left jumps about
            self._speed = speed if self._speed == 0.0 else 0.7 * self._speed + 0.3 * speed
            self._window = (now, module.images_seen, module.paused_s)
        self._shown_at = now
        loss, name = self._loss(trainer, module)
        text = self.line(module.images_seen, loss, self._speed, self._end, name)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=module.images_seen, text=text)
            self._bar.refresh()
        else:
            print(f"training  {text}", flush=True)

    @staticmethod
    def line(images_seen: int, loss: float, images_per_s: float, end: int | None, name: str = "loss") -> str:
        """Compose the text: images, loss, speed, time left."""
        of = f" / {end:,} ({images_seen / end:.0%})" if end else ""
        left = f"  {clock((end - images_seen) / images_per_s)} left" if end and images_per_s > 0.0 else ""
        return f"{images_seen:,}{of} images  {name} {loss:.4f}  {images_per_s:,.0f} images/s{left}"
