r"""Transport along a bridge (`transport.py`) in the shape of a sampler, so that its runs are sampled like any other.

    x = cond["image"], the source, or the noise at grid[0] where there is none        as in training
    tau = the time at which 2 log(b / a) is the grid's log-SNR                        0 at -inf, 1 at +inf
    then the ODE or the SDE from tau = 0 to 1

`grid=uniform_time` makes steps of equal tau on the linear path, and so does `uniform_u` with an unbounded cosine
(`schedule=cosmap`) on the trigonometric one. Such a sampler `carries`: it takes the field of a bridge, and no denoiser.

References:
    Albergo, Boffi & Vanden-Eijnden, "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions", 2023,
        section 2 (the ODE and the SDE of any epsilon).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.denoisers.bridge import SOURCE, BridgeField, time_of
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import check_grid, check_rng
from diffusion_lab.samplers.transport import OnTime, transport_ode, transport_sde
from diffusion_lab.typing import Cond, DenoiserFn, OnStep

USE = "sampler=transport_ode or transport_sde"


def check_kinds(denoiser: object, sampler: object) -> None:
    """Refuse a sampler of denoisers for the field of a bridge, and the other way round.

    Raises:
        ValueError: If they do not go together.
    """
    carries = bool(getattr(sampler, "carries", False))
    if isinstance(denoiser, BridgeField) and not carries:
        raise ValueError(
            f"this model is the field of a bridge, which {type(sampler).__name__} cannot follow: {USE}"
        )
    if carries and not isinstance(denoiser, BridgeField):
        raise ValueError(
            f"{type(sampler).__name__} follows the field of a bridge (method=stochastic_interpolant), unguided "
            "(guidance=none) and without modifiers; this is a denoiser"
        )


def _times(field: BridgeField, grid: Tensor) -> Tensor:
    levels = check_grid(grid)
    if float(levels[0]) != -math.inf:
        raise ValueError(
            f"a bridge starts at its source, logsnr = -inf, and this grid at {float(levels[0]):g}: grid=uniform_time"
        )
    return time_of(field.bridge.path, levels)


def _start(x: Tensor, cond: Cond | None) -> Tensor:
    if cond is None or SOURCE not in cond:
        return x
    source = cond[SOURCE].to(x)
    if source.shape != x.shape:
        raise ValueError(
            f"source {tuple(source.shape)} and samples {tuple(x.shape)} must have the same shape"
        )
    return source


def _told(grid: Tensor, on_step: OnStep | None) -> OnTime | None:
    """Tell of steps as other samplers do; a bridge has no prediction of x0, its samples become one by themselves."""
    if on_step is None:
        return None
    return lambda index, tau, x: on_step(index, grid[index + 1], x, x)


@dataclass(frozen=True, kw_only=True)
class TransportODE:
    """Heun's method on dX = v dtau; see `transport_ode`. Two calls of the field a step."""

    carries = True

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
        """Carry the sources `cond["image"]` `(B, *D)`, or the noise `x` where there are none, to the data.

        Args:
            denoiser: The field of a bridge.
            x: Standard normal noise, `(B, *D)`.
            grid: Increasing log-SNRs from -inf to +inf.
            cond: Conditions, handed to every call of the field.
            rng: Not used.
            on_step: See `Stepper.__call__`; for x0 it gets x.

        Raises:
            ValueError: If the model is a denoiser, the grid is malformed, or a source has another shape than a sample.
        """
        field = _field(denoiser, self)
        times = _times(field, grid)
        return transport_ode(field, _start(x, cond), times, cond=cond, on_step=_told(grid, on_step))


@dataclass(frozen=True, kw_only=True)
class TransportSDE:
    """Euler-Maruyama on dX = (v - (epsilon / g) xi) dtau + sqrt(2 epsilon) dW; see `transport_sde`. One call a step.

    Args:
        epsilon: Half the diffusion coefficient as a function of tau, chosen after training; must vanish where g does.
    """

    carries = True
    stochastic = True

    epsilon: Callable[[Tensor], Tensor]

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
        """See `TransportODE`.

        Raises:
            ValueError: Also if there is no `rng`, or no score because the bridge has no noise.
        """
        field = _field(denoiser, self)
        check_rng(self, rng)
        assert rng is not None
        if field.bridge.noise == 0.0:
            raise ValueError("a bridge without noise has no score, and so no SDE: sampler=transport_ode")
        return transport_sde(
            field,
            field.bridge,
            _start(x, cond),
            _times(field, grid),
            epsilon=self.epsilon,
            rng=rng,
            cond=cond,
            on_step=_told(grid, on_step),
        )


def _field(denoiser: object, sampler: object) -> BridgeField:
    check_kinds(denoiser, sampler)
    assert isinstance(denoiser, BridgeField)
    return denoiser
