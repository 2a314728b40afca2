r"""DDIM that tells the model how many steps it takes: the sampler of shortcut models.

    cond["steps"] = N,  the length of the grid

The grid is the one that the model was trained on, grid=uniform_u with its schedule: 1, 2, 4 .. steps, up to the largest
number that it knows. A model in closed form is told too, and need not listen.

References:
    Frans, Hafner, Levine & Abbeel, "One Step Diffusion via Shortcut Models", 2024, algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.denoisers.network import NetworkDenoiser
from diffusion_lab.denoisers.shortcut import ShortcutDenoiser
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import check_grid
from diffusion_lab.samplers.ddim import DDIM
from diffusion_lab.typing import STEPS, Cond, DenoiserFn, OnStep, conditional_of


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """One call of the denoiser a step. It is no `Stepper`: a step depends on how many there are."""

    stochastic = False

    def __call__(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        grid: Tensor,
        *,
        cond: Cond | None = None,
        rng: SampleRNG | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Follow the grid from noise to samples `(B, *D)`. See `Stepper.__call__`.

        Raises:
            ValueError: If the grid is malformed, the model is told no number of steps, or does not know this one.
        """
        steps, model = check_grid(grid).shape[0] - 1, conditional_of(denoiser)
        if isinstance(model, ShortcutDenoiser):
            if steps not in model.steps:
                raise ValueError(
                    f"grid.steps={steps}: this shortcut model knows {', '.join(str(n) for n in model.steps)} steps"
                )
        elif isinstance(model, NetworkDenoiser):
            raise ValueError(
                "this model is told no number of steps: sampler=ddim, or distil it by method=shortcut"
            )
        told = {**(cond or {}), STEPS: torch.full((len(x),), float(steps), device=x.device)}
        return DDIM()(denoiser, x, grid, cond=told, rng=rng, on_step=on_step)
