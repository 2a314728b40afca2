r"""Gradient estimation: DDIM with its noise estimate corrected by the previous one.

With y = x / alpha and rho = sigma / alpha,

    eps_bar = gamma eps + (1 - gamma) eps_previous,      y_next = y + (rho_next - rho) eps_bar,

or, added to DDIM's step from x0 and eps,

    x_next = x_ddim + (gamma - 1) (sigma_next - alpha_next rho) (eps - eps_previous).

The authors read DDIM as gradient descent on the squared distance to the data, and eps_bar with gamma = 2 as a better
estimate of its gradient. As a solver of the ODE dy / drho = eps it is of order 1: with steps h = rho_next - rho and
h_previous, and eps' = d eps / drho along the solution,

    h eps_bar = h eps + (gamma - 1) h h_previous eps' + O(h^3),      true increment = h eps + h^2 eps' / 2 + O(h^3),

so the error of a step is that of DDIM times 1 - 2 (gamma - 1) h_previous / h, with nearly equal steps 3 - 2 gamma:
gamma = 2 has DDIM's error with the opposite sign, and gamma = 3/2 is Adams-Bashforth's method, of order 2. (With
unequal steps order 2 would need gamma = 1 + h / (2 h_previous), which is DEIS.)

The first step has no previous estimate; it is DDIM's, and so is the last, which returns x0.

References:
    Permenter & Yuan, "Interpreting and Improving Diffusion Models from an Optimization Perspective", 2024 (preprint
    2023), the gradient-estimation sampler.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right, is_infinite
from diffusion_lab.process.gaussian import ddim_step, eps_from_x0
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn


@dataclass(frozen=True, kw_only=True)
class GradientEstimation(Stepper):
    """DDIM along `gamma eps + (1 - gamma) eps_previous`. One call of the denoiser a step; order 1 (2 if gamma = 3/2).

    Attributes:
        gamma: Weight of the present estimate, the paper's 2; 1 is DDIM.

    Raises:
        ValueError: If `gamma` is below 1, which would look backwards.
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        if not self.gamma >= 1.0:
            raise ValueError(f"GradientEstimation needs gamma >= 1, got {self.gamma}")

    def step(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        state: State,
        rng: SampleRNG | None,
    ) -> tuple[Tensor, State]:
        """See `Stepper.step`; the state is eps of the previous step."""
        interpolant = denoiser.interpolant
        x0 = denoiser(x, logsnr)
        eps = eps_from_x0(interpolant, x, x0, logsnr)
        x_ddim = ddim_step(interpolant, x, x0, logsnr, logsnr_next)
        if state is None or is_infinite(logsnr_next, 1):
            return x_ddim, eps
        (alpha, sigma), (alpha_next, sigma_next) = interpolant(logsnr), interpolant(logsnr_next)
        weight = (self.gamma - 1.0) * (sigma_next - alpha_next * sigma / alpha)
        return x_ddim + broadcast_right(weight, x) * (eps - state), eps
