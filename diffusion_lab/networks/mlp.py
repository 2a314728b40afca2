r"""A residual perceptron for low-dimensional data.

    h = linear(x),    h <- h + W2 silu( (1 + scale) norm(W1 h) + shift ),    F = linear(norm(h))

with scale and shift from the embedding of noise level and label, as in the U-Net. The output layer and every W2 are
zero at initialisation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.networks.conditioning import Conditioning
from diffusion_lab.networks.layers import zero_init
from diffusion_lab.typing import Cond


class PerceptronBlock(nn.Module):
    """One residual block of width `width`, modulated by an embedding of the same width."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear_out = zero_init(nn.Linear(width, width))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Map `(B, width)` to the same shape."""
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        return h + self.linear_out(F.silu((1 + scale) * self.norm(self.linear_in(h)) + shift))


class MLP(nn.Module):
    """Residual perceptron, a network `(x, logsnr, cond) -> raw` of the shape of `x` `(B, dim)`.

    Args:
        dim: Dimension of the data.
        width: Width of the layers; even.
        depth: Number of residual blocks.
        num_classes: Number of classes; 0 for a network without, which ignores labels.
        scalars: Names of continuous scalars among the conditions.
    """

    def __init__(
        self, *, dim: int, width: int, depth: int, num_classes: int = 0, scalars: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.conditioning = Conditioning(
            features=width, width=width, num_classes=num_classes, scalars=scalars
        )
        self.linear_in = nn.Linear(dim, width)
        self.blocks = nn.ModuleList([PerceptronBlock(width=width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.linear_out = zero_init(nn.Linear(width, dim))

    def forward(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the raw output `(B, dim)` for `x` `(B, dim)`, `logsnr` `(B,)` and conditions of one number an example.

        Raises:
            ValueError: If a label is out of range, or `cond` has a key that is unknown.
        """
        self.conditioning.check(cond, type(self).__name__)
        embedding = self.conditioning(logsnr, cond, x.shape[0])
        h = self.linear_in(x)
        for block in self.blocks:
            h = block(h, embedding)
        return self.linear_out(self.norm(h))
