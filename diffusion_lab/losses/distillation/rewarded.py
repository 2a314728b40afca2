r"""Rewarded moment matching: a student that has learnt its teacher's data goes on towards what a reward likes.

After moment matching (`moments.py`) the student learns from its own samples: x0 is what its k steps make of noise, it
is noised to t again, and one step with gradient is taken from there. To the student's loss of that step are added

    - strength R(x~) / D  +  pull mean (x~ - x~_0)^2                  D numbers a sample, as the mean over dimensions

with x~_0 the answer of the student as it was before it was rewarded, so that its direction is

    w(s) (g_phi - g_theta)  -  strength grad R  +  2 pull (x~ - x~_0).

R is any function with a gradient (`diffusion_lab.rewards`). The first term holds the student to its teacher: without
the last one, for `weighting=snr_plus_one` and regulariser r, it is 1 / ((1 + r) alpha) times the difference of two
scores. At little noise, and so with many steps, the student's law tends to p(x0) exp((1 + r) strength R(x0)); with few,
where the two are compared at more noise, it is tilted further.

References:
    Jacq, Couairon, De Bortoli et al., "RMMD", 2026 (arXiv 2606.30414), from a secondary note: whether w weighs the
    reward too is not said there; here it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.losses.noise_levels import U_MARGIN
from diffusion_lab.process.broadcast import scaled_add
from diffusion_lab.process.gaussian import posterior
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn


@dataclass(frozen=True, kw_only=True)
class Rewarded:
    """What a reward adds to the student's loss.

    Attributes:
        reward: `(x0 (B, *D), cond) -> (B,)`, with a gradient; None adds nothing.
        strength: lambda, above 0.
        pull: Towards the student as it was; None is strength / 2, the paper's.
        part: The share of the run, its last, in which the student is rewarded; in (0, 1).

    Raises:
        ValueError: If a number is out of its range.
    """

    reward: Callable[..., Tensor] | None = None
    strength: float = 0.1
    pull: float | None = None
    part: float = 0.2

    def __post_init__(self) -> None:
        pull = 0.0 if self.pull is None else self.pull
        if not self.strength > 0.0 or not 0.0 < self.part < 1.0 or pull < 0.0:
            raise ValueError(
                f"Rewarded needs strength > 0, pull >= 0 and part in (0, 1), got {self.strength}, {self.pull} and "
                f"{self.part}"
            )

    def __call__(self, x0: Tensor, before: Tensor, cond: Cond | None = None) -> Tensor:
        """Return what is added to the loss of each example, `(B,)`.

        Args:
            x0: The student's answer, `(B, *D)`.
            before: That of the student as it was, `(B, *D)`.
            cond: Conditions.

        Raises:
            ValueError: If the reward has no gradient.
        """
        assert self.reward is not None
        value = self.reward(x0, cond)
        if x0.requires_grad and not value.requires_grad:
            name = type(self.reward).__name__
            raise ValueError(f"the reward {name} has no gradient: a student cannot learn from it")
        pull = self.strength / 2 if self.pull is None else self.pull
        apart = (x0 - before.detach()).square().flatten(1).mean(1)
        return pull * apart - self.strength * value / x0[0].numel()


@torch.no_grad()
def own_samples(
    student: DenoiserFn,
    like: Tensor,
    cond: Cond | None,
    rng: StepRNG,
    *,
    schedule: Schedule,
    steps: int,
) -> Tensor:
    """Return samples of the student in `steps` ancestral steps, `(B, *D)`.

    Args:
        student: Asked `steps` times.
        like: A batch of the data, for its shape.
        cond: Conditions.
        rng: Random numbers of this step for these rows.
        schedule: On whose u-axis the steps are even.
        steps: k.
    """
    u = 1.0 - torch.arange(steps, dtype=torch.float64, device=like.device) / steps
    levels = schedule(u.clamp(max=1.0 - U_MARGIN))
    # a noise end of finite signal all the same starts from noise alone, as samplers do
    x = scaled_add(torch.zeros_like(like), student.interpolant(levels[0])[1], _noise(rng, "own_start", like))
    for i in range(steps - 1):
        x0 = student(x, levels[i].expand(len(x)), cond)
        mean, variance, _ = posterior(student.interpolant, x, x0, levels[i], levels[i + 1])
        x = scaled_add(mean, variance.sqrt(), _noise(rng, f"own_step_{i}", like))
    return student(x, levels[-1].expand(len(x)), cond)


def _noise(rng: StepRNG, tag: str, like: Tensor) -> Tensor:
    return rng.randn(tag, like.shape[1:], dtype=like.dtype)
