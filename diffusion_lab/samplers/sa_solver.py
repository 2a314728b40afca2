r"""SA-Solver: Adams predictor and corrector for the reverse SDE, with noise tau.

For every tau >= 0 the reverse SDE with noise tau shares the process's marginals; tau = 0 is the probability-flow ODE,
tau = 1 the reverse of the forward process. Its solution from lam to lam_next (half log-SNRs) is exact but for
x0(lam); `adams.py` has it, and the weights of the polynomial that stands for x0:

    predict    x_next from x_corrected, z and the last `predictor_order` outputs
    call       x0(lam_next) at the predicted x_next
    correct    x_next again, from the same x_corrected and z, with `corrector_order` outputs, x0(lam_next) among them

With tau = 0 and `corrector_order` = `predictor_order` + 1 it is UniPC. With noise, on Gaussian data, the mean still
converges at the order of the polynomials but the variance at 2 at best: an output carries the noise of its x, which
earlier outputs do not know. If x0 does not change, a step of any length and any tau is exact: it takes
N(alpha x0, sigma^2) to the same at the next level.

The start uses what outputs there are. An output at pure noise is infinitely far away and is not kept; the last step
returns the denoiser's output and draws nothing.

References:
    Xue et al., "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", 2023, section 4,
    algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.adams import Outputs, adams_step
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn


@dataclass(frozen=True, kw_only=True)
class SASolver(Stepper):
    """SA-Solver in data prediction with constant noise. One call of the denoiser a step.

    Args:
        predictor_order: Outputs the predictor uses, 1 to 4.
        corrector_order: Outputs the corrector uses, the one at the step's end included, 1 to 4; 0 for no corrector.
        tau: Noise.
        variant: The weights with two outputs: "exact", or the authors' change for few steps, "bh1", which is that of
            UniPC's variant.

    Raises:
        ValueError: If an order or `tau` is out of its range, or `variant` is another word.
    """

    predictor_order: int = 3
    corrector_order: int = 4
    tau: float = 1.0
    variant: Literal["exact", "bh1"] = "exact"

    def __post_init__(self) -> None:
        if self.predictor_order not in (1, 2, 3, 4) or self.corrector_order not in (0, 1, 2, 3, 4):
            raise ValueError(
                "SASolver needs predictor_order 1 to 4 and corrector_order 0 to 4, "
                f"got {self.predictor_order} and {self.corrector_order}"
            )
        if not 0.0 <= self.tau < math.inf:
            raise ValueError(f"SASolver needs a finite tau >= 0, got {self.tau}")
        if self.variant not in ("exact", "bh1"):
            raise ValueError(f"SASolver's variant is 'exact' or 'bh1', got {self.variant!r}")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether steps draw noise."""
        return self.tau > 0.0

    def step(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        state: State,
        rng: SampleRNG | None,
    ) -> tuple[Tensor, State]:
        """See `Stepper.step`; the state is `(x, z, outputs)`: where the last step began, its noise, and the outputs."""
        x0 = denoiser(x, logsnr)
        if bool(torch.isposinf(logsnr_next)):
            return x0, None

        def adams(x: Tensor, start: Tensor, end: Tensor, outputs: Outputs, z: Tensor | None) -> Tensor:
            return adams_step(
                denoiser.interpolant, x, start, end, outputs, tau=self.tau, z=z, variant=self.variant
            )

        newest: tuple[Tensor, Tensor] = (logsnr, x0)
        outputs: tuple[tuple[Tensor, Tensor], ...] = ()
        if state is not None:
            x_before, z, outputs = state
            if self.corrector_order:
                x = adams(x_before, outputs[0][0], logsnr, (*outputs[: self.corrector_order - 1], newest), z)
        outputs = (newest, *outputs)[: max(self.predictor_order, self.corrector_order - 1)]
        z = rng.randn_like(x) if self.tau and rng is not None else None
        x_next = adams(x, logsnr, logsnr_next, outputs[: self.predictor_order], z)
        return x_next, None if bool(torch.isneginf(logsnr)) else (x, z, outputs)
