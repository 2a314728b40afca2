r"""The orthonormal discrete cosine transform (DCT-II), whole or in blocks, as products with a matrix.

    y_k = s_k sum_i cos(pi (2 i + 1) k / (2 n)) x_i,      s_0 = sqrt(1 / n), s_k = sqrt(2 / n)

is y = C x with C orthogonal, so the inverse is C^T y; an image is transformed along both axes, C_H x C_W^T. C
diagonalises symmetric convolutions with reflected borders, hence nearly the covariance of a stationary image.

For sides up to a few hundred a product with C is as fast as a fast transform, and it works in every precision and on
every device.

References:
    Martucci, "Symmetric Convolution and the Discrete Sine and Cosine Transforms", 1994 (reflected borders).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def dct_matrix(n: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """Return C `(n, n)`, row k the cosine of frequency k; kept, so do not write to it."""
    # made once and used everywhere: a tensor made in inference mode could not enter a gradient later
    with torch.inference_mode(False):
        i, k = torch.arange(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64)[:, None]
        C = math.sqrt(2.0 / n) * torch.cos(math.pi / (2 * n) * (2 * i + 1) * k)
        C[0] = math.sqrt(1.0 / n)
        return C.to(device=device, dtype=dtype)


def dct(x: Tensor, axes: int) -> Tensor:
    """Transform the last `axes` (1 or 2) axes of `x` `(..., n)` or `(..., H, W)`; same shape, float32 or float64."""
    y = x @ dct_matrix(x.shape[-1], x.dtype, x.device).T
    return y if axes == 1 else dct_matrix(x.shape[-2], x.dtype, x.device) @ y


def idct(y: Tensor, axes: int) -> Tensor:
    """Undo `dct`."""
    x = y @ dct_matrix(y.shape[-1], y.dtype, y.device)
    return x if axes == 1 else dct_matrix(y.shape[-2], y.dtype, y.device).T @ x


def block_dct(x: Tensor, size: int) -> Tensor:
    """Cut images into square blocks and transform each of them.

    Args:
        x: Images `(..., H, W)`.
        size: Side p of a block.

    Returns:
        `(..., H / p, W / p, p, p)`: block rows, block columns, frequencies.

    Raises:
        ValueError: If `size` does not divide both sides.
    """
    H, W = x.shape[-2:]
    if size < 1 or H % size or W % size:
        raise ValueError(f"blocks of side {size} do not fit images of {H} x {W}: it must divide both sides")
    blocks = x.reshape(*x.shape[:-2], H // size, size, W // size, size).transpose(-3, -2)
    return dct(blocks, axes=2)


def block_idct(y: Tensor) -> Tensor:
    """Undo `block_dct`: `(..., H / p, W / p, p, p)` to `(..., H, W)`."""
    rows, columns, size = y.shape[-4], y.shape[-3], y.shape[-1]
    return idct(y, axes=2).transpose(-3, -2).reshape(*y.shape[:-4], rows * size, columns * size)
