r"""Moment matching in the space of the teacher's parameters: an auxiliary that is one infinitesimal step old.

In place of a second denoiser that is trained (`moments.py`), g_phi is the teacher after one step of an optimizer on the
student's samples, phi - theta = -rate Lambda grad L. To first order g_phi - g_theta = J (phi - theta), with J the
derivative of the teacher's answer by its parameters:

    moments     L = ½ w(s) |x~ - g_theta|^2        its gradient by theta, times -rate Lambda, is the displacement
    student     L = w(s) x~ . J displacement       by one forward-mode product; a gradient through x~ alone

each on a batch of its own. In the paper's letters the displacement is -nu, and the student's loss -w x~ . J nu. It asks
for samples on which the teacher's own loss has no gradient, as data have none for a teacher that is done with learning:
the method of moments, the moments being those gradients and Lambda their metric.

References:
    Salimans, Mensink, Heek & Hoogeboom, "Multistep Distillation of Diffusion Models via Moment Matching", 2024,
    section 3.3 and algorithm 3.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffusion_lab.forward_mode import jvp
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.losses.distillation.moments import MomentLoss, Taken
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn


class Displacement(nn.Module):
    """A vector in the space of a network's parameters, zero at first.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = {name.replace(".", "/"): name for name, _ in network.named_parameters()}
        for own, name in self.names.items():
            parameter = network.get_parameter(name)
            self.register_parameter(own, nn.Parameter(torch.zeros_like(parameter)))

    def by_name(self) -> dict[str, Tensor]:
        """Return its tensors under the names that they have in the network."""
        return {name: self.get_parameter(own) for own, name in self.names.items()}

    @torch.no_grad()
    def forget(self) -> None:
        """Make it zero."""
        for parameter in self.parameters():
            parameter.zero_()


class InstantLoss(MomentLoss):
    """Loss by which a displacement is found, or of the student.

    Args:
        schedule: See `MomentLoss`.
        weighting: See `MomentLoss`.
        label_dropout: See `MomentLoss`.

    Raises:
        ValueError: As `MomentLoss`.
    """

    def moments(self, teacher: nn.Module, displacement: Displacement, taken: Taken) -> Tensor:
        """Return the teacher's loss of each example, `(B,)`, with its gradient by `displacement`.

        Args:
            teacher: A denoiser that is a module.
            displacement: Gets the gradient; the teacher is asked where it is, wherever this is.
            taken: The student's step.
        """
        theta = dict(teacher.named_parameters())
        moved = {name: theta[name] + (d - d.detach()) for name, d in displacement.by_name().items()}
        answer = functional_call(teacher, moved, (taken.x_next, taken.end, taken.cond))
        square = (taken.x0.detach() - answer).square().flatten(1).mean(1)
        return 0.5 * self.weight(taken.end).to(square.dtype) * square

    @torch.no_grad()
    def change(self, teacher: nn.Module, displacement: Displacement, taken: Taken) -> Tensor:
        """Return J displacement, `(B, *D)`: how the teacher's answer to the student's step changes along it."""
        theta = dict(teacher.named_parameters())
        along = displacement.by_name()
        names = list(along)

        def answer(*parameters: Tensor) -> Tensor:
            given = dict(zip(names, parameters, strict=True))
            moved: Tensor = functional_call(teacher, given, (taken.x_next, taken.end, taken.cond))
            return moved

        where, tangents = (tuple(of[name].detach() for name in names) for of in (theta, along))
        return jvp(answer, where, tangents)[1]

    def forward(
        self,
        student: DenoiserFn,
        teacher: nn.Module,
        displacement: Displacement,
        x0: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        steps: int,
        learner: Literal["student", "moments"],
    ) -> LossTerms:
        """Return the losses of clean examples `x0` `(B, *D)`.

        Of the student's turn `total` is the mean of what pushes it, and `per_example` is w(s) |J displacement|^2.

        Args:
            student: The few-step denoiser.
            teacher: A denoiser that is a module; never given a gradient.
            displacement: In the space of its parameters.
            x0: Clean data, images in [-1, 1].
            cond: Conditions, or None.
            rng: Random numbers of this step for these rows.
            steps: k.
            learner: Whose loss it is; nobody else gets a gradient.
        """
        with torch.set_grad_enabled(learner == "student" and torch.is_grad_enabled()):
            taken = self.draw(student, x0, cond, rng, steps)
        if learner == "moments":
            per_example = self.moments(teacher, displacement, taken)
            return LossTerms(total=per_example.mean(), per_example=per_example, logsnr=taken.end)
        change = self.change(teacher, displacement, taken)
        return LossTerms(
            total=self.push(taken, change).mean(), per_example=self.apart(taken, change), logsnr=taken.end
        )
