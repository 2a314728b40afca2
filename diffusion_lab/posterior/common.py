r"""What posterior samplers share: y from the conditions, derivatives at x, and a linear solver for each sample.

Every method here turns x0 = E[x0 | x] into an estimate of E[x0 | x, y]. By Tweedie's formula

    E[x0 | x, y] = x0 + (sigma^2 / alpha) grad_x log p(y | x),        Cov[x0 | x] = (sigma^2 / alpha) dx0 / dx,

and p(y | x) taken as N(A x0, V) makes that, for linear A,

    x0 + (sigma^2 / alpha) J^T V^-1 (y - A x0),        J = d(A x0) / dx.

The methods differ in V. At pure noise alpha is 0 and J with it: the quotient is left out there (`tweedie_scale` is 0),
so that evaluation is not guided.

A denoiser whose answer does not depend on x at all has derivative zero. Derivatives are those of what is wrapped: an
`inner` guidance is part of the prior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.measurements import Masking, Operator
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import MEASUREMENT, Cond, DenoiserFn


def measurement(cond: Cond | None, like: Tensor, operator: Operator) -> Tensor:
    """Return y from `cond`, in the precision of `like`; what a mask blanks is 0 there.

    Args:
        cond: The conditions.
        like: A(x0), whose shape `(B, *M)` y must have.
        operator: A.

    Raises:
        ValueError: If there is no measurement, or one of another shape.
    """
    name = type(operator).__name__
    if cond is None or MEASUREMENT not in cond:
        raise ValueError(
            f"posterior sampling needs cond['{MEASUREMENT}'], the measurement by {name}: a tensor {tuple(like.shape)}"
        )
    y = cond[MEASUREMENT]
    if y.shape != like.shape:
        raise ValueError(
            f"cond['{MEASUREMENT}'] has shape {tuple(y.shape)}, but {name} makes {tuple(like.shape)} of these samples"
        )
    y = y.to(like)
    # whatever stands for a missing pixel, nan too
    return torch.where(operator.known(y) > 0, y, 0.0) if isinstance(operator, Masking) else y


def require_linear(operator: Operator, method: str) -> None:
    """Raise a ValueError if `operator` is not linear."""
    if not operator.linear:
        raise ValueError(f"{method} needs a linear operator, which {type(operator).__name__} is not")


def require_mask(operator: Operator, method: str) -> Masking:
    """Return `operator`, which must be a mask; raise a ValueError otherwise."""
    if not isinstance(operator, Masking):
        raise ValueError(f"{method} needs a mask such as Inpaint, not {type(operator).__name__}")
    return operator


def tweedie_scale(interpolant: Interpolant, logsnr: Tensor, x: Tensor) -> Tensor:
    """Return sigma^2 / alpha, shaped to multiply `x`; 0 at pure noise, where it is infinite."""
    alpha, sigma = interpolant(logsnr)
    return broadcast_right(torch.where(alpha == 0, 0.0, sigma**2 / alpha), x)


@dataclass(frozen=True)
class Answer:
    """A denoiser's answer, what A makes of it, and the derivative of that.

    Attributes:
        x0: E[x0 | x], `(B, *D)`.
        predicted: A(x0), `(B, *M)`.
        pull: `pull(v) = J^T v`, J = d predicted / dx: from `(B, *M)` to `(B, *D)`; as often as wanted.
    """

    x0: Tensor
    predicted: Tensor
    pull: Callable[[Tensor], Tensor]


def answer(denoiser: DenoiserFn, operator: Operator, x: Tensor, logsnr: Tensor, cond: Cond | None) -> Answer:
    """Call the denoiser once, and keep what its derivative needs.

    Nothing returned has a gradient, unless gradients are switched on and `x` wants one: then a wrapper around this one
    may differentiate it, at second order.
    """
    outer = differentiated(x)
    with torch.inference_mode(False), torch.enable_grad():
        at = x if outer else _ordinary(x).detach().requires_grad_()
        x0 = denoiser(at, _ordinary(logsnr), cond and {name: _ordinary(v) for name, v in cond.items()})
        predicted = operator(x0)

    def pull(v: Tensor) -> Tensor:
        if not predicted.requires_grad:
            return torch.zeros_like(at)
        with torch.inference_mode(False):
            (g,) = torch.autograd.grad(
                predicted, at, _ordinary(v), retain_graph=True, create_graph=outer, allow_unused=True
            )
        return torch.zeros_like(at) if g is None else g

    return Answer(x0, predicted, pull) if outer else Answer(x0.detach(), predicted.detach(), pull)


def differentiated(x: Tensor) -> bool:
    """Whether somebody outside wants the derivative of what is made of `x`."""
    return torch.is_grad_enabled() and x.requires_grad


def _ordinary(x: Tensor) -> Tensor:
    """`x`, or a copy where it was made in inference mode and so cannot enter a gradient."""
    return x.clone() if x.is_inference() else x


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each sample, `(B, 1, ...)`, to multiply tensors like `a`."""
    return broadcast_right((a * b).flatten(1).sum(1), a)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, *, iterations: int, tolerance: float, least: float = 0.0
) -> Tensor:
    """Solve V u = b for each sample, V symmetric and positive semi-definite; return u, of the shape of `b`.

    A sample is done when its residual is below `tolerance |b|`, or when it meets a direction p with p V p no larger
    than `least |p|^2`, where it keeps what it has; it is not touched again, so that it does not depend on its
    neighbours.

    Args:
        product: V u from u `(B, *M)`, each sample for itself.
        b: Right side `(B, *M)`.
        iterations: Most products.
        tolerance: Of the residual's norm, relative.
        least: A bound below the eigenvalues of V, at least 0; it matters where the products are not exact.

    References:
        Hestenes & Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952.
    """
    u, r, p = torch.zeros_like(b), b, b
    rr = dot(r, r)
    goal = tolerance**2 * rr
    active = rr > goal
    for _ in range(iterations):
        if not bool(active.any()):
            break
        Vp = product(p)
        curvature = dot(p, Vp)
        active = active & (curvature > least * dot(p, p))
        step = torch.where(active, rr / torch.where(active, curvature, torch.ones_like(rr)), 0.0)
        u, r = u + step * p, r - step * Vp
        rr_next = dot(r, r)
        p = torch.where(active, r + rr_next / torch.where(active, rr, torch.ones_like(rr)) * p, p)
        rr = rr_next
        active = active & (rr > goal)
    return u


def check_solver(method: str, noise: float, iterations: int, tolerance: float) -> None:
    """Raise a ValueError unless `noise >= 0`, `iterations >= 1` and `tolerance >= 0`."""
    if not (noise >= 0.0 and iterations >= 1 and tolerance >= 0.0):
        raise ValueError(
            f"{method} needs noise >= 0, iterations >= 1 and tolerance >= 0, got {noise}, {iterations}, {tolerance}"
        )
