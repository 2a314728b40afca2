r"""The ADM U-Net: the class-conditional convolutional network that most pixel-space papers start from.

    x -> conv -> [ blocks at side s, halve ] -> ... -> middle -> ... -> [ double, blocks at side s ] -> norm, conv -> F
                   |______ one skip connection for every block and every halving, concatenated ______|

Sizes in the literature: `channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), head_channels=64` is
ADM's ImageNet 64x64 model, 296 million parameters; `channels=128, multipliers=(1, 2, 2, 2), blocks=3,
attention=(16, 8)` is about improved DDPM's CIFAR-10 model. With blocks that differ between levels and dropout at small
sides only it is simple diffusion's U-Net.

References:
    Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, section 3 and table 11.
    Hoogeboom, Heek & Salimans, "simple diffusion: End-to-end diffusion for high resolution images", 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.networks.conditioning import Conditioning
from diffusion_lab.networks.layers import (
    AttentionBlock,
    CrossAttentionBlock,
    Resample,
    ResidualBlock,
    Tokens,
    group_norm,
    run,
    zero_init,
)
from diffusion_lab.typing import Cond


class Stage(nn.Module):
    """A residual block and, where asked for, attention after it: to the other pixels, then to tokens."""

    def __init__(
        self, block: ResidualBlock, attention: AttentionBlock | None, cross: CrossAttentionBlock | None = None
    ) -> None:
        super().__init__()
        self.block = block
        self.attention = attention
        self.cross = cross

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tokens | None = None) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', H', W')`."""
        x = self.block(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        if self.cross is not None and tokens is not None:
            x = self.cross(x, tokens)
        return x


class UNet(nn.Module):
    """ADM U-Net, a network `(x, logsnr, cond) -> raw` of the shape of `x`, zero at initialisation.

    Args:
        in_channels: Channels of the images.
        size: Side of the images; divisible by 2 ** (len(multipliers) - 1).
        channels: Channels at full resolution.
        multipliers: Channels of each level as multiples of `channels`; the resolution halves between levels.
        blocks: Residual blocks a level, one number for all or one for each.
        attention: Sides of the feature maps that have attention after each block, e.g. (16, 8).
        head_channels: Channels of one attention head.
        dropout: Dropout probability in residual blocks.
        dropout_max_side: Largest side of a feature map whose blocks have dropout; None for dropout everywhere.
        num_classes: Number of classes; 0 for a network without, which ignores labels.
        middle_attention: Whether the middle has attention, whatever its side.
        out_channels: Channels of the output; None for those of the images. Twice as many for a learned variance.
        scalars: Names of continuous scalars among the conditions.
        token_width: Width of text tokens, which are attended to wherever pixels are; 0 for none.
        image_channels: Channels of a conditioning image, concatenated to the input; 0 for none.
        checkpointing: Whether to save memory in training by computing activations twice, a block at a time.
        patch: Side of the squares of pixels that become the channels of one point, before the first convolution and
            back after the last: some patch² times cheaper. `attention` then names sides from `size / patch` on.

    Raises:
        ValueError: If `size` cannot be cut and halved often enough, an attention side is not that of any level, or
            `blocks` has not one number a level.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        size: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int | Sequence[int],
        attention: Sequence[int] = (),
        head_channels: int = 64,
        dropout: float = 0.0,
        dropout_max_side: int | None = None,
        num_classes: int = 0,
        middle_attention: bool = True,
        out_channels: int | None = None,
        scalars: Sequence[str] = (),
        token_width: int = 0,
        image_channels: int = 0,
        checkpointing: bool = False,
        patch: int = 1,
    ) -> None:
        super().__init__()
        if size % (patch << (len(multipliers) - 1)):
            cut = "" if patch == 1 else f"cut into patches of {patch} and "
            raise ValueError(
                f"images of side {size} cannot be {cut}halved {len(multipliers) - 1} times; choose another model="
            )
        sides = [size // patch >> level for level in range(len(multipliers))]
        if set(attention) - set(sides):
            raise ValueError(
                f"attention at sides {sorted(set(attention) - set(sides))}, but the levels have sides {sides}; "
                "choose another model="
            )
        counts = [blocks] * len(sides) if isinstance(blocks, int) else list(blocks)
        if len(counts) != len(sides):
            raise ValueError(f"blocks has {len(counts)} numbers, but there are {len(sides)} levels")
        if token_width and not attention and not middle_attention:
            raise ValueError(
                "text is attended to where pixels are, and this network has no attention: attention=[...]"
            )
        width = 4 * channels
        self.checkpointing, self.patch = checkpointing, patch
        self.conditioning = Conditioning(
            features=channels,
            width=width,
            num_classes=num_classes,
            scalars=scalars,
            token_width=token_width,
            image_channels=image_channels,
        )

        def attentions(channels: int) -> tuple[AttentionBlock, CrossAttentionBlock | None]:
            return AttentionBlock(channels=channels, head_channels=head_channels), (
                CrossAttentionBlock(channels=channels, head_channels=head_channels, token_width=token_width)
                if token_width
                else None
            )

        def residual(inputs: int, outputs: int, side: int, change: Resample = "none") -> ResidualBlock:
            return ResidualBlock(
                in_channels=inputs,
                out_channels=outputs,
                embedding=width,
                dropout=dropout if dropout_max_side is None or side <= dropout_max_side else 0.0,
                change=change,
            )

        def stage(inputs: int, outputs: int, side: int, change: Resample = "none") -> Stage:
            block = residual(inputs, outputs, side, change)
            attends = side in attention and change == "none"
            return Stage(block, *(attentions(outputs) if attends else (None, None)))

        self.conv_in = nn.Conv2d((in_channels + image_channels) * patch**2, channels, 3, padding=1)
        self.down, skips, now = nn.ModuleList(), [channels], channels
        for level, (side, multiplier) in enumerate(zip(sides, multipliers, strict=True)):
            for _ in range(counts[level]):
                self.down.append(stage(now, channels * multiplier, side))
                now = channels * multiplier
                skips.append(now)
            if level < len(sides) - 1:
                self.down.append(stage(now, now, side // 2, "down"))
                skips.append(now)
        middle = attentions(now) if middle_attention else (None, None)
        self.middle = nn.ModuleList(
            [Stage(residual(now, now, sides[-1]), *middle), Stage(residual(now, now, sides[-1]), None)]
        )
        self.up = nn.ModuleList()
        for level, (side, multiplier) in reversed(list(enumerate(zip(sides, multipliers, strict=True)))):
            for _ in range(counts[level] + 1):
                self.up.append(stage(now + skips.pop(), channels * multiplier, side))
                now = channels * multiplier
            if level > 0:
                self.up.append(stage(now, now, side * 2, "up"))
        self.norm_out = group_norm(now)
        self.conv_out = zero_init(nn.Conv2d(now, (out_channels or in_channels) * patch**2, 3, padding=1))
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
        tokens = self.conditioning.tokens(cond, x.shape[0])
        x = self.conditioning.with_image(x, cond)
        x = F.pixel_unshuffle(x, self.patch)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for stage in self.down:
            x = run(stage, x, embedding, tokens, checkpointing=self.checkpointing)
            skips.append(x)
        for stage in self.middle:
            x = run(stage, x, embedding, tokens, checkpointing=self.checkpointing)
        for stage in self.up:
            assert isinstance(stage, Stage)
            if stage.block.change == "none":
                x = torch.cat([x, skips.pop()], dim=1)
            x = run(stage, x, embedding, tokens, checkpointing=self.checkpointing)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)
