"""Continuous-time consistency (sCM): a student of one step, taught by how its own answer changes along a path.

The loss is in `losses/distillation/continuous_consistency.py`. The student is asked twice, once for the gradient and
once by forward-mode differentiation, both times with the same dropout. The ramp follows the clock, so nothing about it
is stored.

With `from_data` the slope of the path comes from the data (sCT); then the teacher gives the student its first weights,
and is not asked again.

References:
    Lu & Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", 2024, algorithm 1.
"""

from __future__ import annotations

from torch import Tensor

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.guidance import Unguided
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.losses.distillation.continuous_consistency import ContinuousConsistencyLoss
from diffusion_lab.modules.diffusion import OptimizerFactory, seed_global
from diffusion_lab.modules.distillation.base import DistillationModule
from diffusion_lab.modules.learning_rate import LRSchedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, GuidanceFactory


class ContinuousConsistencyModule(DistillationModule):
    """Trains a student of one step, or of few with fresh noise in between.

    Args:
        denoiser: See `DistillationModule`.
        teacher: See `DistillationModule`.
        guidance: Of the teacher.
        loss: The loss.
        ramp_images: Images over which the tangent's second part is let in.
        from_data: Whether the data take the teacher's place.
        optimizer: See `DiffusionModule`.
        lr_schedule: See `DiffusionModule`.
        seed: See `DiffusionModule`.
        global_batch_size: See `DiffusionModule`.
        compile_network: See `DiffusionModule`.
        channels_last: See `DiffusionModule`.

    Raises:
        ValueError: As `DistillationModule`; if `ramp_images` is negative, or guidance is asked of data.
    """

    loss: ContinuousConsistencyLoss

    def __init__(
        self,
        *,
        denoiser: NetworkDenoiser,
        teacher: NetworkDenoiser,
        loss: ContinuousConsistencyLoss,
        optimizer: OptimizerFactory,
        guidance: GuidanceFactory = Unguided,
        ramp_images: int,
        from_data: bool = False,
        lr_schedule: LRSchedule | None = None,
        seed: int,
        global_batch_size: int,
        compile_network: bool = False,
        channels_last: bool = False,
    ) -> None:
        if ramp_images < 0:
            raise ValueError(f"method.ramp_images must not be negative, got {ramp_images}")
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
        self.ramp_images, self.from_data = ramp_images, from_data
        if from_data and self.guided is not self.teacher:
            raise ValueError("method.from_data=true has no teacher to guide: guidance@method.guidance=none")

    @property
    def ramp(self) -> float:
        """How much of the tangent's second part is let in now, in [0, 1]."""
        return min(1.0, self.images_seen / self.ramp_images) if self.ramp_images else 1.0

    def distil(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> LossTerms:
        """See `DistillationModule`."""
        seed = self.micro_seed("dropout")
        return self.loss(
            self.denoiser,
            x0,
            cond,
            rng,
            teacher=None if self.from_data else self.guided,
            ramp=self.ramp,
            again=lambda: seed_global(seed, x0.device),
        )
