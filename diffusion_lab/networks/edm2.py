r"""EDM2's U-Net (its config G): ADM's, rebuilt so that no magnitude drifts while it learns.

    encoder block   x <- pixel_norm(conv1x1(resample(x)))                 conv1x1 only where the channels change
                    y <- conv(mp_silu(x)),  y <- conv(dropout(mp_silu(y (1 + g linear(emb)))))
                    x <- mp_sum(x, y, 0.3)
                    x <- mp_sum(x, conv1x1(attention(q, k, v)), 0.3)      q, k, v of unit mean square in each pixel
    decoder block   the same without pixel norm, conv1x1(x) after the branch; skips enter by mp_cat
    output          F = g_out conv(x),  g_out = 0 at initialisation

No biases and no group norm; the only parameters with a length are the gains g. A constant channel of ones beside the
image stands for the missing biases. All balances are those of the paper. Every weight wants `normalize_weights` after
each optimizer step: see `magnitude_preserving`.

Sizes: `channels` 128, 192, 256, 320, 384, 448 for XS, S, M, L, XL, XXL, all with multipliers (1, 2, 3, 4), three
blocks a level and attention at sides 16 and 8. For 64x64 latents and 1000 classes they have 125, 280, 498, 777 million,
1.1 and 1.5 billion parameters.

There is no cross-attention, so no text; and none of the paper's half precision outside autocast.

References:
    Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024, figure 21 and table 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion_lab.networks.layers import Resample, attention, modulation, resample, run
from diffusion_lab.networks.magnitude_preserving import (
    GainedLinear,
    MPConditioning,
    MPConv,
    magnitude_preserving,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize_weights,
    unit,
)
from diffusion_lab.typing import Cond

RESIDUAL_BALANCE = ATTENTION_BALANCE = 0.3
SKIP_BALANCE = 0.5
CLIP = 256.0
"""Activations stay within ±256, for float16."""


class CosineAttention(nn.Module):
    """Self-attention over pixels whose queries, keys and values have unit mean square, mixed into its input.

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
        self.qkv, self.out = MPConv(channels, 3 * channels, 1), MPConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        B, C, H, W = x.shape
        # (B, 3C, H, W) -> three of (B, heads, H * W, C / heads)
        qkv = self.qkv(x).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2)
        h = attention(*unit(qkv, -1).unbind(1))
        return mp_sum(x, self.out(h.transpose(-1, -2).reshape(B, C, H, W)), ATTENTION_BALANCE)


class Block(nn.Module):
    """What encoder and decoder blocks share.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        branch_channels: Channels of the input of the residual branch.
        embedding: Width of the embedding.
        dropout: Probability of dropping an activation before the last convolution.
        head_channels: Channels of one attention head; None for no attention.
        change: Whether the block halves, doubles or keeps the resolution.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        branch_channels: int,
        embedding: int,
        dropout: float,
        head_channels: int | None = None,
        change: Resample = "none",
    ) -> None:
        super().__init__()
        self.change: Resample = change
        self.conv_in = MPConv(branch_channels, out_channels, 3)
        self.modulation = GainedLinear(embedding, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = MPConv(out_channels, out_channels, 3)
        self.skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = (
            None
            if head_channels is None
            else CosineAttention(channels=out_channels, head_channels=head_channels)
        )

    def branch(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The residual branch, `(B, C, H, W)` to `(B, C', H, W)`."""
        y = self.conv_in(mp_silu(x))
        y = mp_silu(y * (1.0 + modulation(self.modulation, embedding, y)))
        return self.conv_out(self.dropout(y))

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Mix main path `x` and branch `y`, then attend."""
        x = mp_sum(x, y, RESIDUAL_BALANCE)
        if self.attention is not None:
            x = self.attention(x)
        return x.clamp(-CLIP, CLIP)


class EncoderBlock(Block):
    """A block that normalises its input in each pixel."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', H', W')`."""
        x = unit(self.skip(resample(x, self.change)), 1)
        return self.finish(x, self.branch(x, embedding))


class DecoderBlock(Block):
    """A block that takes what it is given, a skip connection included."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', H', W')`."""
        x = resample(x, self.change)
        return self.finish(self.skip(x), self.branch(x, embedding))


class EDM2(nn.Module):
    """EDM2's U-Net, a network `(x, logsnr, cond) -> raw` of the shape of `x`, zero at initialisation.

    Args:
        in_channels: Channels of the images.
        size: Side of the images; divisible by 2 ** (len(multipliers) - 1).
        channels: Channels at full resolution.
        multipliers: Channels of each level as multiples of `channels`; the resolution halves between levels.
        blocks: Residual blocks a level.
        attention: Sides of the feature maps that have attention; the first block of the middle always has. Sides that
            images of this size do not come to are passed over.
        head_channels: Channels of one attention head.
        dropout: Dropout probability in every block.
        num_classes: Number of classes; 0 for a network without, which ignores labels.
        scalars: Names of continuous scalars among the conditions.
        image_channels: Channels of a conditioning image, concatenated to the input; 0 for none.
        checkpointing: Whether to save memory in training by computing activations twice, a block at a time.

    Raises:
        ValueError: If `size` cannot be halved often enough, or none of the attention sides is that of a level.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        size: int,
        channels: int,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: Sequence[int] = (16, 8),
        head_channels: int = 64,
        dropout: float = 0.0,
        num_classes: int = 0,
        scalars: Sequence[str] = (),
        image_channels: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sides = [size >> level for level in range(len(multipliers))]
        if size % (1 << (len(multipliers) - 1)):
            raise ValueError(
                f"images of side {size} cannot be halved {len(multipliers) - 1} times; choose another model="
            )
        if attention and not set(attention) & set(sides):
            raise ValueError(
                f"attention at sides {sorted(attention)}, but the levels have sides {sides}; choose another model="
            )
        widths = [channels * multiplier for multiplier in multipliers]
        width = max(widths)
        self.checkpointing = checkpointing
        self.conditioning = MPConditioning(
            features=channels,
            width=width,
            num_classes=num_classes,
            scalars=scalars,
            image_channels=image_channels,
        )

        def heads(side: int) -> int | None:
            return head_channels if side in attention else None

        def block(
            inputs: int, outputs: int, heads: int | None, change: Resample = "none", *, down: bool
        ) -> Block:
            kind = EncoderBlock if down else DecoderBlock
            return kind(
                in_channels=inputs,
                out_channels=outputs,
                branch_channels=outputs if down else inputs,
                embedding=width,
                dropout=dropout,
                head_channels=heads,
                change=change,
            )

        # the image, what it is conditioned on, and ones
        self.conv_in = MPConv(in_channels + image_channels + 1, widths[0], 3)
        self.down, skips, now = nn.ModuleList(), [widths[0]], widths[0]
        for level, (side, outputs) in enumerate(zip(sides, widths, strict=True)):
            if level > 0:
                self.down.append(block(now, now, None, "down", down=True))
                skips.append(now)
            for _ in range(blocks):
                self.down.append(block(now, outputs, heads(side), down=True))
                now = outputs
                skips.append(now)
        self.middle = nn.ModuleList(
            [block(now, now, head_channels, down=False), block(now, now, None, down=False)]
        )
        self.up = nn.ModuleList()
        for level, (side, outputs) in reversed(list(enumerate(zip(sides, widths, strict=True)))):
            if level < len(sides) - 1:
                self.up.append(block(now, now, None, "up", down=False))
            for _ in range(blocks + 1):
                self.up.append(block(now + skips.pop(), outputs, heads(side), down=False))
                now = outputs
        self.conv_out = MPConv(now, in_channels, 3)
        self.gain_out = nn.Parameter(torch.zeros(1))
        normalize_weights(magnitude_preserving(self))
        # convolutions run faster with the channels innermost, on CPUs and on tensor cores alike
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the raw output, `(B, C, H, W)`.

        Args:
            x: Scaled noisy images `(B, C, H, W)`.
            logsnr: Noise level `(B,)`, or `(B, 1, H, W)` for one per pixel.
            cond: See `Conditioning`; labels 0 .. num_classes - 1 or `NO_LABEL`; None for nothing.

        Raises:
            ValueError: If a condition is out of range, of a wrong shape, or unknown.
        """
        self.conditioning.check(cond, type(self).__name__)
        embedding = self.conditioning(logsnr, cond, x.shape[0])
        x = self.conditioning.with_image(x, cond)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in self.down:
            x = run(block, x, embedding, checkpointing=self.checkpointing)
            skips.append(x)
        for block in self.middle:
            x = run(block, x, embedding, checkpointing=self.checkpointing)
        for block in self.up:
            assert isinstance(block, Block)
            if block.change == "none":
                x = mp_cat(x, skips.pop(), SKIP_BALANCE)
            x = run(block, x, embedding, checkpointing=self.checkpointing)
        return self.gain_out * self.conv_out(x)
