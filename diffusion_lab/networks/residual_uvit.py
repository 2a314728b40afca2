r"""SiD2's residual U-ViT: a U-ViT with one skip connection a level, and that one around the rest of the network.

    h = blocks(x),   g = down(h),   u = inner(g),   h + up(u - g),   then blocks again

What is inside a level corrects what it was given: where it does nothing (u = g) the level is exactly the identity,
because `up` has no bias. So every level, like every block, is a residual; and a level keeps two feature maps for the
way up where U-ViT keeps one for every block, which is what memory is spent on at high resolution.

The innermost level is a stack of transformer blocks; `transformer_levels` says how many of the levels around it have
transformer blocks in place of convolutions too.

The paper's widths and depths are not in our sources; those in `conf/model` are simple diffusion's, and said to be so.
Ports differ in whether every block hears the noise level; here every block does.

References:
    Hoogeboom et al., "Simpler Diffusion (SiD2): 1.5 FID on ImageNet512 with pixel-space diffusion", 2024, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.networks.conditioning import Conditioning
from diffusion_lab.networks.layers import ResidualBlock, Tokens, group_norm, run
from diffusion_lab.networks.vit_blocks import (
    Down,
    Positions,
    TransformerBlock,
    Up,
    check_sides,
    patch_in,
    patch_out,
)
from diffusion_lab.typing import Cond


class Blocks(nn.Module):
    """Blocks of one resolution, one after the other.

    Args:
        blocks: Residual or transformer blocks.
        positions: What tells transformer blocks where they are, or None.
        checkpointing: See `run`.
    """

    def __init__(
        self,
        blocks: Iterable[ResidualBlock | TransformerBlock],
        positions: Positions | None = None,
        *,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.positions = positions
        self.blocks = nn.ModuleList(blocks)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tokens | None = None) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        if self.positions is not None:
            x = self.positions(x)
        for block in self.blocks:
            told = (embedding, tokens) if isinstance(block, TransformerBlock) else (embedding,)
            x = run(block, x, *told, checkpointing=self.checkpointing)
        return x


class Level(nn.Module):
    """One level of the residual U-ViT, and inside it the rest of the network.

    Args:
        before: Blocks on the way down.
        inner: What maps `(x, embedding, tokens)` to the shape of `x` at half the resolution.
        after: Blocks on the way up.
        channels: Channels here.
        inner_channels: Channels inside.
    """

    def __init__(
        self, *, before: Blocks, inner: nn.Module, after: Blocks, channels: int, inner_channels: int
    ) -> None:
        super().__init__()
        self.before, self.inner, self.after = before, inner, after
        self.down, self.up = Down(channels, inner_channels), Up(inner_channels, channels)

    def around(self, h: Tensor, embedding: Tensor, tokens: Tokens | None = None) -> Tensor:
        """Return h + up(u - g), u = inner(g), g = down(h)."""
        g = self.down(h)
        u = self.inner(g, embedding, tokens)
        return h + self.up(u - g)

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tokens | None = None) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        h = self.before(x, embedding, tokens)
        return self.after(self.around(h, embedding, tokens), embedding, tokens)


class ResidualUViT(nn.Module):
    """Residual U-ViT, a network `(x, logsnr, cond) -> raw` of the shape of `x`, zero at initialisation.

    Args:
        in_channels: Channels of the images.
        size: Side of the images; divisible by patch * 2 ** (len(multipliers) - 1).
        patch: Side of the patches that the image is cut into.
        channels: Channels at the first level.
        multipliers: Channels of each level as multiples of `channels`; the resolution halves between levels.
        blocks: For each level but the last, blocks on the way down and as many on the way up; then the number of
            transformer blocks in the middle.
        transformer_levels: How many levels, from the last one on, have transformer blocks; at least 1.
        head_channels: Channels of one attention head.
        embedding: Width of the embedding of noise level and label.
        mlp_ratio: Width of a transformer block's perceptron, in channels.
        dropout: Dropout probability.
        dropout_max_side: Largest side of a feature map whose blocks have dropout; None for dropout everywhere.
        num_classes: Number of classes; 0 for a network without, which ignores labels.
        scalars: Names of continuous scalars among the conditions.
        token_width: Width of text tokens, which every transformer block attends to; 0 for none.
        image_channels: Channels of a conditioning image, concatenated to the input; 0 for none.
        checkpointing: Whether to save memory in training by computing activations twice, a block at a time.

    Raises:
        ValueError: If `size` cannot be cut and halved, `blocks` has not one number a level, or there are not so many
            levels for transformers.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        size: int,
        patch: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: Sequence[int],
        head_channels: int,
        embedding: int,
        transformer_levels: int = 1,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        dropout_max_side: int | None = None,
        num_classes: int = 0,
        scalars: Sequence[str] = (),
        token_width: int = 0,
        image_channels: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sides = check_sides(size, patch, len(multipliers), len(blocks))
        if not 1 <= transformer_levels <= len(sides):
            raise ValueError(f"transformer_levels must be 1 .. {len(sides)}, got {transformer_levels}")
        widths = [channels * multiplier for multiplier in multipliers]
        self.conditioning = Conditioning(
            features=channels,
            width=embedding,
            num_classes=num_classes,
            scalars=scalars,
            token_width=token_width,
            image_channels=image_channels,
        )

        def level(index: int, *, first: bool) -> Blocks:
            width, side = widths[index], sides[index]
            dropped = dropout if dropout_max_side is None or side <= dropout_max_side else 0.0
            if index < len(sides) - transformer_levels:
                convolutions = [
                    ResidualBlock(in_channels=width, out_channels=width, embedding=embedding, dropout=dropped)
                    for _ in range(blocks[index])
                ]
                return Blocks(convolutions, checkpointing=checkpointing)
            transformer = [
                TransformerBlock(
                    channels=width,
                    head_channels=head_channels,
                    embedding=embedding,
                    mlp_ratio=mlp_ratio,
                    dropout=dropped,
                    token_width=token_width,
                )
                for _ in range(blocks[index])
            ]
            positions = Positions(channels=width, side=side) if first else None
            return Blocks(transformer, positions, checkpointing=checkpointing)

        self.conv_in = patch_in(in_channels + image_channels, widths[0], patch)
        body: nn.Module = level(len(sides) - 1, first=True)
        for index in reversed(range(len(sides) - 1)):
            body = Level(
                before=level(index, first=True),
                inner=body,
                after=level(index, first=False),
                channels=widths[index],
                inner_channels=widths[index + 1],
            )
        self.body = body
        self.norm_out = group_norm(widths[0])
        self.conv_out = patch_out(widths[0], in_channels, patch)
        # convolutions run faster with the channels innermost, and tokens are then the same memory
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
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        x = self.body(x, embedding, tokens)
        return self.conv_out(F.silu(self.norm_out(x)))
