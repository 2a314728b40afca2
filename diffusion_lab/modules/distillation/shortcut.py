"""Shortcut models: one student for any power of two of steps, which it is told; it is its own teacher.

The teacher gives the first weights, and with `from_data=false` the answers at the largest number of steps, under its
guidance. Only the embedding of the number of steps is new in the student. It begins by adding nothing, so the student
begins as its teacher, whatever it is told. Its targets are made without dropout, by the student of this very step or,
with `target`, by one of its averages.

References:
    Frans, Hafner, Levine & Abbeel, "One Step Diffusion via Shortcut Models", 2024, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.denoisers.shortcut import ShortcutDenoiser
from diffusion_lab.guidance import Unguided
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.losses.distillation.shortcut import ShortcutLoss
from diffusion_lab.modules.diffusion import OptimizerFactory
from diffusion_lab.modules.distillation.base import DistillationModule
from diffusion_lab.modules.errors import DoesNotFit
from diffusion_lab.modules.learning_rate import LRSchedule
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, GuidanceFactory


class Evaluating:
    """A network as it answers when it is not trained: without gradient and without dropout.

    Args:
        denoiser: Left in the mode that it is in.
    """

    def __init__(self, denoiser: NetworkDenoiser) -> None:
        self.denoiser = denoiser

    @property
    def interpolant(self) -> Interpolant:
        """The process of the network."""
        return self.denoiser.interpolant

    @torch.no_grad()
    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the network's x0."""
        was = self.denoiser.training
        self.denoiser.eval()
        try:
            return self.denoiser(x, logsnr, cond)
        finally:
            self.denoiser.train(was)


class ShortcutModule(DistillationModule):
    """Trains a student of 1, 2, 4 .. `denoiser.finest` steps.

    Args:
        denoiser: The student, a `ShortcutDenoiser`.
        teacher: See `DistillationModule`.
        guidance: Of the teacher; without `from_data`.
        loss: The loss.
        target: Name of the average that makes targets, e.g. "ema", the paper's choice; None is the student itself.
        from_data: Whether at the largest number of steps the student learns from the data, not from the teacher.
        optimizer: See `DiffusionModule`.
        lr_schedule: See `DiffusionModule`.
        seed: See `DiffusionModule`.
        global_batch_size: See `DiffusionModule`.
        compile_network: See `DiffusionModule`.
        channels_last: See `DiffusionModule`.

    Raises:
        ValueError: As `DistillationModule`; if guidance is asked of data, the teacher is told its number of steps
            already, or the network keeps magnitudes.
    """

    denoiser: ShortcutDenoiser
    loss: ShortcutLoss

    def __init__(
        self,
        *,
        denoiser: ShortcutDenoiser,
        teacher: NetworkDenoiser,
        loss: ShortcutLoss,
        optimizer: OptimizerFactory,
        guidance: GuidanceFactory = Unguided,
        target: str | None = None,
        from_data: bool = True,
        lr_schedule: LRSchedule | None = None,
        seed: int,
        global_batch_size: int,
        compile_network: bool = False,
        channels_last: bool = False,
    ) -> None:
        if isinstance(teacher, ShortcutDenoiser):
            raise ValueError("the teacher is a shortcut model already: go on with it by resume=")
        super().__init__(
            denoiser=denoiser,
            teacher=teacher,
            loss=loss,
            optimizer=optimizer,
            guidance=guidance,
            lr_schedule=lr_schedule,
            seed=seed,
            global_batch_size=global_batch_size,
            compile_network=compile_network,
            channels_last=channels_last,
        )
        self.target, self.from_data = target, from_data
        if from_data and self.guided is not self.teacher:
            raise ValueError("method.from_data=true has no teacher to guide: method.from_data=false")
        denoiser.silence()

    def on_fit_start(self) -> None:
        """See `DistillationModule`; the average that makes targets must be there."""
        super().on_fit_start()
        if self.target is not None and self.target not in self.averages:
            names = ", ".join(self.averages) or "none"
            raise DoesNotFit(f"method.target={self.target}: there is no such average; there are: {names}")

    def distil(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> LossTerms:
        """See `DistillationModule`."""
        teaching = self.denoiser if self.target is None else self.averages[self.target]
        return self.loss(
            self.denoiser,
            x0,
            cond,
            rng,
            teacher=None if self.from_data else self.guided,
            reference=Evaluating(teaching),
        )
