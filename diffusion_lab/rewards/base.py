r"""What a reward is: a number r(x0) for each clean sample, the larger the better.

A sampler steered with strength lambda aims at

    p(x0) exp(lambda r(x0)) / Z,

so a log-likelihood log p(y | x0) as the reward, with lambda = 1, aims at the posterior p(x0 | y). A reward need not be
differentiable. It sees estimates of x0 as well, which are smoother than samples.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from diffusion_lab.typing import Cond


@runtime_checkable
class Reward(Protocol):
    """A number for each clean sample."""

    def __call__(self, x0: Tensor, cond: Cond | None = None) -> Tensor:
        """Return r `(B,)`, finite, for clean samples or estimates of them, `(B, *D)`; no sample sees another.

        Args:
            x0: Clean samples.
            cond: What they were asked for; its tensors have the samples as their first axis.
        """
        ...
