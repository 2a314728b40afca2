r"""Schedules: how u in [0, 1] becomes a log-SNR. u = 0 is clean, u = 1 is noise, and logsnr falls strictly in between.

A schedule is also a density: drawing u uniformly draws logsnr with

    p(logsnr) = | du / dlogsnr |,      log p(logsnr) = -log | dlogsnr / du |.

So one object serves training (which noise levels, how often) and sampling (which grid), without naming either. To add
one, write a frozen dataclass with the three methods below in a file beside this one.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Schedule(Protocol):
    """A strictly decreasing map from u in [0, 1] to log-SNR, its inverse and its density."""

    def __call__(self, u: Tensor) -> Tensor:
        """Return logsnr, of the shape and dtype of `u`."""
        ...

    def inverse(self, logsnr: Tensor) -> Tensor:
        """Return the u that maps to `logsnr`."""
        ...

    def log_density(self, logsnr: Tensor) -> Tensor:
        """Return log p(logsnr) for u ~ U(0, 1); meant for levels in the schedule's range, continued beyond it."""
        ...


def check_range(logsnr_min: float, logsnr_max: float) -> None:
    """Raise ValueError unless `logsnr_min < logsnr_max`."""
    if not logsnr_min < logsnr_max:
        raise ValueError(f"a schedule needs logsnr_min < logsnr_max, got {logsnr_min} and {logsnr_max}")
