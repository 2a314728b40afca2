r"""A classifier of noisy images: the down half of the ADM U-Net, then the mean over what is left of the pixels.

    x -> conv -> [ blocks at side s, halve ] -> ... -> middle -> norm, silu -> mean over pixels -> linear -> logits

It is told the noise level as the U-Net is, so one network serves all levels. (The paper pools by attention in its best
version and by averages in others; at the sizes of this house they differ little.)

References:
    Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, section 4 and appendix H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.networks.embeddings import LogSNREmbedding
from diffusion_lab.networks.layers import AttentionBlock, ResidualBlock, group_norm, zero_init
from diffusion_lab.networks.unet import Stage


class NoisyClassifier(nn.Module):
    """A network `(x, logsnr) -> logits`; all classes are alike at initialisation.

    Args:
        in_channels: Channels of the images.
        size: Side of the images; divisible by 2 ** (len(multipliers) - 1).
        num_classes: Number of classes, at least 2.
        channels: Channels at full resolution.
        multipliers: Channels of each level as multiples of `channels`; the resolution halves between levels.
        blocks: Residual blocks a level.
        attention: Sides of the feature maps that have attention after each block.
        head_channels: Channels of one attention head.
        dropout: Dropout probability in every residual block.

    Raises:
        ValueError: If there are no classes to tell apart, `size` cannot be halved often enough, or an attention side is
            not that of any level.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        size: int,
        num_classes: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: Sequence[int] = (),
        head_channels: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sides = [size >> level for level in range(len(multipliers))]
        if num_classes < 2:
            raise ValueError(
                f"a classifier needs num_classes >= 2, got {num_classes}: choose data with labels"
            )
        if size % (1 << (len(multipliers) - 1)):
            raise ValueError(f"images of side {size} cannot be halved {len(multipliers) - 1} times")
        if set(attention) - set(sides):
            raise ValueError(f"attention at sides {sorted(attention)}, but the levels have sides {sides}")
        width = 4 * channels
        self.level_embedding = LogSNREmbedding(features=channels, width=width)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down, now = nn.ModuleList(), channels
        for level, (side, multiplier) in enumerate(zip(sides, multipliers, strict=True)):
            for _ in range(blocks):
                block = ResidualBlock(
                    in_channels=now, out_channels=channels * multiplier, embedding=width, dropout=dropout
                )
                now = channels * multiplier
                attends = (
                    AttentionBlock(channels=now, head_channels=head_channels) if side in attention else None
                )
                self.down.append(Stage(block, attends))
            if level < len(sides) - 1:
                block = ResidualBlock(
                    in_channels=now, out_channels=now, embedding=width, dropout=dropout, change="down"
                )
                self.down.append(Stage(block, None))
        self.middle = ResidualBlock(in_channels=now, out_channels=now, embedding=width, dropout=dropout)
        self.norm_out = group_norm(now)
        self.linear_out = zero_init(nn.Linear(now, num_classes))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        """Return logits `(B, num_classes)` for scaled noisy images `x` `(B, C, H, W)` at levels `logsnr` `(B,)`."""
        embedding = F.silu(self.level_embedding(logsnr))
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for stage in self.down:
            x = stage(x, embedding)
        x = self.middle(x, embedding)
        return self.linear_out(F.silu(self.norm_out(x)).mean(dim=(2, 3)))
