"""Multistep moment matching: student and auxiliary denoiser learn in turn, both from the teacher.

The auxiliary starts as a copy of the teacher too, and is a part of the module beside the student: it is in the
checkpoint, and in no export. Even steps are its own, odd ones the student's (`losses/distillation/moments.py`).

Dropout would make the difference of auxiliary and teacher a matter of chance: either both have the same, drawn from the
same seed in each call, or neither has any: under guidance, whose branches are rows of one call, none. The student has
its own.

With a reward (`losses/distillation/rewarded.py`) the last part of the run is another stage. Its first step keeps a copy
of the student, towards which it is pulled, and which is sampled as `ema=unrewarded`; from there on the student's own
samples take the data's place. A checkpoint within that stage holds the copy.

References:
    Salimans, Mensink, Heek & Hoogeboom, "Multistep Distillation of Diffusion Models via Moment Matching", 2024,
    algorithm 2.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.guidance import Unguided
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.losses.distillation.moments import AlternatingLoss
from diffusion_lab.losses.distillation.rewarded import Rewarded, own_samples
from diffusion_lab.modules.diffusion import OptimizerFactory
from diffusion_lab.modules.distillation.base import DistillationModule, Phase, without_dropout
from diffusion_lab.modules.distillation.former_student import FormerStudent
from diffusion_lab.modules.distillation.same_dropout import SameDropout
from diffusion_lab.modules.learning_rate import LRSchedule
from diffusion_lab.rewards import NoReward
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, GuidanceFactory


class MomentMatchingModule(DistillationModule):
    """Trains a student of `steps` ancestral steps, and its auxiliary denoiser.

    Args:
        denoiser: See `DistillationModule`.
        teacher: See `DistillationModule`.
        guidance: Of the teacher.
        loss: The loss of both.
        steps: k of the student.
        auxiliary_steps: Optimizer steps of the auxiliary before each of the student.
        dropout: Whether auxiliary and teacher have dropout, the same; False takes it from both, and so does guidance.
        rewarded: The reward's stage; without a reward there is none.
        max_images: Length of the run.
        optimizer: See `DiffusionModule`.
        groups: Options of the optimizer for `denoiser` and `auxiliary`; beta1 = 0 for both is the paper's.
        lr_schedule: See `DiffusionModule`.
        seed: See `DiffusionModule`.
        global_batch_size: See `DiffusionModule`.
        compile_network: See `DiffusionModule`.
        channels_last: See `DiffusionModule`.

    Raises:
        ValueError: As `DistillationModule`; if `steps` is below 1, or the reward's stage has no step, or all.
    """

    loss: AlternatingLoss

    def __init__(
        self,
        *,
        denoiser: NetworkDenoiser,
        teacher: NetworkDenoiser,
        loss: AlternatingLoss,
        optimizer: OptimizerFactory,
        guidance: GuidanceFactory = Unguided,
        steps: int,
        auxiliary_steps: int = 1,
        dropout: bool = True,
        rewarded: Rewarded | None = None,
        max_images: int,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        lr_schedule: LRSchedule | None = None,
        seed: int,
        global_batch_size: int,
        compile_network: bool = False,
        channels_last: bool = False,
    ) -> None:
        if steps < 1 or auxiliary_steps < 1:
            raise ValueError(
                f"method.steps and method.auxiliary_steps must be at least 1, got {steps} and {auxiliary_steps}"
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
        self.steps, self.auxiliary_steps = steps, auxiliary_steps
        self.auxiliary = copy.deepcopy(teacher).train().requires_grad_(True)
        if dropout and self.guided is self.teacher:
            for layer in teacher.modules():
                if isinstance(layer, nn.Dropout):
                    layer.train()
        else:
            without_dropout(self.auxiliary)
        off = rewarded is None or isinstance(rewarded.reward, NoReward | None)
        self.rewarded = None if off else rewarded
        self.rewarded_from: int | None = None
        self._former: FormerStudent | None = None
        if self.rewarded is not None:
            self._plan(self.rewarded, max_images)
            self._former = FormerStudent(
                denoiser, key="unrewarded_student", method="rewarded moment matching"
            )

    def _plan(self, rewarded: Rewarded, max_images: int) -> None:
        """Lay the border of the two stages where the auxiliary's turn begins."""
        cycle = self.global_batch_size * (self.auxiliary_steps + 1)
        self.rewarded_from = round((1.0 - rewarded.part) * max_images / cycle) * cycle
        if not 0 < self.rewarded_from < max_images:
            raise ValueError(
                f"method.rewarded.part={rewarded.part} of {max_images} images, in turns of {cycle}, leaves one of the "
                "stages without a step: train longer"
            )

    def parts(self) -> Mapping[str, nn.Module]:
        """See `DistillationModule`."""
        return {**super().parts(), "auxiliary": self.auxiliary}

    def phases(self) -> Sequence[Phase]:
        """See `DistillationModule`: the auxiliary begins."""
        return (
            Phase(name="auxiliary", parts=("auxiliary",), steps=self.auxiliary_steps),
            Phase(name="student", parts=("denoiser",)),
        )

    @property
    def is_rewarded(self) -> bool:
        """Whether the step that comes next, or is being done, belongs to the reward's stage."""
        return self.rewarded_from is not None and self.images_seen >= self.rewarded_from

    def distil(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> LossTerms:
        """See `DistillationModule`."""
        rewarded = self.is_rewarded
        return self.loss(
            self.denoiser,
            self.auxiliary,
            SameDropout(self.guided, self.micro_seed("auxiliary_dropout")),
            self._own_samples(x0, cond, rng) if rewarded else x0,
            cond,
            rng,
            steps=self.steps,
            learner="auxiliary" if self.phase.name == "auxiliary" else "student",
            rewarded=self.rewarded if rewarded else None,
            reference=self._former.denoiser if self._former and rewarded else None,
        )

    def _own_samples(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> Tensor:
        """What the student makes when it is sampled: without dropout."""
        self.denoiser.eval()
        try:
            own = own_samples(self.denoiser, x0, cond, rng, schedule=self.loss.schedule, steps=self.steps)
        finally:
            self.denoiser.train()
        # autocast may keep its copies of the weights, made here without gradient, for the student's own call
        torch.clear_autocast_cache()
        return own

    def begin_step(self) -> None:
        """See `DistillationModule`; where the reward's stage begins, the student is copied."""
        super().begin_step()
        if self._former is not None and self.images_seen == self.rewarded_from:
            self._former.take(self.denoiser, self.device)

    def milestone(self) -> str | None:
        """See `DistillationModule`: `unrewarded` at the end of moment matching, where a reward comes after it."""
        return "unrewarded" if self.images_seen == self.rewarded_from else None

    def on_fit_start(self) -> None:
        """See `DistillationModule`."""
        super().on_fit_start()
        if self.compile_network:
            self.auxiliary.network.compile()
        if self._former is not None and self.is_rewarded:
            self._former.denoiser.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `DiffusionModule`; within the reward's stage the student as it was is part of the state."""
        super().on_save_checkpoint(checkpoint)
        if self._former is not None:
            self._former.save(checkpoint, border=self.rewarded_from, images_seen=self.images_seen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `DiffusionModule` and `FormerStudent.load`."""
        super().on_load_checkpoint(checkpoint)
        if self._former is not None:
            self._former.load(checkpoint, border=self.rewarded_from, images_seen=self.images_seen)
