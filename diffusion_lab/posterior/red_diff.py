r"""RED-diff: optimise one clean image against the measurement, with the denoiser as its regulariser.

No samples are moved. A guess mu of x0 descends, by Adam, with noise levels from noise to data,

    eps ~ N(0, I),   x = alpha mu + sigma eps,
    gradient   A^T (A mu - y) + lambda_t (eps_hat(x) - eps),        lambda_t = weight sigma / alpha.

With x0_hat in place of eps_hat = (x - alpha x0_hat) / sigma the second term is weight (mu - x0_hat), which is what is
computed: mu is pulled to what the denoiser sees in its noisy copy, at pure noise to the mean of the data. The first is
the gradient of |y - A(mu)|^2 / 2 for every differentiable A. mu starts at A^T y, as long as fits y best, or at 0 where
A is not linear; the sampler's steps are not used, only its grid. The authors start at a pseudo-inverse of A.

It seeks a mode and does not sample: q(x0 | y) is a point. Draws for one y differ by little, far less than the
posterior's spread, and their differences mean nothing. Neither is the point calibrated. On Gaussian data of variance S,

    E[mu - x0_hat] = (mu - mean) / (1 + snr S),

which dies out as snr grows: the last steps fit y as if it had no noise, and where noise matters y is trusted too much
(x ~ N(0, 1), y = x + n: mu ends near y, and not at the posterior's mean y / 2). Where y has little noise, mu is about
the posterior's mean, also of entries that y does not tell. Adam's steps of `lr` at each level limit how far mu can go,
and with few of them it does not arrive.

References:
    Mardani et al., "A Variational Perspective on Solving Inverse Problems with Diffusion Models", 2023, algorithm 1,
    with its lambda_t and settings: Adam with lr 0.1 and decay (0.9, 0.99), weight 0.25; theirs is between means, which
    is 0.25 M / D between the sums here, for M numbers in y and D in x.
    Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lab.guidance.unguided import unguided
from diffusion_lab.measurements import Operator
from diffusion_lab.measurements.base import adjoint
from diffusion_lab.posterior.common import dot, measurement
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import BoundDenoiser, Sampler, check_grid
from diffusion_lab.typing import Cond, DenoiserFn, GuidanceFactory, OnStep

DECAY, FLOOR = (0.9, 0.99), 1e-8


@dataclass(frozen=True, kw_only=True)
class REDDiff:
    """Optimisation in place of sampling, for y = `cond["measurement"]`. One call of the denoiser a step of the grid.

    Attributes:
        operator: A, differentiable.
        weight: lambda: how much the denoiser counts against |y - A mu|^2 / 2; the noise of y is part of it.
        lr: Adam's step, in the units of the data.
        inner: A guidance of the denoiser.

    Raises:
        ValueError: If `weight` is negative or `lr` is not positive.
    """

    operator: Operator | None
    weight: float = 0.25
    lr: float = 0.1
    inner: GuidanceFactory = unguided

    def __post_init__(self) -> None:
        if not (self.weight >= 0.0 and self.lr > 0.0):
            raise ValueError(f"REDDiff needs weight >= 0 and lr > 0, got {self.weight} and {self.lr}")

    def __call__(self, denoiser: DenoiserFn) -> DenoiserFn:
        """Return the denoiser that regularises."""
        return self.inner(denoiser)

    def around(self, sampler: Sampler) -> Sampler:
        """Return the optimiser; `sampler` is not used.

        Raises:
            ValueError: If there is no operator.
        """
        if self.operator is None:
            raise ValueError("REDDiff needs a measurement: name one, such as measurement=inpaint")
        return REDDiffOptimiser(operator=self.operator, weight=self.weight, lr=self.lr)


@dataclass(frozen=True, kw_only=True)
class REDDiffOptimiser:
    """What `REDDiff.around` returns; see there for its attributes."""

    operator: Operator
    weight: float
    lr: float

    stochastic = True

    @torch.no_grad()
    def __call__(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        grid: Tensor,
        *,
        cond: Cond | None = None,
        rng: SampleRNG | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Return mu `(B, *D)` after one step of Adam at each level of the grid but the last. See `Stepper.__call__`.

        Of `x` only shape and type count. `on_step` sees mu both as the samples and as the denoiser's output.

        Raises:
            ValueError: If the grid is malformed, `rng` or the measurement is missing, or y does not fit.
        """
        if rng is None:
            raise ValueError("REDDiff draws noise: give it rng=SampleRNG(seeds)")
        bound = BoundDenoiser(denoiser, cond)
        mu = torch.zeros_like(x)
        y = measurement(cond, self.operator(mu), self.operator)
        mu = self._start(mu, y)
        first, second = torch.zeros_like(mu), torch.zeros_like(mu)
        for index, (logsnr, logsnr_next) in enumerate(pairwise(check_grid(grid).unbind(0))):
            noisy = marginal(denoiser.interpolant, mu, rng.randn_like(mu), logsnr)
            g = self._misfit(mu, y) + self.weight * (mu - bound(noisy, logsnr))
            # operations one by one: fused ones may round the end of a batch otherwise than its middle
            first = DECAY[0] * first + (1 - DECAY[0]) * g
            second = DECAY[1] * second + (1 - DECAY[1]) * (g * g)
            k = index + 1
            size = torch.sqrt(second / (1 - DECAY[1] ** k)) + FLOOR
            mu = mu - self.lr * (first / (1 - DECAY[0] ** k)) / size
            if on_step is not None:
                on_step(index, logsnr_next, mu, mu)
        return mu

    def _start(self, zero: Tensor, y: Tensor) -> Tensor:
        if not self.operator.linear:
            return zero
        back = adjoint(self.operator, y, zero.shape)
        seen = self.operator(back)
        norm = dot(seen, seen)
        # c A^T y with the c of the least |y - c A A^T y|; for orthogonal rows of A that is its pseudo-inverse
        c = dot(y, seen) / torch.where(norm > 0, norm, torch.ones_like(norm))
        return c.reshape(-1, *[1] * (zero.ndim - 1)) * back

    def _misfit(self, mu: Tensor, y: Tensor) -> Tensor:
        """The gradient of |y - A(mu)|^2 / 2, `(B, *D)`."""
        with torch.inference_mode(False), torch.enable_grad():
            at = mu.clone().detach().requires_grad_()
            target = y.clone() if y.is_inference() else y
            predicted = self.operator(at)
            (g,) = torch.autograd.grad(predicted, at, (predicted - target).detach())
        return g
