r"""simple diffusion's U-ViT: convolutions where feature maps are large, a transformer where they are small.

    x -> patches -> [ residual blocks, down ] -> ... -> transformer blocks -> ... -> [ up, residual blocks ] -> patches
                        |____________ one skip connection for every residual block, concatenated ___________|

Where there is attention the convolutions become perceptrons, so the middle is a plain transformer: no skip connections
inside, only residuals. Large images are cut into patches at once, so that no feature map has a side of more than some
128. Dropout stays away from large feature maps.

The paper's two-billion parameter network is `channels=128, multipliers=(1, 2, 4, 16), blocks=(2, 2, 2, 36)` with four
heads and an embedding of 1024, on feature maps of side 128: patches of 1, 2 and 4 pixels for images of side 128, 256
and 512. Not stated in our sources, and chosen here: normalised queries and keys, learned positions, 1x1 convolutions in
`down` and `up`.

References:
    Hoogeboom, Heek & Salimans, "simple diffusion: End-to-end diffusion for high resolution images", 2023, section 3
    and appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.networks.conditioning import Conditioning
from diffusion_lab.networks.layers import ResidualBlock, group_norm, run
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


class UViT(nn.Module):
    """U-ViT, a network `(x, logsnr, cond) -> raw` of the shape of `x`, zero at initialisation.

    Args:
        in_channels: Channels of the images.
        size: Side of the images; divisible by patch * 2 ** (len(multipliers) - 1).
        patch: Side of the patches that the image is cut into.
        channels: Channels at the first level.
        multipliers: Channels of each level as multiples of `channels`; the resolution halves between levels.
        blocks: For each level but the last, residual blocks on the way down and as many on the way up; then the number
            of transformer blocks.
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
        ValueError: If `size` cannot be cut and halved, or `blocks` has not one number a level.
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
        widths = [channels * multiplier for multiplier in multipliers]
        self.checkpointing = checkpointing
        self.conditioning = Conditioning(
            features=channels,
            width=embedding,
            num_classes=num_classes,
            scalars=scalars,
            token_width=token_width,
            image_channels=image_channels,
        )

        def dropped(side: int) -> float:
            return dropout if dropout_max_side is None or side <= dropout_max_side else 0.0

        def level(inputs: int, index: int) -> nn.ModuleList:
            return nn.ModuleList(
                ResidualBlock(
                    in_channels=inputs,
                    out_channels=widths[index],
                    embedding=embedding,
                    dropout=dropped(sides[index]),
                )
                for _ in range(blocks[index])
            )

        above = range(len(widths) - 1)
        self.conv_in = patch_in(in_channels + image_channels, widths[0], patch)
        self.down = nn.ModuleList(level(widths[i], i) for i in above)
        self.halvings = nn.ModuleList(Down(widths[i], widths[i + 1]) for i in above)
        self.positions = Positions(channels=widths[-1], side=sides[-1])
        self.middle = nn.ModuleList(
            TransformerBlock(
                channels=widths[-1],
                head_channels=head_channels,
                embedding=embedding,
                mlp_ratio=mlp_ratio,
                dropout=dropped(sides[-1]),
                token_width=token_width,
            )
            for _ in range(blocks[-1])
        )
        self.doublings = nn.ModuleList(Up(widths[i + 1], widths[i]) for i in above)
        self.up = nn.ModuleList(level(2 * widths[i], i) for i in above)
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
        skips = []
        for level, halve in zip(self.down, self.halvings, strict=True):
            assert isinstance(level, nn.ModuleList)
            for block in level:
                x = run(block, x, embedding, checkpointing=self.checkpointing)
                skips.append(x)
            x = halve(x)
        x = self.positions(x)
        for block in self.middle:
            x = run(block, x, embedding, tokens, checkpointing=self.checkpointing)
        for level, double in zip(reversed(list(self.up)), reversed(list(self.doublings)), strict=True):
            assert isinstance(level, nn.ModuleList)
            x = double(x)
            for block in level:
                x = torch.cat([x, skips.pop()], dim=1)
                x = run(block, x, embedding, checkpointing=self.checkpointing)
        return self.conv_out(F.silu(self.norm_out(x)))
