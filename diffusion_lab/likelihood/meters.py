"""Meters: what a likelihood is measured with, for one model and one kind of data.

A meter turns images into rows of numbers, `columns` of float64, a row an image; every row is a function of the image,
the model and the image's own seed, so rows may be made in any order, apart, and be kept. What a data set comes to is
made of rows alone:

    total(rows)     bits per dimension of each image, or nats where the data have a density
    terms(rows)     what the total is the sum of, an interval each
    report(rows)    what else the rows tell

Settings make them: `settings.py` for the bound, `settings_ode.py` for the ODE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from diffusion_lab.likelihood.bits import Interval
from diffusion_lab.losses.vlb_terms import Levels
from diffusion_lab.typing import Cond, DenoiserFn


class Meter(Protocol):
    """One way of measuring, for one model and one kind of data; see the module."""

    @property
    def name(self) -> str:
        """What the figure is called after `bits/dim`."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """What the numbers of a row are."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """How it measures, for the protocol."""
        ...

    def __call__(self, denoiser: DenoiserFn, x0: Tensor, cond: Cond | None, seeds: Sequence[int]) -> Tensor:
        """Return the rows of images `(B, *D)`, `(B, len(columns))` float64."""
        ...

    def total(self, rows: Tensor) -> Tensor:
        """Return bits (or nats) per dimension of each image, `(n,)`."""
        ...

    def terms(self, rows: Tensor) -> dict[str, Interval]:
        """Return what the total is made of, in its unit."""
        ...

    def report(self, rows: Tensor) -> dict[str, Any]:
        """Return what else the rows tell, in plain containers."""
        ...


def unit_of(levels: Levels | None) -> float:
    """Return what nats are divided by: bits for data on levels, nats for densities."""
    return math.log(2.0) if levels is not None else 1.0
