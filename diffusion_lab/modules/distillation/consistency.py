"""Multistep consistency: a student of N steps learns, from a teacher of ever finer steps, to agree with itself.

The student makes its own targets (`losses/distillation/consistency.py`), as it is at this very step and with the same
dropout: both times that it is asked, the generators that dropout draws from start from the same seed. The teacher's
steps grow in number with the clock, so nothing about them is stored.

With `from_data` the data's own x0 takes the teacher's place (consistency training): then the teacher gives the student
its first weights, and is not asked again.

References:
    Heek, Hoogeboom & Salimans, "Multistep Consistency Models", 2024, algorithm 1.
"""

from __future__ import annotations

from torch import Tensor

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.guidance import Unguided
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.losses.distillation.consistency import ConsistencyLoss, TeacherSteps
from diffusion_lab.modules.diffusion import OptimizerFactory
from diffusion_lab.modules.distillation.base import DistillationModule
from diffusion_lab.modules.distillation.same_dropout import SameDropout
from diffusion_lab.modules.learning_rate import LRSchedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, GuidanceFactory


class ConsistencyModule(DistillationModule):
    """Trains a student of `steps` steps.

    Args:
        denoiser: See `DistillationModule`.
        teacher: See `DistillationModule`.
        guidance: Of the teacher.
        loss: The loss.
        steps: N of the student, its segments.
        teacher_steps: How many steps the teacher takes.
        from_data: Whether the data takes the teacher's place.
        optimizer: See `DiffusionModule`.
        lr_schedule: See `DiffusionModule`.
        seed: See `DiffusionModule`.
        global_batch_size: See `DiffusionModule`.
        compile_network: See `DiffusionModule`.
        channels_last: See `DiffusionModule`.

    Raises:
        ValueError: As `DistillationModule`; if `steps` is below 1, or guidance is asked of data.
    """

    loss: ConsistencyLoss

    def __init__(
        self,
        *,
        denoiser: NetworkDenoiser,
        teacher: NetworkDenoiser,
        loss: ConsistencyLoss,
        optimizer: OptimizerFactory,
        guidance: GuidanceFactory = Unguided,
        steps: int,
        teacher_steps: TeacherSteps,
        from_data: bool = False,
        lr_schedule: LRSchedule | None = None,
        seed: int,
        global_batch_size: int,
        compile_network: bool = False,
        channels_last: bool = False,
    ) -> None:
        if steps < 1:
            raise ValueError(f"method.steps must be at least 1, got {steps}")
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
        self.steps, self.teacher_steps, self.from_data = steps, teacher_steps, from_data
        self.unguided = self.guided is self.teacher
        if from_data and not self.unguided:
            raise ValueError("method.from_data=true has no teacher to guide: guidance@method.guidance=none")

    def distil(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> LossTerms:
        """See `DistillationModule`."""
        return self.loss(
            self.denoiser,
            x0,
            cond,
            rng,
            segments=self.steps,
            steps=self.teacher_steps(self.images_seen, self.steps),
            teacher=None if self.from_data else self.guided,
            plain=None if self.unguided else self.teacher,
            reference=SameDropout(self.denoiser, self.micro_seed("dropout")),
        )
