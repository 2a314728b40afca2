"""Distillation of guided models: a student that is told the guidance scale, then students of it with fewer steps.

    GuidedModule               the student answers in one call what its teacher, guided at any scale, answers in two
    GuidedProgressiveModule    `ProgressiveModule` with a scale drawn for each example, told to student and teacher

Only the embedding of the scale is new in the student. It begins by adding nothing, so the student begins as its teacher
without guidance, whatever it is told.

References:
    Meng et al., "On Distillation of Guided Diffusion Models", 2023, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.denoisers.guided import GuidedDenoiser
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.losses.distillation.guided import GuidedLoss, with_scales
from diffusion_lab.losses.distillation.progressive import ProgressiveLoss
from diffusion_lab.modules.diffusion import OptimizerFactory
from diffusion_lab.modules.distillation.base import DistillationModule
from diffusion_lab.modules.distillation.progressive import ProgressiveModule
from diffusion_lab.modules.learning_rate import LRSchedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.samplers import Stepper
from diffusion_lab.typing import Cond


class GuidedModule(DistillationModule):
    """Trains a student that is told the guidance scale.

    Args:
        denoiser: The student, a `GuidedDenoiser`.
        teacher: See `DistillationModule`; trained with and without conditions.
        loss: The loss.
        optimizer: See `DiffusionModule`.
        lr_schedule: See `DiffusionModule`.
        seed: See `DiffusionModule`.
        global_batch_size: See `DiffusionModule`.
        compile_network: See `DiffusionModule`.
        channels_last: See `DiffusionModule`.

    Raises:
        ValueError: As `DistillationModule`; if the student is told no scale, its teacher is, or the network keeps
            magnitudes.
    """

    denoiser: GuidedDenoiser
    loss: GuidedLoss

    def __init__(
        self,
        *,
        denoiser: GuidedDenoiser,
        teacher: NetworkDenoiser,
        loss: GuidedLoss,
        optimizer: OptimizerFactory,
        lr_schedule: LRSchedule | None = None,
        seed: int,
        global_batch_size: int,
        compile_network: bool = False,
        channels_last: bool = False,
    ) -> None:
        if isinstance(teacher, GuidedDenoiser):
            raise ValueError("the teacher is told a guidance scale already: method=guided_progressive")
        super().__init__(
            denoiser=denoiser,
            teacher=teacher,
            loss=loss,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            seed=seed,
            global_batch_size=global_batch_size,
            compile_network=compile_network,
            channels_last=channels_last,
        )
        denoiser.silence()

    def distil(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> LossTerms:
        """See `DistillationModule`."""
        return self.loss(self.denoiser, self.teacher, x0, cond, rng, scales=self.denoiser.scales)


class GuidedProgressiveModule(ProgressiveModule):
    """Trains students of ever fewer steps, each at every guidance scale.

    Args:
        denoiser: See `ProgressiveModule`; a `GuidedDenoiser`.
        teacher: A student of `GuidedModule`, told the same scales.
        sampler: See `ProgressiveModule`.
        loss: See `ProgressiveModule`: its own, `DoubleStepLoss` or `EncoderLoss`.
        steps_from: See `ProgressiveModule`.
        steps_to: See `ProgressiveModule`.
        max_images: See `ProgressiveModule`.
        longer: See `ProgressiveModule`.
        optimizer: See `ProgressiveModule`.
        seed: See `DiffusionModule`.
        global_batch_size: See `DiffusionModule`.
        compile_network: See `DiffusionModule`.
        channels_last: See `DiffusionModule`.

    Raises:
        ValueError: As `ProgressiveModule`; if the teacher is not told the same scales.
    """

    denoiser: GuidedDenoiser

    def __init__(
        self,
        *,
        denoiser: GuidedDenoiser,
        teacher: GuidedDenoiser,
        loss: ProgressiveLoss,
        optimizer: OptimizerFactory,
        sampler: Stepper | None = None,
        steps_from: int,
        steps_to: int = 1,
        max_images: int,
        longer: Mapping[int, float] | None = None,
        seed: int,
        global_batch_size: int,
        compile_network: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            denoiser=denoiser,
            teacher=teacher,
            loss=loss,
            optimizer=optimizer,
            sampler=sampler,
            steps_from=steps_from,
            steps_to=steps_to,
            max_images=max_images,
            longer=longer,
            seed=seed,
            global_batch_size=global_batch_size,
            compile_network=compile_network,
            channels_last=channels_last,
        )
        theirs = getattr(teacher, "scales", None)
        if theirs is None:
            raise ValueError(
                "the teacher is told no guidance scale: train a run of method=guided from it first"
            )
        if theirs != denoiser.scales:
            raise ValueError(
                f"method.denoiser.scales are {list(denoiser.scales)}, the teacher's {list(theirs)}: they must agree"
            )

    def distil(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> LossTerms:
        """See `DistillationModule`."""
        return super().distil(x0, with_scales(cond, self.denoiser.scales, rng), rng)
