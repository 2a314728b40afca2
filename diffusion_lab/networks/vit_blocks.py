r"""What the two U-ViTs are made of, beside the convolutional residual block.

    transformer block   h <- h + out(attention(norm(q), norm(k), v)),   q, k, v = linear(modulated(norm(h)))
                        h <- h + linear(dropout(gelu(linear(modulated(norm(h))))))
                        modulated(n) = (1 + scale) n + shift, scale and shift from the embedding
    down, up            average of 2x2 pixels, then conv1x1;   conv1x1, then repetition; no biases, so up(0) = 0
    patches             a strided convolution, and its transpose at the end

Blocks take and return feature maps `(B, C, H, W)`. In channels-last order the tokens of a transformer, `(B, H W, C)`,
are the same memory. Every residual branch is zero at initialisation.

References:
    Hoogeboom, Heek & Salimans, "simple diffusion: End-to-end diffusion for high resolution images", 2023 (U-ViT).
    Hoogeboom et al., "Simpler Diffusion (SiD2)", 2024 (residual U-ViT).
    Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023 (queries and keys are normalised).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.networks.layers import (
    CrossAttentionBlock,
    Tokens,
    attention,
    modulation,
    resample,
    zero_init,
)


class RMSNorm(nn.RMSNorm):
    """RMS norm over the last axis that stays in the precision it is given, where there is a fast kernel for it."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(*, C)`."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class TransformerBlock(nn.Module):
    """Self-attention over pixels, attention to text tokens where there are any, and a perceptron.

    Args:
        channels: Channels of the feature map.
        head_channels: Channels of one attention head.
        embedding: Width of the embedding.
        mlp_ratio: Width of the perceptron's inner layer, in `channels`.
        dropout: Probability of dropping one of its activations.
        token_width: Width of text tokens; 0 for none.

    Raises:
        ValueError: If `head_channels` does not divide `channels`.
    """

    def __init__(
        self,
        *,
        channels: int,
        head_channels: int,
        embedding: int,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        token_width: int = 0,
    ) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(
                f"head_channels={head_channels} does not divide the {channels} channels of a transformer block"
            )
        self.heads = channels // head_channels
        self.modulation = nn.Linear(embedding, 4 * channels)
        self.norm_attention = nn.LayerNorm(channels, elementwise_affine=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm_q, self.norm_k = RMSNorm(head_channels, eps=1e-6), RMSNorm(head_channels, eps=1e-6)
        self.out = zero_init(nn.Linear(channels, channels))
        self.cross = (
            CrossAttentionBlock(channels=channels, head_channels=head_channels, token_width=token_width)
            if token_width
            else None
        )
        self.norm_mlp = nn.LayerNorm(channels, elementwise_affine=False)
        self.mlp_in = nn.Linear(channels, mlp_ratio * channels)
        self.dropout = nn.Dropout(dropout)
        self.mlp_out = zero_init(nn.Linear(mlp_ratio * channels, channels))

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tokens | None = None) -> Tensor:
        """Map `(B, C, H, W)` to the same shape.

        `embedding` is `(B, E)`, or `(B, E, H'', W'')` for noise levels per pixel; already through its activation.
        """
        B, C, H, W = x.shape
        told = modulation(self.modulation, embedding, x).flatten(2).transpose(1, 2)  # (B, 1 or H W, 4C)
        scale_attention, shift_attention, scale_mlp, shift_mlp = told.chunk(4, dim=2)
        h = x.flatten(2).transpose(1, 2)
        n = torch.addcmul(shift_attention, self.norm_attention(h), 1 + scale_attention)
        # (B, H W, 3C) -> three of (B, heads, H W, C / heads)
        q, k, v = self.qkv(n).reshape(B, H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        mixed = attention(self.norm_q(q), self.norm_k(k), v)
        h = h + self.out(mixed.transpose(1, 2).reshape(B, H * W, C))
        if self.cross is not None and tokens is not None:
            h = self.cross(h.transpose(1, 2).unflatten(2, (H, W)), tokens).flatten(2).transpose(1, 2)
        n = torch.addcmul(shift_mlp, self.norm_mlp(h), 1 + scale_mlp)
        h = h + self.mlp_out(self.dropout(F.gelu(self.mlp_in(n))))
        return h.transpose(1, 2).unflatten(2, (H, W))


class Down(nn.Module):
    """Halve the resolution.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', H / 2, W / 2)`."""
        return self.conv(resample(x, "down"))


class Up(nn.Module):
    """Double the resolution, linearly.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', 2 H, 2 W)`."""
        return resample(self.conv(x), "up")


class Positions(nn.Module):
    """Add a learned vector for each place, zero at initialisation.

    Args:
        channels: Channels of the feature map.
        side: Its side.
    """

    def __init__(self, *, channels: int, side: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, channels, side, side))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, side, side)` to the same shape."""
        return x + self.table


def patch_in(in_channels: int, channels: int, patch: int) -> nn.Conv2d:
    """A convolution that makes feature maps of an image, `patch` times smaller; 3x3 for patches of one pixel."""
    if patch == 1:
        return nn.Conv2d(in_channels, channels, 3, padding=1)
    return nn.Conv2d(in_channels, channels, patch, stride=patch)


def patch_out(channels: int, out_channels: int, patch: int) -> nn.Module:
    """The way back from `patch_in`, zero at initialisation."""
    if patch == 1:
        return zero_init(nn.Conv2d(channels, out_channels, 3, padding=1))
    return zero_init(nn.ConvTranspose2d(channels, out_channels, patch, stride=patch))


def check_sides(size: int, patch: int, levels: int, blocks: int) -> list[int]:
    """Return the sides of the feature maps of each level.

    Raises:
        ValueError: If `size` does not divide into patches and halves, or there is not one number of blocks a level.
    """
    if size % (patch << (levels - 1)):
        raise ValueError(
            f"images of side {size} cannot be cut into patches of {patch} and halved {levels - 1} times; "
            "choose another model="
        )
    if blocks != levels:
        raise ValueError(f"blocks has {blocks} numbers, but there are {levels} levels")
    return [size // patch >> level for level in range(levels)]
