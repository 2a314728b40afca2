r"""The blocks of the ADM U-Net, and what all networks share.

    residual block     h = conv(silu(norm(x)))                       at the new resolution, if it changes
                       h = (1 + scale) norm(h) + shift               scale, shift = linear(silu(embedding))
                       y = skip(x) + conv(dropout(silu(h)))          last conv zero at initialisation
    attention block    y = x + out(attention(q, k, v)), qkv = conv1x1(norm(x)), out zero at initialisation
    cross-attention    the same with q = conv1x1(norm(x)) and k, v = linear(norm(tokens))

References:
    Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, section 3.
    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, section 3.3 (cross-attention).
    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016 (checkpointing).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusion_lab.forward_mode import is_dual

Resample = Literal["none", "down", "up"]
Tokens = tuple[Tensor, Tensor]
"""Tokens `(B, L, D)` and which of them are there, `(B, L)` bool."""


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm(nn.GroupNorm):
    """Group norm that can also be differentiated in forward mode where images are kept in channels-last order.

    torch's rule for that derivative views its input in the usual order of memory, and raises on any other; under
    autocast it also mixes types. Samplers that take a JVP of the network need it; nobody else pays for the copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(B, C, *)`."""
        if is_dual(x):
            x = x.contiguous()
            if torch.is_autocast_enabled(x.device.type):
                x = x.float()
        return super().forward(x)


def group_norm(channels: int) -> GroupNorm:
    """Group norm with ADM's 32 groups from 128 channels on, where 32 divides them, else with a smaller power of two.

    That power divides both `channels` and `channels // 4`, so a group has 4 channels or more.
    """
    if channels >= 128 and channels % 32 == 0:
        return GroupNorm(32, channels)
    return GroupNorm(math.gcd(32, max(1, channels // 4), channels), channels)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k' / sqrt(C)) v over the next-to-last axis, `(*, L, C)`, by the fastest kernel that will do.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Which keys each query may attend to, bool, broadcastable to `(*, L_q, L_k)`; None for all.
    """
    if is_dual(q):
        products = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            products = products.masked_fill(~mask, -math.inf)
        return torch.softmax(products, dim=-1) @ v
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def modulation(linear: nn.Linear, embedding: Tensor, h: Tensor) -> Tensor:
    """Return `linear(embedding)` so that it broadcasts over the pixels of `h` `(B, C, H, W)`.

    Args:
        linear: What makes scales and shifts of an embedding.
        embedding: `(B, E)`, or `(B, E, H', W')` where the noise level differs between pixels; averaged to the side of
            `h`.
        h: The feature map to be modulated.
    """
    if embedding.ndim == 2:
        return linear(embedding)[:, :, None, None]
    local = F.adaptive_avg_pool2d(embedding, (h.shape[2], h.shape[3]))
    return linear(local.movedim(1, -1)).movedim(-1, 1)


def run(module: Callable[..., Tensor], *given: Tensor | Tokens | None, checkpointing: bool) -> Tensor:
    """Call a block; with `checkpointing` its activations are not kept but computed again in the backward pass."""
    first = given[0]
    if checkpointing and torch.is_grad_enabled() and not is_dual(first):
        out: Tensor = checkpoint(module, *given, use_reentrant=False)  # type: ignore[assignment]
        return out
    return module(*given)


def resample(x: Tensor, how: Resample) -> Tensor:
    """Halve by 2x2 averages, double by repetition, or leave `x` `(B, C, H, W)` as it is."""
    if how == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if how == "up" else x


class ResidualBlock(nn.Module):
    """Residual block with the embedding as scale and shift after the second norm.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        embedding: Width of the embedding.
        dropout: Probability of dropping an activation before the last convolution.
        change: Whether the block halves, doubles or keeps the resolution.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        embedding: int,
        dropout: float,
        change: Resample = "none",
    ) -> None:
        super().__init__()
        self.change: Resample = change
        self.norm_in, self.norm_out = group_norm(in_channels), group_norm(out_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv_out = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.modulation = nn.Linear(embedding, 2 * out_channels)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', H', W')`.

        `embedding` is `(B, E)`, or `(B, E, H'', W'')` for noise levels per pixel; already through its activation.
        """
        h = self.conv_in(resample(F.silu(self.norm_in(x)), self.change))
        scale, shift = modulation(self.modulation, embedding, h).chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm_out(h), 1 + scale)
        h = self.conv_out(self.dropout(F.silu(h)))
        return self.skip(resample(x, self.change)) + h


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map, through `scaled_dot_product_attention`.

    Args:
        channels: Channels of the feature map.
        head_channels: Channels of one head.

    Raises:
        ValueError: If `head_channels` does not divide `channels`.
    """

    def __init__(self, *, channels: int, head_channels: int) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(
                f"head_channels={head_channels} does not divide the {channels} channels of an attention block"
            )
        self.heads = channels // head_channels
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        B, C, H, W = x.shape
        # (B, 3C, H, W) -> three of (B, heads, H * W, C / heads)
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2)
        h = attention(*qkv.unbind(1))
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class CrossAttentionBlock(nn.Module):
    """Attention of the pixels of a feature map to tokens.

    Args:
        channels: Channels of the feature map.
        head_channels: Channels of one head.
        token_width: Width of the tokens.

    Raises:
        ValueError: If `head_channels` does not divide `channels`.
    """

    def __init__(self, *, channels: int, head_channels: int, token_width: int) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(
                f"head_channels={head_channels} does not divide the {channels} channels of an attention block"
            )
        self.heads = channels // head_channels
        self.norm, self.norm_tokens = group_norm(channels), nn.LayerNorm(token_width)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key_value = nn.Linear(token_width, 2 * channels)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Map `(B, C, H, W)` to the same shape; tokens that are not there are not attended to."""
        B, C, H, W = x.shape
        values, there = tokens
        q = self.query(self.norm(x)).reshape(B, self.heads, C // self.heads, H * W).transpose(-1, -2)
        # (B, L, 2C) -> two of (B, heads, L, C / heads)
        k, v = (
            self.key_value(self.norm_tokens(values)).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        h = attention(q, k, v, there[:, None, None, :])
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))
