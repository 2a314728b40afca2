r"""What a measurement is: y = A(x0) + noise n, and the two things that posterior samplers ask of A.

    forward   A(x0)                       every operator
    adjoint   A^T y,  <A x, y> = <x, A^T y>     linear operators, by differentiating A

An operator is a small frozen object; it holds no tensor that belongs to a device or a precision, and treats each image
of a batch alone. `Masking` operators keep some entries of x0 and blank the others, which some methods need to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion_lab.rng import SampleRNG


@runtime_checkable
class Operator(Protocol):
    """A measurement without its noise."""

    @property
    def linear(self) -> bool:
        """Whether A(a x + b x') = a A(x) + b A(x')."""
        ...

    def __call__(self, x0: Tensor) -> Tensor:
        """Return A(x0) `(B, *M)` of clean samples `(B, *D)`, differentiable.

        Raises:
            ValueError: If it does not fit samples of this shape.
        """
        ...


@runtime_checkable
class Masking(Operator, Protocol):
    """A measurement that keeps some entries of x0 and puts 0 for the others."""

    def known(self, x0: Tensor) -> Tensor:
        """Return the mask, 1 where an entry is kept and 0 elsewhere, which multiplies `x0` `(B, *D)`."""
        ...


def adjoint(operator: Operator, y: Tensor, shape: Sequence[int]) -> Tensor:
    """Return A^T y, of shape `shape`.

    Args:
        operator: A linear operator.
        y: `(B, *M)`.
        shape: Of the samples that it measures, `(B, *D)`.

    Raises:
        ValueError: If the operator is not linear, or `y` is not what it makes of samples of that shape.
    """
    if not operator.linear:
        raise ValueError(f"{type(operator).__name__} is not linear, so it has no adjoint")
    outer = torch.is_grad_enabled() and y.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        # the derivative of a linear map is the same everywhere
        x0 = torch.zeros(tuple(shape), dtype=y.dtype, device=y.device, requires_grad=True)
        Ax = operator(x0)
        if Ax.shape != y.shape:
            raise ValueError(
                f"{type(operator).__name__} makes {tuple(Ax.shape)} of samples {tuple(shape)}, not {tuple(y.shape)}"
            )
        (out,) = torch.autograd.grad(Ax, x0, y.clone() if y.is_inference() else y, create_graph=outer)
    return out


def measure(operator: Operator, x0: Tensor, noise: float, rng: SampleRNG | None) -> Tensor:
    """Draw y = A(x0) + noise n, n standard normal; what a mask blanks stays 0.

    Args:
        operator: A.
        x0: Clean samples `(B, *D)`.
        noise: Standard deviation of the noise, at least 0.
        rng: One stream of noise a sample; may be None without noise.

    Raises:
        ValueError: If `noise` is negative, or is not 0 and there is no `rng`.
    """
    if not noise >= 0.0:
        raise ValueError(f"a measurement needs noise >= 0, got {noise}")
    y = operator(x0)
    if noise == 0.0:
        return y
    if rng is None:
        raise ValueError("a measurement with noise needs rng=SampleRNG(seeds)")
    n = rng.randn_like(y)
    return y + noise * (operator.known(x0) * n if isinstance(operator, Masking) else n)


def image_sides(operator: object, x0: Tensor) -> tuple[int, int]:
    """Return height and width of images `(B, C, H, W)`.

    Raises:
        ValueError: If `x0` is no batch of images.
    """
    if x0.ndim != 4:
        raise ValueError(
            f"{type(operator).__name__} measures images (B, C, H, W), got samples of shape {tuple(x0.shape)}"
        )
    return x0.shape[2], x0.shape[3]
