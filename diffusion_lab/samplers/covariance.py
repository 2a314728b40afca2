r"""Covariance-aware sampling: DDIM to a draw of x0 instead of its mean.

DDIM's map from x to x_next is linear in x0. Put a draw x* ~ p(x0 | x) in place of the mean x0 and x_next has the exact
marginal, however long the step; put the mean, and the variance c^2 Var[x0 | x] is missing. Here it is put back:

    x_next = alpha_next x0 + (sigma_next / sigma) (x - alpha x0) + c V^(1/2) xi,
    c = alpha_next - alpha sigma_next / sigma = alpha_next (1 - exp(-h)),      h half the gap in log-SNR,
    V = Var[x0 | x] = (sigma^2 / alpha) J,      J = dx0 / dx        (Tweedie's formula, second order).

V is taken as diagonal in a basis of cosines (`covariance_structures.py`), which one forward-mode derivative suffices
for: J u comes with x0 from one call of about twice the price. On Gaussian data with such a covariance every step of
every grid is exact. d is kept within

    0 <= d <= limit / (1 / S + alpha^2 / sigma^2),

`limit` times the variance left by the best linear estimate from x of data with variance S, which bounds d on the
average, while modes far apart may exceed it at single points. At pure noise J / alpha is 0 / 0 and V is S itself;
without an S that step is DDIM's.

A network's J is asked of the denoiser as the sampler gets it, guided and modified. A denoiser with an attribute
`conditional`, which is another denoiser, is differentiated there, before guidance and clipping, at one more call.

References:
    Schioppa & Salimans, "Covariance-aware Sampling for Diffusion Models", 2026. Written from its abstract: the step is
    Heek et al.'s "noisy DDIM" with a coloured covariance; probe, averages, clipping and block size are ours.
    Heek, Hoogeboom & Salimans, "Multistep Consistency Models", 2024, eqs. 10-13 and appendix A.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.forward_mode import jvp
from diffusion_lab.process.broadcast import broadcast_right, is_infinite
from diffusion_lab.process.gaussian import ddim_step
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import BoundDenoiser, State, Stepper
from diffusion_lab.samplers.covariance_structures import (
    CovarianceStructure,
    StructureName,
    named_structure,
)
from diffusion_lab.typing import DenoiserFn


def jacobian_product(denoiser: DenoiserFn, x: Tensor, logsnr: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return E[x0 | x] and (dE[x0 | x] / dx) u from one call, shapes of `x`; level and conditions are constants.

    Raises:
        NotImplementedError: If the denoiser has an operation without forward-mode derivative.
    """
    x0, Ju = jvp(lambda x: denoiser(x, logsnr), (x,), (u,))
    if isinstance(denoiser, BoundDenoiser):
        # what it remembers from inside is a dual tensor, which is of no use outside
        denoiser.last = x0
    return x0, Ju


@dataclass(frozen=True, kw_only=True)
class CovarianceAware(Stepper):
    """DDIM with noise of the estimated posterior covariance. One call a step, all but the last with its derivative.

    N steps cost N calls but the time of about 2 N - 1: compare it with Heun's method at equal N. From pure noise
    without `prior_variance` the first call is a plain one too.

    Args:
        structure: "full" (cosines of the whole image), "block" (of blocks), "scalar", "lanczos", or an object.
        block: Side of the blocks of "block".
        channels: Whether channels share their variances in "full" and "block".
        bands: Whether frequencies of about the same radius do.
        products: Derivatives a step of "lanczos".
        noise: Multiplies the standard deviation of the added noise; 0 is DDIM, to the bit and at its price.
        limit: Largest variance, in multiples of the linear estimate's.
        prior_variance: S, variance of the data in the structure's basis: a number, a tensor such as
            `structure.variances(x0)`, or None for unknown (infinite).
        final_noise: Whether the last step adds noise too: exact on Gaussian data, grain on images.

    Raises:
        ValueError: If `noise` or `limit` is negative, a prior variance is negative, or a name is unknown.
    """

    structure: StructureName | CovarianceStructure = "full"
    block: int = 8
    channels: bool = True
    bands: bool = False
    products: int = 3
    noise: float = 1.0
    limit: float = 4.0
    prior_variance: float | Tensor | None = None
    final_noise: bool = False

    def __post_init__(self) -> None:
        if not (self.noise >= 0.0 and self.limit >= 0.0):
            raise ValueError(f"CovarianceAware needs noise and limit of at least 0, got {self}")
        if self.prior_variance is not None and not bool((torch.as_tensor(self.prior_variance) >= 0).all()):
            raise ValueError("CovarianceAware needs prior_variance of at least 0")
        self._structure  # an unknown name is refused here  # noqa: B018

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether steps draw noise."""
        return self.noise > 0.0

    @property
    def _structure(self) -> CovarianceStructure:
        if not isinstance(self.structure, str):
            return self.structure
        return named_structure(
            self.structure,
            block=self.block,
            channels=self.channels,
            bands=self.bands,
            products=self.products,
        )

    def _prior(self, x: Tensor) -> Tensor | None:
        """S, 0-d on the CPU or like `x`."""
        if not isinstance(self.prior_variance, Tensor):
            return None if self.prior_variance is None else torch.tensor(self.prior_variance).double()
        return self.prior_variance.to(x) if self.prior_variance.ndim else self.prior_variance

    def step(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        state: State,
        rng: SampleRNG | None,
    ) -> tuple[Tensor, State]:
        """See `Stepper.step`."""
        prior, pure = self._prior(x), is_infinite(logsnr, -1)
        last = is_infinite(logsnr_next, 1)
        if not self.stochastic or (last and not self.final_noise) or (pure and prior is None):
            return ddim_step(denoiser.interpolant, x, denoiser(x, logsnr), logsnr, logsnr_next), None
        assert rng is not None
        if pure:
            assert prior is not None
            x0, n = denoiser(x, logsnr), self._structure.draw_prior(prior, x, rng)
        else:
            x0, n = self._draw(denoiser, x, logsnr, prior, rng)
        alpha_next, _ = denoiser.interpolant(logsnr_next)
        c = -alpha_next * torch.expm1(0.5 * (logsnr - logsnr_next))
        x_next = ddim_step(denoiser.interpolant, x, x0, logsnr, logsnr_next)
        return x_next + broadcast_right(self.noise * c, x) * n, None

    def _draw(
        self, denoiser: DenoiserFn, x: Tensor, logsnr: Tensor, prior: Tensor | None, rng: SampleRNG
    ) -> tuple[Tensor, Tensor]:
        """Return E[x0 | x] and a draw from N(0, V)."""
        alpha, sigma = denoiser.interpolant(logsnr)
        scale = broadcast_right(sigma**2 / alpha, x)
        conditional = getattr(denoiser, "conditional", None)
        differentiated = denoiser if conditional is None else conditional

        def product(u: Tensor) -> tuple[Tensor, Tensor]:
            x0, Ju = jacobian_product(differentiated, x, logsnr, u)
            return x0, scale * Ju

        def clip(d: Tensor) -> Tensor:
            snr = broadcast_right(torch.exp(logsnr), d)
            most = self.limit / (snr if prior is None else 1 / prior + snr)
            return torch.minimum(d.clamp_min(0), most)

        x0, n = self._structure.draw(product, x, rng, clip)
        return (x0 if conditional is None else denoiser(x, logsnr)), n
