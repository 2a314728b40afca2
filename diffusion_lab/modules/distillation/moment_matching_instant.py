"""Moment matching in parameter space: the auxiliary is one step of the optimizer away from the teacher, every time.

What learns beside the student is no network but a displacement in the space of the teacher's parameters
(`losses/distillation/moments_instant.py`). Its turn is first: it is set to zero, and a step of the optimizer moves it.
That step is the paper's Lambda: for Adam with beta1 = 0 the gradient over the root of its own running second moment,
for SGD the gradient itself. So the displacement is in the checkpoint, its gradient is averaged over processes and
micro-batches as every other, and a resume between the two turns is bitwise.

Its learning rate is a unit in which the student's loss is measured: with Adam for the student it hardly matters, except
beside clipping. Both batches are independent, being those of two steps.

References:
    Salimans, Mensink, Heek & Hoogeboom, "Multistep Distillation of Diffusion Models via Moment Matching", 2024,
    algorithm 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.losses.distillation.moments_instant import Displacement, InstantLoss
from diffusion_lab.modules.diffusion import DiffusionModule, OptimizerFactory
from diffusion_lab.modules.distillation.base import DistillationModule, Phase
from diffusion_lab.modules.learning_rate import LRSchedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond


class InstantMomentMatchingModule(DistillationModule):
    """Trains a student of `steps` ancestral steps without a second network.

    A guided teacher is not offered: its own loss on data has a gradient, so there is no moment to match.

    Args:
        denoiser: See `DistillationModule`.
        teacher: See `DistillationModule`; without dropout.
        loss: The loss.
        steps: k of the student.
        moment_steps: Optimizer steps whose displacements are added up before each step of the student.
        optimizer: See `DiffusionModule`.
        groups: Options of the optimizer for `denoiser` and `moments`; beta1 = 0 for both is the paper's.
        lr_schedule: See `DiffusionModule`.
        seed: See `DiffusionModule`.
        global_batch_size: See `DiffusionModule`.
        compile_network: See `DiffusionModule`; the student's alone.
        channels_last: See `DiffusionModule`.

    Raises:
        ValueError: As `DistillationModule`, or if `steps` or `moment_steps` is below 1.
    """

    loss: InstantLoss

    def __init__(
        self,
        *,
        denoiser: NetworkDenoiser,
        teacher: NetworkDenoiser,
        loss: InstantLoss,
        optimizer: OptimizerFactory,
        steps: int,
        moment_steps: int = 1,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        lr_schedule: LRSchedule | None = None,
        seed: int,
        global_batch_size: int,
        compile_network: bool = False,
        channels_last: bool = False,
    ) -> None:
        if steps < 1 or moment_steps < 1:
            raise ValueError(
                f"method.steps and method.moment_steps must be at least 1, got {steps} and {moment_steps}"
            )
        super().__init__(
            denoiser=denoiser,
            teacher=teacher,
            loss=loss,
            optimizer=optimizer,
            groups=groups,
            lr_schedule=lr_schedule,
            seed=seed,
            global_batch_size=global_batch_size,
            compile_network=compile_network,
            channels_last=channels_last,
        )
        self.steps, self.moment_steps = steps, moment_steps
        self.moments = Displacement(teacher)

    def parts(self) -> Mapping[str, nn.Module]:
        """See `DistillationModule`."""
        return {**super().parts(), "moments": self.moments}

    def phases(self) -> Sequence[Phase]:
        """See `DistillationModule`: the moments come first."""
        return (
            Phase(name="moments", parts=("moments",), steps=self.moment_steps),
            Phase(name="student", parts=("denoiser",)),
        )

    def begin_step(self) -> None:
        """See `DistillationModule`; each turn of the moments begins at the teacher."""
        super().begin_step()
        if self.step % (self.moment_steps + 1) == 0:
            self.moments.forget()

    def distil(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> LossTerms:
        """See `DistillationModule`."""
        return self.loss(
            self.denoiser,
            self.teacher,
            self.moments,
            x0,
            cond,
            rng,
            steps=self.steps,
            learner="moments" if self.phase.name == "moments" else "student",
        )

    def on_fit_start(self) -> None:
        """See `DistillationModule`; a compiled teacher could be asked neither with other parameters nor forwards."""
        DiffusionModule.on_fit_start(self)
        self.teacher.to(self.device)
