r"""Layers that keep the mean square of activations at one, whatever is learned: EDM2's building blocks.

    unit(w)        w / rms(w), over what one output sums                         eq. 47: |w| is no degree of freedom
    linear, conv   y = x * unit(w) / sqrt(fan_in),  no bias                      mean square 1 in, 1 out
    mp_sum         ((1-t) a + t b) / sqrt((1-t)^2 + t^2)                         eq. 88, for uncorrelated a and b
    mp_cat         a and b scaled so that each contributes as mp_sum says        eq. 103
    mp_silu        silu(x) / 0.596,  0.596^2 = E[silu(n)^2], n ~ N(0, 1)         eq. 81
    level          linear([√2 cos(f_k l), √2 sin(f_k l)]),  f_k ~ N(0, (2π/8)^2) eq. 75

The function of a weight does not depend on its length, but the size of a gradient step on it does: by 1 / |w|. Hence
*forced* weight normalisation (eq. 66): after each optimizer step every weight is put back to unit length by
`normalize_weights`. The published code does so inside the forward pass. Here it is a function of its own, to be called
once a step, because a forward pass that writes to its own parameters cannot be run twice before one backward (as
consistency and distillation losses do), nor again within it (as checkpointing does), and would make an evaluation in
train mode change a model. Copies of the weights that nobody normalises, averages above all, answer the same.

The noise level enters as EDM2's c_noise = ln(sigma) / 4 = -logsnr / 8. Its frequencies are drawn at random there; here
they are the quantiles of the same law, each with cosine and sine, so that nothing is drawn and the mean square of the
features is exactly one at every level.

References:
    Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024 (EDM2), appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.networks.conditioning import Conditioning, ScalarEmbedding
from diffusion_lab.networks.embeddings import LabelEmbedding, LogSNREmbedding
from diffusion_lab.typing import Cond

LEVEL_BANDWIDTH = 2.0 * math.pi / 8.0
"""EDM2's standard deviation of the angular frequencies, in radians per unit of log-SNR."""
SCALAR_BANDWIDTH = 2.0
"""The same for scalars of about unit variance, in radians; EDM2 has none."""
SILU_RMS = 0.596
EPS = 1e-4


def unit(x: Tensor, dim: int | Sequence[int]) -> Tensor:
    """Return `x` divided by its root mean square over `dim`, which is taken in float32 or better."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    count = math.prod([x.shape[d] for d in dims])
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    rms = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide) / math.sqrt(count)
    return x / (rms + EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """Return silu(x), scaled to unit mean square for standard normal `x`."""
    return F.silu(x) / SILU_RMS


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the mix (1-t) `a` + t `b`, scaled to unit mean square where `a` and `b` have it and are uncorrelated."""
    norm = math.hypot(1.0 - t, t)
    return a * ((1.0 - t) / norm) + b * (t / norm)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return `a` and `b` side by side in axis 1, of unit mean square, with (1-t)^2 : t^2 the shares of the two."""
    channels = a.shape[1] + b.shape[1]
    scale = math.sqrt(channels) / math.hypot(1.0 - t, t)
    return torch.cat(
        [a * (scale * (1.0 - t) / math.sqrt(a.shape[1])), b * (scale * t / math.sqrt(b.shape[1]))], dim=1
    )


class MPLinear(nn.Linear):
    """A linear layer without bias whose rows have unit length.

    Args:
        inputs: Width of the input.
        outputs: Width of the output.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight)

    def unit_weight(self) -> Tensor:
        """The weight, with unit mean square for each output."""
        return unit(self.weight, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(*, inputs)` to `(*, outputs)`."""
        return F.linear(x, self.unit_weight() / math.sqrt(self.in_features))


class GainedLinear(MPLinear):
    """A magnitude-preserving linear layer times a learned number, zero at initialisation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(*, inputs)` to `(*, outputs)`."""
        y = super().forward(x)
        # a number of one element would lift half precision to float32
        return y * self.gain.to(y.dtype)


class MPConv(nn.Conv2d):
    """A convolution without bias whose filters have unit length, and that keeps the resolution.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        kernel: Side of the filters; odd.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        nn.init.normal_(self.weight)

    def unit_weight(self) -> Tensor:
        """The weight, with unit mean square for each output."""
        return unit(self.weight, (1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', H, W)`."""
        return F.conv2d(x, self.unit_weight() / math.sqrt(self.weight[0].numel()), padding=self.padding)  # type: ignore[arg-type]


class MPEmbedding(nn.Embedding):
    """A table of vectors; each of their components has unit mean square over the table.

    It is an `MPLinear` of one-hot vectors of unit mean square, as EDM2 says it.

    Args:
        rows: Number of vectors.
        width: Width of each.
        share: Root mean square of what is returned.
    """

    def __init__(self, rows: int, width: int, share: float = 1.0) -> None:
        super().__init__(rows, width)
        self.share = share

    def unit_weight(self) -> Tensor:
        """The table, normalised."""
        return unit(self.weight, 0)

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows `index`, `(*, width)`."""
        return self.share * F.embedding(index, self.unit_weight())


def magnitude_preserving(network: nn.Module) -> list[MPLinear | MPConv | MPEmbedding]:
    """Return the layers above, wherever in `network` they are."""
    return [module for module in network.modules() if isinstance(module, MPLinear | MPConv | MPEmbedding)]


@torch.no_grad()
def normalize_weights(layers: Sequence[MPLinear | MPConv | MPEmbedding]) -> None:
    """Put the weights of layers back to unit mean square, in place.

    To be called after each optimizer step. What the network computes does not change; see the module's docstring.
    """
    for layer in layers:
        layer.weight.copy_(layer.unit_weight())


class MPLevelEmbedding(LogSNREmbedding):
    """Fourier features of log-SNR through one linear layer, of mean square `share`^2.

    Args:
        features: Number of features; even.
        width: Width of the output.
        share: Root mean square of the output.
        bandwidth: Standard deviation of the angular frequencies, radians per unit.
    """

    def __init__(
        self, *, features: int, width: int, share: float = 1.0, bandwidth: float = LEVEL_BANDWIDTH
    ) -> None:
        super().__init__(features=features, width=width)
        half = features // 2
        quantiles = (torch.arange(half, dtype=torch.float64) + 0.5) / half
        # of |f|, f ~ N(0, bandwidth^2): the sign makes no difference beside cosine and sine
        self.frequencies.copy_(bandwidth * math.sqrt(2.0) * torch.erfinv(quantiles))
        self.layers = nn.Sequential(MPLinear(features, width))
        self.share = share

    def forward(self, logsnr: Tensor) -> Tensor:
        """Return `(B, width)` for `logsnr` of shape `(B,)`; infinite levels are allowed."""
        return (self.share * math.sqrt(2.0)) * super().forward(logsnr)


class MPLabelEmbedding(LabelEmbedding):
    """A unit vector for each class and one for "no label", times `share`.

    EDM2 has no such vector: it trains its unconditional network apart.
    """

    def __init__(self, *, num_classes: int, width: int, share: float) -> None:
        super().__init__(num_classes=num_classes, width=width)
        self.table = MPEmbedding(num_classes + 1, width, share)


class MPScalarEmbedding(ScalarEmbedding):
    """As `MPLevelEmbedding`; nothing where a scalar is not given, like EDM2's label of zeros."""

    def __init__(self, *, features: int, width: int, share: float) -> None:
        super().__init__(features=features, width=width)
        self.embedding = MPLevelEmbedding(
            features=features, width=width, share=share, bandwidth=SCALAR_BANDWIDTH
        )
        del self.null
        self.register_buffer("null", torch.zeros(width), persistent=False)

    def silence(self) -> None:
        """Refuse: whatever is told has its share of the embedding, and takes it from what else is.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a magnitude-preserving network cannot be told more and answer as it did before")


class MPConditioning(Conditioning):
    """What `Conditioning` does, magnitude-preserving; no tokens.

    Of n things that it is told each has the share 1 / sqrt(n), so their sum has unit mean square: with a label beside
    the noise level that is mp_sum at t = 1/2.
    """

    def __init__(
        self,
        *,
        features: int,
        width: int,
        num_classes: int = 0,
        scalars: Sequence[str] = (),
        image_channels: int = 0,
    ) -> None:
        super().__init__(
            features=features,
            width=width,
            num_classes=num_classes,
            scalars=scalars,
            image_channels=image_channels,
        )
        share = 1.0 / math.sqrt(1 + (num_classes > 0) + len(scalars))
        self.level_embedding = MPLevelEmbedding(features=features, width=width, share=share)
        if num_classes:
            self.label_embedding = MPLabelEmbedding(num_classes=num_classes, width=width, share=share)
        for name in scalars:
            self.scalar_embeddings[name] = MPScalarEmbedding(features=features, width=width, share=share)

    def forward(self, logsnr: Tensor, cond: Cond | None, batch: int) -> Tensor:
        """See `Conditioning`."""
        return super().forward(logsnr, cond, batch) / SILU_RMS
