"""The one place where noise levels meet the shape of the data.

A level has the leading axes of the data: `values.shape == x.shape[:k]`. To multiply, it needs ones on the right:

    (B,) * (B, C, H, W)   ->   (B, 1, 1, 1) * (B, C, H, W).

A 0-d level stands for the whole batch. It is left alone: PyTorch lets a 0-d CPU tensor multiply a tensor of any device
without a copy, a synchronisation or a change of dtype, so a sampler can keep its coefficients in float64 for nothing.
"""

from __future__ import annotations

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
