r"""A network that becomes a denoiser.

The network sees c_in x, scaled to unit variance for data of standard deviation sigma_data, and the log-SNR itself:

    F = network(c_in x, logsnr, cond),    c_in = 1 / sqrt(alpha^2 sigma_data^2 + sigma^2),
    x0_hat = (sigma F - b x) / (sigma a - b alpha)          (see `prediction.py`).

Because it is told logsnr and never a "timestep", its schedule may be changed after training. So may its interpolant:
c_in x is the same in all of them (they are one process up to the length of x), and x0_hat depends on nothing but
c_in x, F and logsnr. The score is the exception: -eps / sigma is a number of its process, so a network of that type
stays with the interpolant it was trained in.

The network may run in lower precision under autocast; the coefficients and x0_hat are float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from diffusion_lab.denoisers.prediction import Prediction, x0_from
from diffusion_lab.process.broadcast import broadcast_right, expand_logsnr
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a network denoiser can tell a loss.

    Attributes:
        raw: The network's own output F, `(B, *D)`, put together of several where the prediction says so.
        read_x0: Makes x0 of it.
    """

    raw: Tensor
    read_x0: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def x0(self) -> Tensor:
        """Posterior mean, `(B, *D)`; made when it is first asked for, which losses of F never do."""
        return self.read_x0()


class NetworkDenoiser(nn.Module):
    """A `DenoiserFn` around a network.

    Args:
        network: Callable module `(x, logsnr (B,), cond) -> raw` of the shape of `x`.
        interpolant: The process that the noisy data come from.
        prediction: What `raw` stands for.
        sigma_data: Standard deviation of the data that the input scaling assumes; 1 makes c_in = 1 for the
            variance-preserving process.

    Raises:
        ValueError: If `sigma_data` is not positive.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        interpolant: Interpolant,
        prediction: Prediction,
        sigma_data: float = 1.0,
    ) -> None:
        super().__init__()
        if sigma_data <= 0.0:
            raise ValueError(f"NetworkDenoiser needs sigma_data > 0, got {sigma_data}")
        self.network = network
        self.interpolant = interpolant
        self.prediction = prediction
        self.sigma_data = sigma_data

    def predict(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Output:
        """Return x0_hat together with the raw output.

        Args:
            x: Noisy data, `(B, *D)`.
            logsnr: Noise level, `x.shape[:k]`, finite for prediction types that need it.
            cond: Conditions, or None.
        """
        logsnr = expand_logsnr(logsnr, x)
        alpha, sigma = self.interpolant(logsnr)
        c_in = torch.rsqrt((alpha * self.sigma_data) ** 2 + sigma**2)
        raw = self.network(broadcast_right(c_in, x) * x, logsnr, cond)
        # autocast may have lowered the output; the algebra below is cheap and wants its digits
        return self.read(raw.to(x.dtype), x, alpha, sigma)

    def read(self, answer: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Output:
        """Turn what the network said of `x` into an `Output`; for subclasses whose network says more than F.

        Args:
            answer: The network's output, in the dtype of `x`.
            x: Noisy data, `(B, *D)`.
            alpha: Signal coefficient, `x.shape[:k]`.
            sigma: Noise coefficient, like `alpha`.
        """
        merge = getattr(self.prediction, "merge", None)
        raw = answer if merge is None else merge(answer, x, alpha, sigma)
        return Output(raw=raw, read_x0=partial(x0_from, self.prediction, x, raw, alpha, sigma))

    def forward(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return E[x0 | x], of the shape of `x`. See `predict`."""
        return self.predict(x, logsnr, cond).x0

    def embed(self, cond: Cond) -> Cond:
        """Return `cond` with `label` replaced by the vectors the network makes of it, `label_embedding` (B, width).

        Calls with either give the same answer. A network that hears no labels, or a `cond` without, changes nothing.

        Raises:
            ValueError: If a label is out of range.
        """
        table = getattr(getattr(self.network, "conditioning", None), "label_embedding", None)
        if table is None or "label" not in cond:
            return cond
        rest = {name: value for name, value in cond.items() if name != "label"}
        return {**rest, "label_embedding": table(cond, len(cond["label"]))}
