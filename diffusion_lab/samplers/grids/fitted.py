"""What a fitted grid is, and what the fits share.

A fitted grid is an object with the settings; its `fit` looks at a denoiser and at data, and returns a grid like every
other. A fit draws its noise from fresh streams of the seeds of `rng`, one a row of `x0`, so it gives the same grid
every time, and the size of the batches that the denoiser sees changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffusion_lab.rng import SampleRNG
from diffusion_lab.typing import Cond, DenoiserFn

Progress = Callable[[int, int], None]
"""`progress(done, total)`: called after each call of the denoiser."""


@runtime_checkable
class FittedGrid(Protocol):
    """A grid fitted to a denoiser and data."""

    def fit(
        self,
        denoiser: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: SampleRNG,
        progress: Progress | None = None,
    ) -> Tensor:
        """Return increasing log-SNRs `(steps + 1,)`, float64 on the CPU, that end at +inf.

        Args:
            denoiser: E[x0 | x], guidance included if the grid is to suit it.
            x0: Examples of the data, `(B, *D)`, on the denoiser's device.
            cond: Conditions of the examples, or None.
            rng: One seed an example; what was drawn from it before does not matter.
            progress: Called as `progress(done, total)`, in calls of the denoiser.

        Raises:
            ValueError: If the number of seeds is not the number of examples.
        """
        ...


def check_range(name: str, steps: int, fine: int, logsnr_min: float, logsnr_max: float) -> None:
    """Raise ValueError unless 2 <= steps <= fine and the range is finite and not empty."""
    if not 2 <= steps <= fine:
        raise ValueError(f"{name} needs 2 <= steps <= {fine}, its number of fine levels, got steps={steps}")
    if not (math.isfinite(logsnr_min) and math.isfinite(logsnr_max) and logsnr_min < logsnr_max):
        raise ValueError(f"{name} needs finite logsnr_min < logsnr_max, got {logsnr_min} and {logsnr_max}")


def batches(
    x0: Tensor, cond: Cond | None, rng: SampleRNG, size: int
) -> Iterator[tuple[Tensor, Cond | None, SampleRNG]]:
    """Yield rows of `x0` with their conditions and fresh streams of their seeds, `size` at a time.

    Raises:
        ValueError: If there are no examples, the number of seeds is not theirs, or `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"a fitted grid needs batch_size >= 1, got {size}")
    if x0.shape[0] == 0 or len(rng) != x0.shape[0]:
        raise ValueError(f"a fit needs one seed an example, got {len(rng)} for {x0.shape[0]}")
    for start in range(0, x0.shape[0], size):
        rows = slice(start, start + size)
        part = None if cond is None else {name: value[rows] for name, value in cond.items()}
        yield x0[rows], part, SampleRNG(rng.seeds[rows])


def cheapest_path(cost: NDArray[np.float64], edges: int, growth: float = 1.0) -> list[int]:
    r"""Return the nodes 0 = i_0 < i_1 < ... < i_edges = n - 1 that minimise sum_k growth^k cost[i_k, i_(k+1)].

    Dynamic programming from the end: V_e(i) = min_(j > i) cost[i, j] + growth V_(e-1)(j). Exact; O(edges n^2).

    Args:
        cost: `(n, n)`; what is on or below the diagonal is not read.
        edges: Number of edges, 1 .. n - 1.
        growth: Factor by which each further edge weighs more.
    """
    n = cost.shape[0]
    if not 1 <= edges <= n - 1:
        raise ValueError(f"a path through {n} nodes has 1 to {n - 1} edges, got {edges}")
    forward = np.where(np.triu(np.ones((n, n), dtype=bool), k=1), cost, np.inf)
    value = np.full(n, np.inf)
    value[-1] = 0.0
    choices = []
    for _ in range(edges):
        totals = forward + growth * value[None, :]
        choices.append(totals.argmin(axis=1))
        value = totals.min(axis=1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return path
