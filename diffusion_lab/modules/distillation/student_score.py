"""A generator and the network that follows it: EM distillation and distribution matching.

    score      learns to denoise what the student makes          `score_steps` optimizer steps
    student    is pushed along the difference to the teacher     `student_steps`, then the score's turn again

What the push is, is the loss's matter (`losses/distillation/em.py`, `distribution_matching.py`). The student score is a
copy of the teacher, and learns with options of its own in `groups`. Of the batch it is the labels that are used: no
data is. Dropout is off in both networks, for it would stand between their answers and the teacher's.

References:
    Xie et al., "EM Distillation for One-step Diffusion Models", 2024.
    Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis", 2024 (two time-scales).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.guidance import Unguided
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.losses.distillation.student_score import GeneratorLoss
from diffusion_lab.modules.diffusion import OptimizerFactory
from diffusion_lab.modules.distillation.base import STUDENT, DistillationModule, Phase, without_dropout
from diffusion_lab.modules.learning_rate import LRSchedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, GuidanceFactory

SCORE = "score"


class StudentScoreModule(DistillationModule):
    """Trains a generator and its score, in turns.

    Args:
        denoiser: See `DistillationModule`. Its dropout is switched off.
        teacher: See `DistillationModule`.
        guidance: Of the teacher.
        loss: The method.
        score_steps: Optimizer steps of the student score before each turn of the student.
        student_steps: Optimizer steps of a student's turn.
        optimizer: See `DiffusionModule`.
        groups: See `DistillationModule`; the parts are "denoiser" and "score".
        lr_schedule: See `DiffusionModule`.
        seed: See `DiffusionModule`.
        global_batch_size: See `DiffusionModule`.
        compile_network: See `DiffusionModule`; the student score's too.
        channels_last: See `DiffusionModule`.

    Raises:
        ValueError: As `DistillationModule`; or if a turn has no steps.
    """

    loss: GeneratorLoss

    def __init__(
        self,
        *,
        denoiser: NetworkDenoiser,
        teacher: NetworkDenoiser,
        loss: GeneratorLoss,
        optimizer: OptimizerFactory,
        guidance: GuidanceFactory = Unguided,
        score_steps: int = 5,
        student_steps: int = 1,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        lr_schedule: LRSchedule | None = None,
        seed: int,
        global_batch_size: int,
        compile_network: bool = False,
        channels_last: bool = False,
    ) -> None:
        self._phases = (
            Phase(name=SCORE, parts=(SCORE,), steps=score_steps),
            Phase(name="student", parts=(STUDENT,), steps=student_steps),
        )
        super().__init__(
            denoiser=denoiser,
            teacher=teacher,
            loss=loss,
            optimizer=optimizer,
            guidance=guidance,
            groups=groups,
            lr_schedule=lr_schedule,
            seed=seed,
            global_batch_size=global_batch_size,
            compile_network=compile_network,
            channels_last=channels_last,
        )
        without_dropout(denoiser)
        self.score = copy.deepcopy(denoiser)

    def parts(self) -> Mapping[str, nn.Module]:
        """See `DistillationModule`."""
        return {**super().parts(), SCORE: self.score}

    def phases(self) -> Sequence[Phase]:
        """See `DistillationModule`."""
        return self._phases

    def distil(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> LossTerms:
        """See `DistillationModule`."""
        if self.phase.name == SCORE:
            return self.loss.follow(self.score, self.denoiser, x0, cond, rng)
        terms: LossTerms = self.loss(self.denoiser, self.guided, self.score, x0, cond, rng)
        return terms

    def on_fit_start(self) -> None:
        """See `DistillationModule`."""
        super().on_fit_start()
        if self.compile_network:
            self.score.network.compile()
