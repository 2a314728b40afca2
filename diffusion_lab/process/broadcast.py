"""The one place where noise levels meet the shape of the data.

A level has the leading axes of the data: `values.shape == x.shape[:k]`. To multiply, it needs ones on the right:

    (B,) * (B, C, H, W)   ->   (B, 1, 1, 1) * (B, C, H, W).

A 0-d level stands for the whole batch. It is left alone: PyTorch lets a 0-d CPU tensor multiply a tensor of any device
without a copy, a synchronisation or a change of dtype, so a sampler can keep its coefficients in float64 for nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def broadcast_right(values: Tensor, x: Tensor) -> Tensor:
    """Give `values` (shape `x.shape[:k]`, k >= 0) trailing axes of size one so that it multiplies `x`.

    The result has the dtype and device of `x`, except that a 0-d tensor is returned unchanged. Axes of size one in
    `values` are allowed, so `(B, 1, H, W)` works for noise per pixel.

    Raises:
        ValueError: If the axes of `values` do not match the leading axes of `x`.
    """
    if values.ndim == 0:
        return values
    lead = x.shape[: values.ndim]
    if values.ndim > x.ndim or any(v not in (1, n) for v, n in zip(values.shape, lead, strict=True)):
        raise ValueError(
            f"a noise level of shape {tuple(values.shape)} does not match data of shape {tuple(x.shape)}: "
            "it must have the data's leading axes, normally (B,)"
        )
    return values.to(device=x.device, dtype=x.dtype).reshape(values.shape + (1,) * (x.ndim - values.ndim))


def expand_logsnr(logsnr: Tensor, x: Tensor) -> Tensor:
    """Return `logsnr` with at least a batch axis, on the device of `x`, as float32 (float64 where `x` is float64).

    Samplers step through 0-d levels; denoisers are promised `(B,)` or more.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if logsnr.ndim == 0:
        return torch.full((x.shape[0],), float(logsnr), dtype=dtype, device=x.device)
    return logsnr.to(device=x.device, dtype=dtype)


def combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Return `a x + b y` for levels' coefficients `a`, `b` of the same number of axes; one pass less over 0-d ones."""
    if a.ndim == 0 and b.ndim == 0:
        return torch.add(x * a, y, alpha=float(b))
    return broadcast_right(a, x) * x + broadcast_right(b, y) * y


def scaled_add(y: Tensor, a: Tensor, x: Tensor) -> Tensor:
    """Return `y + a x` for a level's coefficient `a`, in one pass where it is 0-d."""
    if a.ndim == 0:
        return torch.add(y, x, alpha=float(a))
    return y + broadcast_right(a, x) * x


def is_infinite(logsnr: Tensor, sign: int) -> bool:
    """Whether all levels are +inf (`sign` 1) or -inf (`sign` -1)."""
    if logsnr.ndim == 0:
        return float(logsnr) == sign * math.inf
    return bool((logsnr == sign * math.inf).all())
