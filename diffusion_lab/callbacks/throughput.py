"""How fast a run is: images per second, and floating-point operations of the model per second.

Images are counted on the wall clock between two log points, the time of sampling, scoring and saving taken off. The
operations of one forward and backward pass are counted once, by dispatching every operator of a pass over a
few examples, and scaled: the count per example does not depend on the batch. Nothing the optimizer, the
averages or the loader do is counted, so FLOP/s over the hardware's peak is the usual "model FLOP
utilisation".
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.callbacks.base import StepCallback, check_interval, due, synchronize
from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.loggers import log_metrics
from diffusion_lab.modules.diffusion import DiffusionModule
from diffusion_lab.sharded import unsharded

COUNTED = 2
"""Examples in the counted pass."""


def flop_per_example(denoiser: NetworkDenoiser, batch: Mapping[str, Tensor]) -> float:
    """Floating-point operations of one forward and backward pass, per example.

    Gradients of the parameters are neither read nor changed.

    Args:
        denoiser: The denoiser.
        batch: `{"x0": (B, *D), ...}` on its device; the first few examples are used.
    """
    few = {name: value[:COUNTED] for name, value in batch.items()}
    x0 = few.pop("x0")
    # what a denoiser is told besides by whoever samples it
    few |= {name: x0.new_zeros(len(x0)) for name in getattr(denoiser, "needs", ())}
    counter = FlopCounterMode(display=False)
    # a compiled network hides its operators from the counter
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"), unsharded(denoiser), counter:
        # the parameters as they are now: where they are sharded, others stand in their place meanwhile
        parameters = [p for p in denoiser.parameters() if p.requires_grad]
        out = denoiser.predict(x0, torch.zeros(x0.shape[0], device=x0.device), few or None)
        torch.autograd.grad(out.raw.float().sum(), parameters, allow_unused=True)
    return counter.get_total_flops() / x0.shape[0]


class Throughput(StepCallback):
    """Logs `images_per_s` and `model_tflop_per_s`, over all processes.

    Args:
        every_images: Interval between logged values.

    Attributes:
        flop: Operations per example; 0 until the first batch.
        images_per_s: Newest measurement, or None.

    Raises:
        ValueError: If `every_images` is not positive.
    """

    def __init__(self, *, every_images: int = 10_000) -> None:
        super().__init__()
        check_interval(every_images, "Throughput")
        self.every_images = every_images
        self.flop = 0.0
        self.images_per_s: float | None = None
        self._start: tuple[float, int, float] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        """Count the operations once."""
        if isinstance(pl_module, DiffusionModule) and not self.flop:
            with trainer.precision_plugin.forward_context():
                self.flop = flop_per_example(pl_module.denoiser, batch)

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Start the clock after the first step, which pays for all warm-up; log if due."""
        if self._start is None:
            self._restart(module)
        elif due(module, self.every_images):
            synchronize(module.device)
            start, images, paused_s = self._start
            seconds = time.perf_counter() - start - (module.paused_s - paused_s)
            self.images_per_s = (module.images_seen - images) / max(seconds, 1e-9)
            metrics = {"images_per_s": self.images_per_s}
            if self.flop:
                metrics["model_tflop_per_s"] = self.images_per_s * self.flop / 1e12
            log_metrics(trainer.loggers, metrics, module.images_seen)
            self._restart(module)

    def _restart(self, module: DiffusionModule) -> None:
        synchronize(module.device)
        self._start = (time.perf_counter(), module.images_seen, module.paused_s)
