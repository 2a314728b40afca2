r"""A network that is told how strongly to be guided, and needs no second call for it.

    cond["guidance_scale"] (B,)        1 is the conditional model; 1 + w of Meng et al.
    the network hears                  (scale - mean) / std of a scale drawn evenly from `scales`

so that it is of about unit size, as `networks/conditioning.py` wants its scalars. The network declares that it hears
it: `scalars: [guidance_scale]`. It has no answer without a scale, nor far outside the range it was trained for.

References:
    Meng et al., "On Distillation of Guided Diffusion Models", 2023, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from diffusion_lab.denoisers.network import Output
from diffusion_lab.denoisers.prediction import Prediction
from diffusion_lab.denoisers.told import ToldDenoiser
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond

GUIDANCE_SCALE = "guidance_scale"


class GuidedDenoiser(ToldDenoiser):
    """A denoiser conditioned on the guidance scale.

    Args:
        network: See `NetworkDenoiser`; it hears the scalar "guidance_scale".
        interpolant: See `NetworkDenoiser`.
        prediction: See `NetworkDenoiser`.
        sigma_data: See `NetworkDenoiser`.
        scales: `(lowest, highest)` scale that it is trained for.

    Raises:
        ValueError: If `scales` are not two finite numbers in order, or the network does not hear the scale.

    Attributes:
        needs: Conditions, numbers `(B,)`, without which it has no answer.
    """

    scalar, words = GUIDANCE_SCALE, "guidance scale"
    needs = (GUIDANCE_SCALE,)

    def __init__(
        self,
        *,
        network: nn.Module,
        interpolant: Interpolant,
        prediction: Prediction,
        sigma_data: float = 1.0,
        scales: Sequence[float],
    ) -> None:
        super().__init__(
            network=network, interpolant=interpolant, prediction=prediction, sigma_data=sigma_data
        )
        if len(scales) != 2 or not -math.inf < scales[0] < scales[1] < math.inf:
            raise ValueError(
                f"method.denoiser.scales are the lowest and the highest guidance scale, got {list(scales)}"
            )
        self.scales = (float(scales[0]), float(scales[1]))

    def heard(self, value: Tensor) -> Tensor:
        """Return what the network is told of a guidance scale, of its shape."""
        low, high = self.scales
        return (value - 0.5 * (low + high)) * (math.sqrt(12.0) / (high - low))

    def predict(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Output:
        """See `NetworkDenoiser`.

        Raises:
            ValueError: If `cond` has no guidance scale.
        """
        if cond is None or GUIDANCE_SCALE not in cond:
            raise ValueError(
                "this model was trained to be told its guidance scale, and was not: guidance=distilled "
                "guidance.scale=<number>"
            )
        return super().predict(x, logsnr, cond)
