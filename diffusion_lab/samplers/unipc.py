r"""UniPC: a multistep predictor, and a corrector that costs no call.

A step from lam to lam_next (half log-SNRs) replaces x0 by the polynomial through the last `order` outputs and
integrates exactly (`adams.py`, with tau = 0). When the next step has called the denoiser at the end of this one, its
output joins the polynomial, this step is repeated from where it began, and the next step starts from the result:

    predict    x_next from x_corrected and x0(lam), x0(lam_1), ...
    call       x0(lam_next) at the predicted x_next
    correct    x_next again, from the same x_corrected, with x0(lam_next) too

The predictor is of order `order`, with the corrector `order` + 1. The start uses what outputs there are. An output at
pure noise is infinitely far away and is not kept; the last step, where h is infinite, returns the denoiser's output.

References:
    Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models", 2023,
    section 3, algorithms 1 and 2, here in data prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_lab.process.gaussian import ddim_step
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.adams import Outputs, adams_step
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn


@dataclass(frozen=True, kw_only=True)
class UniPC(Stepper):
    """UniPC in data prediction. One call of the denoiser a step; order `order`, and one more with the corrector.

    Args:
        order: Outputs the predictor uses: 1, 2 or 3. The authors advise 3, and 2 under strong guidance.
        corrector: Whether to correct each step with the output at its end.
        variant: "bh1" or "bh2"; they differ only where two outputs are used.

    Raises:
        ValueError: If `order` is not 1, 2 or 3, or `variant` is another word.
    """

    order: int = 3
    corrector: bool = True
    variant: Literal["bh1", "bh2"] = "bh2"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"UniPC needs order 1, 2 or 3, got {self.order}")
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"UniPC's variant is 'bh1' or 'bh2', got {self.variant!r}")

    def step(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        state: State,
        rng: SampleRNG | None,
    ) -> tuple[Tensor, State]:
        """See `Stepper.step`; the state is `(x, outputs)`: where the last step began, and the outputs until then."""
        interpolant, x0 = denoiser.interpolant, denoiser(x, logsnr)
        if bool(torch.isposinf(logsnr_next)):
            return x0, None
        if bool(torch.isneginf(logsnr)):
            return ddim_step(interpolant, x, x0, logsnr, logsnr_next), None
        newest, outputs = (logsnr, x0), ()
        if state is not None:
            x_before, outputs = state
            if self.corrector:
                x = adams_step(
                    interpolant, x_before, outputs[0][0], logsnr, (*outputs, newest), variant=self.variant
                )
        kept: Outputs = (newest, *outputs)[: self.order]
        return adams_step(interpolant, x, logsnr, logsnr_next, kept, variant=self.variant), (x, kept)
