r"""A network that becomes the field of a bridge between two laws of data (`process/stochastic_interpolant.py`).

The network is told x, a log-SNR for tau, and the conditions; its output has twice the channels of the data,

    v, xi = halves of network(x, logsnr(tau), cond),      v the velocity,    xi = E[xi | x],

or only v where the bridge has no noise. Training draws tau in [margin, 1 - margin]: closer to an end the network is
told the nearest time it knows.

The source, `cond["image"]`, is where samples start. Whether the network sees it too is the network's own affair
(`model.image_channels`): one that does not carries law to law, one that does carries each source to the law of the data
given that source.

A field is no denoiser: it answers with two things, at a tau. What it shares with one is the coordinate of the grids,

    logsnr = 2 log(b / a),      alpha = b,  sigma = a,

the true log-SNR where the source is standard normal and the bridge has no noise, as `interpolant` says.

References:
    Albergo, Boffi & Vanden-Eijnden, "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions", 2023,
        section 2 (velocity and denoiser).
    Albergo, Goldstein, Boffi, Ranganath & Vanden-Eijnden, "Stochastic Interpolants with Data-Dependent Couplings",
        2024, section 3 (source made from the data; the field may be told it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.process.stochastic_interpolant import BridgePath, StochasticInterpolant
from diffusion_lab.typing import Cond

SOURCE = "image"
# halvings of [0, 1], until float64 has no more digits
HALVINGS = 64


def reads_image(network: object) -> bool:
    """Whether a network is one that sees `cond["image"]`."""
    reads = getattr(getattr(network, "conditioning", None), "reads", None)
    return reads is not None and SOURCE in reads()


def time_of(path: BridgePath, logsnr: Tensor) -> Tensor:
    """Return the tau at which 2 log(b / a) is `logsnr`, float64, in its shape; exactly 0 and 1 at -inf and +inf."""
    logsnr = logsnr.double()
    # b e^(-logsnr/2) - a rises with tau; so written it is finite at both ends
    of_b, of_a = 1.0 / (1.0 + torch.exp(0.5 * logsnr)), 1.0 / (1.0 + torch.exp(-0.5 * logsnr))
    low, high = torch.zeros_like(logsnr), torch.ones_like(logsnr)
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        a, b = path(middle)
        above = of_b * b > of_a * a
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    tau = 0.5 * (low + high)
    return torch.where(torch.isinf(logsnr), (logsnr > 0).double(), tau)


@dataclass(frozen=True, kw_only=True)
class PathInterpolant:
    """What a bridge is from a standard normal source and without noise of its own: alpha = b, sigma = a.

    Args:
        path: a and b.
    """

    path: BridgePath

    def __call__(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(alpha, sigma)`, each of the shape of `logsnr`."""
        a, b = self.path(time_of(self.path, logsnr))
        dtype = logsnr.dtype if logsnr.dtype in (torch.float32, torch.float64) else torch.float32
        return b.to(dtype), a.to(dtype)


@runtime_checkable
class BridgeField(Protocol):
    """The model of a bridge, as samplers are given it in place of a denoiser."""

    bridge: StochasticInterpolant

    @property
    def interpolant(self) -> Interpolant:
        """See `PathInterpolant`."""
        ...

    def __call__(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> tuple[Tensor, Tensor | None]:
        """Return velocity and E[xi | x], both `(B, *D)`, of `x` at times `tau` `(B,)`; xi is None without noise."""
        ...


@dataclass(frozen=True, kw_only=True)
class BridgeOutput:
    """All that a network says of x.

    Attributes:
        v: Velocity, `(B, *D)`.
        xi: E[xi | x], like `v`; None where the bridge has no noise.
        raw: The network's own output.
    """

    v: Tensor
    xi: Tensor | None
    raw: Tensor


class InterpolantField(nn.Module):
    """A `BridgeField` around a network.

    Args:
        network: Callable module `(x, logsnr (B,), cond)` with 2 C output channels, C for a bridge without noise.
        bridge: The bridge.
        margin: Times closer to an end are answered as those at `margin` from it; in [0, 1/2). That of the loss.

    Raises:
        ValueError: If `margin` is out of its range.
    """

    def __init__(self, *, network: nn.Module, bridge: StochasticInterpolant, margin: float = 1e-3) -> None:
        super().__init__()
        if not 0.0 <= margin < 0.5:
            raise ValueError(f"margin must be in [0, 1/2), got {margin}")
        self.network, self.bridge, self.margin = network, bridge, margin
        self.interpolant: Interpolant = PathInterpolant(path=bridge.path)

    def predict(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> BridgeOutput:
        """Return what the network says of `x`.

        Args:
            x: Samples of the bridge, `(B, *D)`.
            tau: Times in [0, 1], `(B,)`.
            cond: Conditions, or None.

        Raises:
            ValueError: If the network has another number of channels than the bridge needs.
        """
        logsnr = self.bridge.logsnr(tau.clamp(self.margin, 1.0 - self.margin))
        # autocast may have lowered the output; what is done with it wants its digits
        raw = self.network(x, logsnr, self._told(cond)).to(x.dtype)
        channels = x.shape[1] * (2 if self.bridge.noise > 0.0 else 1)
        if raw.shape[1] != channels:
            raise ValueError(
                f"a bridge of noise {self.bridge.noise:g} needs a network of {channels} output channels for data of "
                f"{x.shape[1]}, this one has {raw.shape[1]}: set model.out_channels={channels}"
            )
        if self.bridge.noise == 0.0:
            return BridgeOutput(v=raw, xi=None, raw=raw)
        v, xi = raw.chunk(2, dim=1)
        return BridgeOutput(v=v, xi=xi, raw=raw)

    def forward(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> tuple[Tensor, Tensor | None]:
        """See `BridgeField`."""
        output = self.predict(x, tau, cond)
        return output.v, output.xi

    def _told(self, cond: Cond | None) -> Cond | None:
        """Leave the source out for a network that does not see it."""
        if cond is None or SOURCE not in cond or reads_image(self.network):
            return cond
        return {name: value for name, value in cond.items() if name != SOURCE} or None
