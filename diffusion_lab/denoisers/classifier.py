r"""A network that becomes a classifier of the process's noisy data: p(label | x, logsnr).

    logits = network(c_in x, logsnr),    c_in = 1 / sqrt(alpha^2 sigma_data^2 + sigma^2)

as for a denoiser (`network.py`), so that the network sees data of unit variance in every interpolant. Its gradient
with respect to x is what classifier guidance adds to the score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_lab.process.broadcast import broadcast_right, expand_logsnr
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond

Classifier = Callable[[Tensor, Tensor], Tensor]
"""`(x (B, *D), logsnr (B,)) -> logits (B, K)` of noisy data, differentiable in x."""


@dataclass(frozen=True, kw_only=True)
class Logits:
    """What `NetworkClassifier.predict` returns: `raw`, the logits `(B, K)`."""

    raw: Tensor


class NetworkClassifier(nn.Module):
    """A `Classifier` around a network.

    Args:
        network: Callable module `(x, logsnr (B,)) -> logits (B, K)`.
        interpolant: The process that the noisy data come from.
        sigma_data: Standard deviation of the data that the input scaling assumes.

    Raises:
        ValueError: If `sigma_data` is not positive.
    """

    def __init__(self, *, network: nn.Module, interpolant: Interpolant, sigma_data: float = 1.0) -> None:
        super().__init__()
        if sigma_data <= 0.0:
            raise ValueError(f"NetworkClassifier needs sigma_data > 0, got {sigma_data}")
        self.network, self.interpolant, self.sigma_data = network, interpolant, sigma_data

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        """Return logits `(B, K)`, of x's dtype but float32 at least, of noisy data `x` `(B, *D)` at levels `(B,)`."""
        logsnr = expand_logsnr(logsnr, x)
        alpha, sigma = self.interpolant(logsnr)
        c_in = torch.rsqrt((alpha * self.sigma_data) ** 2 + sigma**2)
        logits: Tensor = self.network(broadcast_right(c_in, x) * x, logsnr)
        return logits.to(torch.promote_types(x.dtype, torch.float32))

    def predict(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Logits:
        """Return the logits as `raw`, for whoever counts what a pass costs; `cond` is ignored."""
        return Logits(raw=self(x, logsnr))
