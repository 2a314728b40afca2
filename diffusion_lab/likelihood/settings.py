"""The variational bound as a measure of a data set: its settings, and its meter (`meters.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion_lab.likelihood.bits import Interval, interval
from diffusion_lab.likelihood.bound import BoundEvaluation, Cut, by_level, deviations
from diffusion_lab.likelihood.meters import unit_of
from diffusion_lab.losses.vlb_terms import Levels
from diffusion_lab.process.schedules import LinearLogSNR, Schedule
from diffusion_lab.rng import SampleRNG
from diffusion_lab.typing import Cond, DenoiserFn


@dataclass(frozen=True, kw_only=True)
class BitsPerDim:
    """The variational bound.

    Attributes:
        steps: T; None: continuous time.
        draws: Noise levels an image.
        proposal: What levels are drawn from in continuous time, "run" (the schedule's density) or "uniform" in log-SNR;
            None: the schedule's where it was learnt, else uniform.
        logsnr_min: The schedule's lower end is cut to this.
        logsnr_max: Its upper end likewise.
        labels: Whether the model is told the class of an image, where it has classes.

    Raises:
        ValueError: If a number is out of range, or `proposal` is unknown or given with `steps`.
    """

    steps: int | None = None
    draws: int = 16
    proposal: Literal["run", "uniform"] | None = None
    logsnr_min: float = -13.3
    logsnr_max: float = 13.3
    labels: bool = True

    def __post_init__(self) -> None:
        if self.draws < 1 or (self.steps is not None and self.steps < 1):
            raise ValueError(f"draws and steps must be at least 1, got {self.draws} and {self.steps}")
        if self.proposal not in ("run", "uniform", None) or (self.proposal and self.steps):
            raise ValueError(
                "proposal is run, uniform or null, and null with steps, which are the schedule's"
            )

    def meter(self, schedule: Schedule, levels: Levels | None) -> BoundMeter:
        """Return the meter of a model with this schedule and of data on these levels (None: of a density).

        Raises:
            ValueError: If nothing is left of the schedule.
        """
        cut = Cut(schedule, logsnr_min=self.logsnr_min, logsnr_max=self.logsnr_max)
        own = self.proposal == "run" or (self.proposal is None and isinstance(schedule, nn.Module))
        line = LinearLogSNR(logsnr_min=cut.logsnr_min, logsnr_max=cut.logsnr_max)
        return BoundMeter(self, cut, levels, None if own or self.steps is not None else line)


class BoundMeter:
    """See `Meter`; rows are the terms in nats per dimension, then levels and draws of the diffusion term.

    Args:
        settings: The settings.
        schedule: With finite ends.
        levels: The values of the data, or None.
        proposal: See `BoundEvaluation`.
    """

    def __init__(
        self, settings: BitsPerDim, schedule: Cut, levels: Levels | None, proposal: Schedule | None
    ) -> None:
        self.settings, self.levels, self.schedule = settings, levels, schedule
        self.drawn_from: Schedule = proposal or schedule
        self.evaluation = BoundEvaluation(
            schedule=schedule, levels=levels, steps=settings.steps, draws=settings.draws, proposal=proposal
        )
        k = range(settings.draws)
        self.columns = (
            "prior", "reconstruction", "diffusion", *(f"logsnr_{i}" for i in k), *(f"draw_{i}" for i in k)
        )  # fmt: skip
        self.name = "VLB" if settings.steps is None else f"VLB, {settings.steps} steps"
        drawn = "uniform in log-SNR" if proposal is not None else "as the schedule has them"
        self.facts: dict[str, Any] = {
            "measure": "variational bound, "
            + ("continuous time" if settings.steps is None else f"{settings.steps} steps of the schedule"),
            "ends": f"log-SNR {schedule.logsnr_min:.4g} to {schedule.logsnr_max:.4g}",
            "estimate": f"{settings.draws} noise levels an image"
            + (f", drawn {drawn}" if settings.steps is None else ""),
        }

    def __call__(self, denoiser: DenoiserFn, x0: Tensor, cond: Cond | None, seeds: Sequence[int]) -> Tensor:
        """See `Meter`."""
        with torch.no_grad():
            found = self.evaluation(denoiser, x0, cond=cond, rng=SampleRNG(seeds))
        parts = (found.prior, found.reconstruction, found.diffusion)
        return torch.cat([torch.stack(parts, 1).double(), found.logsnr.double(), found.draws.double()], dim=1)

    def total(self, rows: Tensor) -> Tensor:
        """See `Meter`."""
        return rows[:, :3].sum(1) / unit_of(self.levels)

    def terms(self, rows: Tensor) -> dict[str, Interval]:
        """See `Meter`."""
        return {name: interval(rows[:, k] / unit_of(self.levels)) for k, name in enumerate(self.columns[:3])}

    def report(self, rows: Tensor) -> dict[str, Any]:
        """See `Meter`: the diffusion term by level; in continuous time also deviations under other proposals."""
        unit, k = unit_of(self.levels), self.settings.draws
        logsnr, draws = rows[:, 3 : 3 + k], rows[:, 3 + k :] / unit
        ends = self.schedule.logsnr_max, self.schedule.logsnr_min
        told: dict[str, Any] = {"by_level": by_level(logsnr, draws, ends)}
        if self.settings.steps is None:
            told["deviation_of_one_draw"] = dict(deviations(logsnr, draws, self.drawn_from, self.schedule))
        return told
