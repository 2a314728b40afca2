r"""A network that also says how wide the reverse step is.

Its output has twice the channels of the data: the first half is F, as of any network denoiser, the second v,

    c = (v + 1) / 2,      var = var_lower^(1 - c) var_upper^c,

one number for each element of the data. var_lower is the variance of q(x_next | x, x0), var_upper that of the forward
kernel (`process/gaussian.py`); which step is meant is the sampler's or the loss's business, so c learned for one number
of steps serves others.

v is not held in [-1, 1]: nothing but the loss keeps it there, as in the paper. Samplers are given c cut to [0, 1].

References:
    Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, section 3.1, eq. 15.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from diffusion_lab.denoisers.network import NetworkDenoiser, Output
from diffusion_lab.denoisers.prediction import x0_from
from diffusion_lab.typing import Cond


@dataclass(frozen=True, kw_only=True)
class VarianceOutput(Output):
    """What a denoiser with a learned variance can tell a loss.

    Attributes:
        fraction: c as the network says it, `(B, *D)`; it may lie outside [0, 1].
    """

    fraction: Tensor


class LearnedVarianceDenoiser(NetworkDenoiser):
    """A network denoiser whose network has twice the channels of the data; see the module.

    It takes the arguments of `NetworkDenoiser`. A network that is zero at initialisation starts at c = ½.
    """

    def read(self, answer: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> VarianceOutput:
        """See `NetworkDenoiser.read`.

        Raises:
            ValueError: If the network has not twice the channels of the data.
        """
        if answer.shape[1] != 2 * x.shape[1]:
            raise ValueError(
                f"a learned variance needs a network of {2 * x.shape[1]} output channels for data of {x.shape[1]}, "
                f"this one has {answer.shape[1]}: set model.out_channels={2 * x.shape[1]}"
            )
        raw, v = answer.chunk(2, dim=1)
        read_x0 = partial(x0_from, self.prediction, x, raw, alpha, sigma)
        return VarianceOutput(raw=raw, read_x0=read_x0, fraction=0.5 * (v + 1.0))

    def with_variance(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> tuple[Tensor, Tensor]:
        """Return E[x0 | x] and c in [0, 1], both `(B, *D)`, from one call of the network.

        Args:
            x: Noisy data, `(B, *D)`.
            logsnr: Noise level, `x.shape[:k]`.
            cond: Conditions, or None.
        """
        output = self.predict(x, logsnr, cond)
        assert isinstance(output, VarianceOutput)
        return output.x0, output.fraction.clamp(0.0, 1.0)
