r"""A network that is told how far its answer has to reach.

    cond["steps"] (B,)        n: the sampler takes n equal steps, so the answer is the x0 of a DDIM step of length 1 / n
    the network hears         (log2 n - mean) / std of n drawn evenly from 1, 2, 4 .. finest

Told nothing it answers as for `finest`, the shortest of steps, where it is the denoiser that any sampler can use. The
network declares that it hears the number: `scalars: [steps]`.

References:
    Frans, Hafner, Levine & Abbeel, "One Step Diffusion via Shortcut Models", 2024, section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffusion_lab.denoisers.network import Output
from diffusion_lab.denoisers.prediction import Prediction
from diffusion_lab.denoisers.told import ToldDenoiser
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import STEPS, Cond


class ShortcutDenoiser(ToldDenoiser):
    """A denoiser conditioned on the number of steps.

    Args:
        network: See `NetworkDenoiser`; it hears the scalar "steps".
        interpolant: See `NetworkDenoiser`.
        prediction: See `NetworkDenoiser`.
        sigma_data: See `NetworkDenoiser`.
        finest: Largest number of steps, a power of two; the paper's is 128.

    Raises:
        ValueError: If `finest` is no power of two above 1, or the network does not hear the number.
    """

    scalar = STEPS
    words = "number of steps"

    def __init__(
        self,
        *,
        network: nn.Module,
        interpolant: Interpolant,
        prediction: Prediction,
        sigma_data: float = 1.0,
        finest: int = 128,
    ) -> None:
        super().__init__(
            network=network, interpolant=interpolant, prediction=prediction, sigma_data=sigma_data
        )
        if finest < 2 or finest & (finest - 1):
            raise ValueError(f"method.denoiser.finest must be a power of two above 1, got {finest}")
        self.finest = finest

    @property
    def steps(self) -> list[int]:
        """The numbers of steps that it can be told: 1, 2, 4 .. finest."""
        return [2**k for k in range(self.finest.bit_length())]

    def heard(self, value: Tensor) -> Tensor:
        """Return what the network is told of a number of steps, of its shape."""
        k = self.finest.bit_length() - 1
        return (torch.log2(value) - 0.5 * k) / math.sqrt(((k + 1) ** 2 - 1) / 12.0)

    def predict(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Output:
        """See `NetworkDenoiser`."""
        if cond is None or STEPS not in cond:
            cond = {**(cond or {}), STEPS: torch.full((len(x),), float(self.finest), device=x.device)}
        return super().predict(x, logsnr, cond)
