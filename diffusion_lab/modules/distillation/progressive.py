"""Progressive distillation: a student of N steps learns from one of 2 N, then becomes the teacher of the next.

    stage 0:  the given teacher, 2 N steps   ->  student, N
    stage k:  the student of stage k - 1     ->  student, half as many steps

Each stage starts from the student's own weights, with a fresh optimizer and learning rate. The first step of a stage
does that: the weights go to the previous student, the optimizer forgets. So a checkpoint at the very border needs
nothing, and one within a stage holds the previous student too; either goes on bitwise.

Guidance and aDDIM belong to the first stage: its student has learnt to step like the guided, lengthened teacher, and
its own plain DDIM steps are that from then on. Applied again they would count twice.

References:
    Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.guidance import Unguided
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.losses.distillation.progressive import ProgressiveLoss
from diffusion_lab.losses.distillation.teacher_steps import Variance
from diffusion_lab.modules.diffusion import OptimizerFactory
from diffusion_lab.modules.distillation.base import DistillationModule, without_dropout
from diffusion_lab.modules.distillation.former_student import FormerStudent
from diffusion_lab.modules.distillation.halvings import Halving, LinearPerHalving, halvings
from diffusion_lab.rng import StepRNG
from diffusion_lab.samplers import DDIM, Stepper
from diffusion_lab.samplers.addim import ADDIM
from diffusion_lab.typing import Cond, DenoiserFn, GuidanceFactory


def variance_of(sampler: Stepper) -> Variance | None:
    """Return the x_var of a teacher's sampler: None for DDIM, that of aDDIM.

    Raises:
        ValueError: If it is another sampler, or draws noise.
    """
    if isinstance(sampler, ADDIM) and not sampler.adjust_last:
        return sampler.x_var
    if isinstance(sampler, DDIM) and not sampler.stochastic:
        return None
    raise ValueError("the teacher's sampler must be DDIM with eta=0, or ADDIM with adjust_last=false")


class ProgressiveModule(DistillationModule):
    """Trains a student of ever fewer steps.

    Args:
        denoiser: See `DistillationModule`. Its dropout is switched off.
        teacher: See `DistillationModule`.
        guidance: Of the first teacher.
        sampler: How the first teacher steps: DDIM or ADDIM.
        loss: The loss of a halving.
        steps_from: Steps of the first teacher.
        steps_to: Steps of the last student.
        max_images: Length of the run, shared out among the halvings.
        longer: Shares of the halvings to N steps, by N; 1 for all others.
        optimizer: See `DiffusionModule`. Its learning rate falls to zero within each halving.
        seed: See `DiffusionModule`.
        global_batch_size: See `DiffusionModule`.
        compile_network: See `DiffusionModule`.
        channels_last: See `DiffusionModule`.

    Raises:
        ValueError: As `DistillationModule`, `halvings` and `variance_of`.
    """

    loss: ProgressiveLoss

    def __init__(
        self,
        *,
        denoiser: NetworkDenoiser,
        teacher: NetworkDenoiser,
        loss: ProgressiveLoss,
        optimizer: OptimizerFactory,
        guidance: GuidanceFactory = Unguided,
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
        self.halvings = halvings(
            steps_from=steps_from,
            steps_to=steps_to,
            max_images=max_images,
            global_batch_size=global_batch_size,
            longer=longer,
        )
        super().__init__(
            denoiser=denoiser,
            teacher=teacher,
            loss=loss,
            optimizer=optimizer,
            guidance=guidance,
            lr_schedule=LinearPerHalving(stages=self.halvings),
            seed=seed,
            global_batch_size=global_batch_size,
            compile_network=compile_network,
            channels_last=channels_last,
        )
        without_dropout(denoiser)
        self.x_var = variance_of(DDIM() if sampler is None else sampler)
        self._former = FormerStudent(denoiser, key="previous_student", method="progressive distillation")

    @property
    def halving(self) -> Halving:
        """The stage of the step that comes next, or is being done."""
        assert isinstance(self.lr_schedule, LinearPerHalving)
        return self.lr_schedule.at(self.images_seen)

    @property
    def previous(self) -> NetworkDenoiser:
        """The student of the stage before; not yet trained in the first."""
        return self._former.denoiser

    @property
    def stage_teacher(self) -> DenoiserFn:
        """Whom the student learns from now."""
        return self.guided if self.halving.start == 0 else self.previous

    def distil(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> LossTerms:
        """See `DistillationModule`."""
        stage = self.halving
        return self.loss(
            self.denoiser,
            self.stage_teacher,
            x0,
            cond,
            rng,
            steps=stage.steps,
            x_var=self.x_var if stage.start == 0 else None,
        )

    def begin_step(self) -> None:
        """See `DistillationModule`; at the border of two stages the student becomes the teacher."""
        super().begin_step()
        if 0 < self.images_seen == self.halving.start:
            self._former.take(self.denoiser, self.device)
            self.teacher.to("cpu")
            optimizer: Any = self.optimizers()
            optimizer.optimizer.state.clear()

    def milestone(self) -> str | None:
        """See `DistillationModule`: `steps_<N>` at the end of each stage."""
        done = [stage.steps for stage in self.halvings if stage.stop == self.images_seen]
        return f"steps_{done[0]}" if done else None

    def on_fit_start(self) -> None:
        """See `DistillationModule`."""
        super().on_fit_start()
        if self.compile_network:
            self.previous.network.compile()
        if self.halving.start > 0:
            self.previous.to(self.device)
            self.teacher.to("cpu")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `DiffusionModule`; within a later stage the previous student is part of the state."""
        super().on_save_checkpoint(checkpoint)
        self._former.save(checkpoint, border=self.halving.start, images_seen=self.images_seen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `DiffusionModule` and `FormerStudent.load`."""
        super().on_load_checkpoint(checkpoint)
        self._former.load(checkpoint, border=self.halving.start, images_seen=self.images_seen)
