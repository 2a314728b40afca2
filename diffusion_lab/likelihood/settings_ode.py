"""The likelihood of the probability-flow ODE as a measure of a data set: its settings, and its meter (`meters.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_lab.likelihood.bits import Interval, interval
from diffusion_lab.likelihood.bound import BoundEvaluation, Cut
from diffusion_lab.likelihood.dequantisation import Dequantisation, TruncatedNormal, Uniform
from diffusion_lab.likelihood.meters import unit_of
from diffusion_lab.likelihood.ode import ODELikelihood
from diffusion_lab.likelihood.variational import VariationalDequantisation, fit_dequantisation
from diffusion_lab.losses.vlb_terms import Levels
from diffusion_lab.process.schedules import LinearLogSNR, Schedule
from diffusion_lab.rng import SampleRNG, StepRNG, derive_seed
from diffusion_lab.typing import Cond, DenoiserFn


@dataclass(frozen=True, kw_only=True)
class BitsPerDimODE:
    """The likelihood of the probability-flow ODE.

    Attributes:
        dequantisation: Of data on levels: "uniform", "truncated_normal" or "variational".
        dequantisation_images: Training images that a variational one sees.
        draws: Dequantised copies of an image, over which its bound is averaged.
        divergence: "hutchinson" or "exact".
        probes: Hutchinson's probes a solve.
        noise: Their law, "rademacher" or "gaussian".
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        method: See `ODELikelihood`.
        steps: Fixed steps instead of the tolerances; None: adaptive.
        logsnr_min: The schedule's lower end is cut to this.
        logsnr_max: Its upper end likewise.
        labels: Whether the model is told the class of an image, where it has classes.

    Raises:
        ValueError: If a number is out of range or a word unknown.
    """

    dequantisation: Literal["uniform", "truncated_normal", "variational"] = "truncated_normal"
    dequantisation_images: int = 50_000
    draws: int = 1
    divergence: Literal["exact", "hutchinson"] = "hutchinson"
    probes: int = 1
    noise: Literal["rademacher", "gaussian"] = "rademacher"
    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"
    steps: int | None = None
    logsnr_min: float = -13.3
    logsnr_max: float = 13.3
    labels: bool = True

    def __post_init__(self) -> None:
        if self.dequantisation not in ("uniform", "truncated_normal", "variational"):
            raise ValueError(
                f"dequantisation is uniform, truncated_normal or variational, not {self.dequantisation!r}"
            )
        if self.draws < 1 or self.dequantisation_images < 1:
            raise ValueError("draws and dequantisation_images must be at least 1")
        self.solver(self.logsnr_min, self.logsnr_max)

    def solver(self, logsnr_min: float, logsnr_max: float) -> ODELikelihood:
        """Return the solver between two levels."""
        return ODELikelihood(
            logsnr_min=logsnr_min, logsnr_max=logsnr_max, rtol=self.rtol, atol=self.atol, method=self.method,
            steps=self.steps, divergence=self.divergence, probes=self.probes, noise=self.noise,
        )  # fmt: skip

    def meter(
        self, schedule: Schedule, levels: Levels | None, learned: Dequantisation | None = None
    ) -> ODEMeter:
        """Return the meter of a model with this schedule and of data on these levels (None: of a density).

        Args:
            schedule: Whose ends are taken, cut.
            levels: The values of the data, or None.
            learned: What `learn` returned, where dequantisation is variational and there are levels.

        Raises:
            ValueError: If nothing is left of the schedule, or `learned` is missing.
        """
        cut = Cut(schedule, logsnr_min=self.logsnr_min, logsnr_max=self.logsnr_max)
        noise: Dequantisation | None = None
        if levels is not None:
            if self.dequantisation == "uniform":
                noise = Uniform(gap=levels.gap)
            elif self.dequantisation == "truncated_normal":
                noise = TruncatedNormal(gap=levels.gap, logsnr=cut.logsnr_max)
            elif learned is None:
                raise ValueError("variational dequantisation is learned first")
            else:
                noise = learned
        return ODEMeter(self, cut, levels, noise)

    def needs_learning(self, levels: Levels | None) -> bool:
        """Whether `learn` must be called first."""
        return levels is not None and self.dequantisation == "variational"

    def unlearned(self, levels: Levels, channels: int, seed: int) -> VariationalDequantisation:
        """Return the variational law before training, for images of `channels` channels."""
        return VariationalDequantisation(gap=levels.gap, channels=channels, seed=seed)

    def learn(
        self,
        denoiser: DenoiserFn,
        schedule: Schedule,
        levels: Levels,
        x0: Tensor,
        cond: Cond | None,
        *,
        seed: int = 0,
        on_step: Callable[[int, float], None] | None = None,
    ) -> VariationalDequantisation:
        """Return a variational dequantisation, trained on images by the bound of the frozen denoiser.

        Args:
            denoiser: The frozen model.
            schedule: Its schedule.
            levels: The values of the images.
            x0: Training images, `(N, C, H, W)`.
            cond: Their conditions, or None.
            seed: Of everything random.
            on_step: See `fit_dequantisation`.
        """
        cut = Cut(schedule, logsnr_min=self.logsnr_min, logsnr_max=self.logsnr_max)
        line = LinearLogSNR(logsnr_min=cut.logsnr_min, logsnr_max=cut.logsnr_max)
        bound = BoundEvaluation(schedule=line, levels=None, draws=1)
        dims = x0[0].numel()

        def nll(y: Tensor, given: Cond | None, rng: StepRNG) -> Tensor:
            first = derive_seed("dequantisation.bound", rng.seed, rng.step)
            seeds = SampleRNG([(first + row) % 2**32 for row in range(len(y))])
            return dims * bound(denoiser, y, cond=given, rng=seeds).total

        q = self.unlearned(levels, x0.shape[1], seed).to(x0.device)
        return fit_dequantisation(
            q, x0, cond, nll, images=self.dequantisation_images, seed=seed, on_step=on_step
        )


class ODEMeter:
    """See `Meter`; rows: -log p(x + u) and log q(u | x) in nats per dimension, calls, mean square of the latent.

    Args:
        settings: The settings.
        schedule: Whose ends are taken.
        levels: The values of the data, or None.
        dequantisation: Its law; None for densities.
    """

    columns = ("density", "dequantisation", "calls", "latent")

    def __init__(
        self,
        settings: BitsPerDimODE,
        schedule: Cut,
        levels: Levels | None,
        dequantisation: Dequantisation | None,
    ) -> None:
        self.settings, self.levels, self.dequantisation = settings, levels, dequantisation
        self.solver = settings.solver(schedule.logsnr_min, schedule.logsnr_max)
        exact = settings.divergence == "exact"
        self.name = "ODE" if levels is None else f"ODE, {settings.dequantisation.replace('_', ' ')}"
        probes = f"{settings.probes} {settings.noise} probe{'s' if settings.probes > 1 else ''} a solve"
        self.facts: dict[str, Any] = {
            "measure": "probability-flow ODE, prior N(0, I)",
            "ends": f"log-SNR {schedule.logsnr_min:.4g} to {schedule.logsnr_max:.4g}",
            "estimate": f"{'exact divergence' if exact else probes}, "
            + (
                f"{settings.method}, rtol {settings.rtol:g}, atol {settings.atol:g}"
                if settings.steps is None
                else f"{settings.steps} steps of order 4"
            ),
        }
        if levels is not None:
            seen = (
                f" (learned from {settings.dequantisation_images:,} images)"
                if settings.needs_learning(levels)
                else ""
            )
            self.facts["dequantisation"] = (
                f"{settings.dequantisation.replace('_', ' ')}{seen}, {settings.draws} an image"
            )

    def __call__(self, denoiser: DenoiserFn, x0: Tensor, cond: Cond | None, seeds: Sequence[int]) -> Tensor:
        """See `Meter`."""
        dims, rng, rows = x0[0].numel(), SampleRNG(seeds), []
        for _ in range(self.settings.draws if self.dequantisation is not None else 1):
            if self.dequantisation is None:
                y, log_q = x0, torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
            else:
                u, log_q = self.dequantisation(x0, rng)
                y = x0 + u
            found = self.solver(denoiser, y, cond=cond, rng=rng)
            square = found.latent.square().flatten(1).mean(1)
            rows.append(
                torch.stack([-found.log_density / dims, log_q / dims, found.calls.double(), square], 1)
            )
        return torch.stack(rows).mean(0)

    def total(self, rows: Tensor) -> Tensor:
        """See `Meter`."""
        return (rows[:, 0] + rows[:, 1]) / unit_of(self.levels)

    def terms(self, rows: Tensor) -> dict[str, Interval]:
        """See `Meter`: one term for a density."""
        if self.levels is None:
            return {}
        return {name: interval(rows[:, k] / unit_of(self.levels)) for k, name in enumerate(self.columns[:2])}

    def report(self, rows: Tensor) -> dict[str, Any]:
        """See `Meter`: calls an image, and the latent's mean square, near 1 for data like the model's."""
        return {"calls": float(rows[:, 2].mean()), "latent_mean_square": float(rows[:, 3].mean())}
