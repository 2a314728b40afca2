"""The global gradient norm: logged, clipped if asked, and the place where a run gone wrong is stopped.

    norm = sqrt(sum_p |g_p|^2),      g_p <- g_p min(1, clip / norm)

Both stay on the device; a value is read only for the log, and for the check of `FiniteGuard`. Of a network that is
sharded every process holds parts of the gradients, and they add up their squares.

With float16 (`precision=16-mixed`) the loss is scaled up, so that small gradients survive, and the gradients that come
here are scaled back already. Some overflow all the same; then the loss scaler leaves the step out and scales less.
That is no failure unless it goes on and on.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from diffusion_lab.callbacks.base import StepCallback, check_interval, due
from diffusion_lab.loggers import log_metrics
from diffusion_lab.modules.diffusion import DiffusionModule
from diffusion_lab.modules.errors import NonFiniteLoss
from diffusion_lab.modules.finite import worst_logsnr
from diffusion_lab.modules.ranks import sum_over_ranks
from diffusion_lab.sharded import local, total_norm

IN_A_ROW = 25
"""So many steps left out one after the other are no longer the search for a scale: each halves it."""


class GradientNorm(StepCallback):
    """Logs `gradient_norm`, and raises NonFiniteLoss before an update with a bad loss or gradient is applied.

    Args:
        every_images: Interval between logged values.
        clip: Largest norm let through; None clips nothing. Leave Lightning's `gradient_clip_val` unset then.

    Attributes:
        loss: Loss of the newest step, the mean over all processes, on the device; None before the first.

    Raises:
        ValueError: If `every_images` or `clip` is not positive.
    """

    def __init__(self, *, every_images: int = 10_000, clip: float | None = None) -> None:
        super().__init__()
        check_interval(every_images, "GradientNorm")
        if clip is not None and clip <= 0.0:
            raise ValueError(f"GradientNorm needs clip > 0, got {clip}")
        self.every_images = every_images
        self.clip = clip
        self.loss: Tensor | None = None
        self._norm: Tensor | None = None
        self._left_out = 0

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure, check, clip; gradients are complete and shared among processes here."""
        if not isinstance(pl_module, DiffusionModule):
            return
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = total_norm(gradients).float()
        loss = sum_over_ranks(pl_module.step_loss().float())
        self.loss = loss / trainer.world_size
        # a float16 loss scaler expects infinite gradients now and then, and skips those steps itself
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        pl_module.guard.push(
            torch.stack([torch.zeros_like(norm) if scaled else norm, loss]),
            step=pl_module.step,
            images_seen=pl_module.images_seen,
            terms=pl_module.terms,
        )
        # on the CPU the norm is at hand, and most steps need no second pass over the gradients
        if self.clip is not None and (norm.device.type != "cpu" or float(norm) > self.clip):
            factor = torch.clamp(self.clip / (norm + 1e-12), max=1.0)
            torch._foreach_mul_([local(g) for g in gradients], factor)
        self._norm = norm

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Log if due; give up if no step comes through any more.

        Raises:
            NonFiniteLoss: If `IN_A_ROW` steps were left out one after the other.
        """
        self._left_out = 0 if module.updated else self._left_out + 1
        if self._left_out >= IN_A_ROW:
            before = module.images_seen - module.global_batch_size
            level = worst_logsnr(module.terms)
            raise NonFiniteLoss("the gradient", step=module.step - 1, images_seen=before, logsnr=level)
        if not module.updated:
            return
        if self._norm is not None and due(module, self.every_images):
            log_metrics(trainer.loggers, {"gradient_norm": float(self._norm)}, module.images_seen)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read what is still on its way from the GPU."""
        if isinstance(pl_module, DiffusionModule):
            pl_module.guard.flush()
