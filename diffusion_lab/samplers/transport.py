r"""From one law of data to another, along the field of a stochastic interpolant (`process/stochastic_interpolant.py`).

    ODE    dX = v dtau                                                      Heun's method, order 2
    SDE    dX = (v - (epsilon / g) xi) dtau + sqrt(2 epsilon) dW            Euler-Maruyama, weak order 1

with velocity v(x, tau) and denoiser xi(x, tau) = E[xi | x]. Both give the interpolant's marginals, the SDE for every
epsilon(tau) >= 0, which is chosen after training and must vanish where g does.

These are no `Sampler`s: they start from samples of the source, not from noise, and step in tau, not in log-SNR.

References:
    Albergo, Boffi & Vanden-Eijnden, "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions", 2023,
        section 2 (the ODE and the SDE of any epsilon).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lab.process.stochastic_interpolant import Field, StochasticInterpolant
from diffusion_lab.rng import SampleRNG
from diffusion_lab.typing import Cond

OnTime = Callable[[int, Tensor, Tensor], None]
"""`on_step(index, tau, x)`: called after each step, with the time and samples after it."""


@dataclass(frozen=True, kw_only=True)
class VanishingNoise:
    """epsilon = scale tau (1 - tau).

    Raises:
        ValueError: If `scale` is negative or not finite.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.scale < math.inf:
            raise ValueError(f"VanishingNoise needs a finite scale >= 0, got {self.scale}")

    def __call__(self, tau: Tensor) -> Tensor:
        """Return epsilon."""
        return self.scale * tau * (1.0 - tau)


def _check(times: Tensor) -> Tensor:
    times = times.detach().to(device="cpu", dtype=torch.float64)
    inside = bool((times >= 0).all()) and bool((times <= 1).all())
    if times.ndim != 1 or times.shape[0] < 2 or not inside or not bool((times[1:] > times[:-1]).all()):
        raise ValueError(
            "transport needs at least two times in [0, 1], strictly increasing from source to data"
        )
    return times


def _ask(field: Field, x: Tensor, tau: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor | None]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return field(x, torch.full((x.shape[0],), float(tau), dtype=dtype, device=x.device), cond)


@torch.no_grad()
def transport_ode(
    field: Field,
    x: Tensor,
    times: Tensor,
    *,
    cond: Cond | None = None,
    on_step: OnTime | None = None,
) -> Tensor:
    """Carry samples along the velocity. Two calls of the field a step.

    Args:
        field: Velocity and denoiser of the bridge.
        x: Samples of the law at `times[0]`, `(B, *D)`; of the source at 0.
        times: Increasing times in [0, 1], `(N + 1,)`.
        cond: Conditions of the field.
        on_step: Called after each step.

    Returns:
        Samples at `times[-1]`, `(B, *D)`.

    Raises:
        ValueError: If the times are malformed.
    """
    for index, (tau, tau_next) in enumerate(pairwise(_check(times).unbind(0))):
        h = float(tau_next - tau)
        v, _ = _ask(field, x, tau, cond)
        v_next, _ = _ask(field, x + h * v, tau_next, cond)
        x = x + 0.5 * h * (v + v_next)
        if on_step is not None:
            on_step(index, tau_next, x)
    return x


@torch.no_grad()
def transport_sde(
    field: Field,
    interpolant: StochasticInterpolant,
    x: Tensor,
    times: Tensor,
    *,
    epsilon: Callable[[Tensor], Tensor],
    rng: SampleRNG,
    cond: Cond | None = None,
    on_step: OnTime | None = None,
) -> Tensor:
    """Carry samples along the velocity with noise `epsilon`. One call of the field a step.

    Args:
        field: Velocity and denoiser of the bridge.
        interpolant: The bridge, for g.
        x: Samples of the law at `times[0]`, `(B, *D)`; of the source at 0.
        times: Increasing times in [0, 1], `(N + 1,)`.
        epsilon: Half the diffusion coefficient as a function of tau, e.g. `VanishingNoise`.
        rng: Noise of each sample.
        cond: Conditions of the field.
        on_step: Called after each step.

    Returns:
        Samples at `times[-1]`, `(B, *D)`.

    Raises:
        ValueError: If the times are malformed, epsilon is negative, or is not zero where g is, or the field has no xi.
    """
    for index, (tau, tau_next) in enumerate(pairwise(_check(times).unbind(0))):
        h, e, g = float(tau_next - tau), float(epsilon(tau)), float(interpolant.latent(tau)[0])
        if e < 0.0 or (e > 0.0 and g == 0.0):
            raise ValueError(
                f"epsilon must be >= 0, and 0 where the bridge has no noise; it is {e} at tau = {tau}"
            )
        v, xi = _ask(field, x, tau, cond)
        if e > 0.0:
            if xi is None:
                raise ValueError("a field without xi has no score, and so no SDE")
            v = v - e / g * xi
        x = x + h * v
        if e > 0.0:
            x = x + math.sqrt(2.0 * e * h) * rng.randn_like(x)
        if on_step is not None:
            on_step(index, tau_next, x)
    return x
