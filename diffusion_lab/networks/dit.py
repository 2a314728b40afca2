r"""DiT: a transformer over patches, and the frame that it shares with MM-DiT.

    patches -> linear + position -> blocks -> (1 + scale) norm(h) + shift -> linear -> pixels

Positions are fixed: half of the channels tell the row, half the column, each by sines and cosines of N^(-k) times the
place. The last linear layer and all modulations are zero at initialisation; the blocks' other layers, and what makes
tokens of patches, start as published (`xavier`).

Sizes in the literature (width, depth, heads): S 384, 12, 6; B 768, 12, 12; L 1024, 24, 16; XL 1152, 28, 16, with
patches of 2, 4 or 8. SiT has the same networks.

References:
    Peebles & Xie, "Scalable Diffusion Models with Transformers", 2023, table 1 and section 3.2.
    Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers", 2024.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.networks.conditioning import Conditioning
from diffusion_lab.networks.layers import Tokens, run, zero_init
from diffusion_lab.networks.transformer import DiTBlock, modulated, told, xavier
from diffusion_lab.typing import Cond

FEATURES = 256
"""Sinusoidal features of the noise level, as published."""


def positions(width: int, side: int) -> Tensor:
    """Return fixed positions `(side^2, width)` of a square of tokens.

    Raises:
        ValueError: If `width` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"positions in the plane need a width that is a multiple of 4, got {width}")
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


class PatchTransformer(nn.Module, ABC):
    """From an image to tokens and back; a subclass says what happens to the tokens.

    Args:
        in_channels: Channels of the images.
        size: Side of the images; divisible by `patch`.
        patch: Side of a patch, in pixels.
        width: C, a multiple of 4.
        num_classes: Number of classes; 0 for a network without, which ignores labels.
        out_channels: Channels of the output; None for those of the images.
        scalars: Names of continuous scalars among the conditions.
        token_width: Width of text tokens; 0 for none.
        image_channels: Channels of a conditioning image, concatenated to the input; 0 for none.
        checkpointing: Whether to save memory in training by computing activations twice, a block at a time.

    Raises:
        ValueError: If `size` does not divide into patches, or `width` is no multiple of 4.
    """

    place: Tensor

    def __init__(
        self,
        *,
        in_channels: int,
        size: int,
        patch: int,
        width: int,
        num_classes: int,
        out_channels: int | None,
        scalars: Sequence[str],
        token_width: int,
        image_channels: int,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(
                f"images of side {size} cannot be cut into patches of {patch}; choose another model="
            )
        self.patch, self.side, self.checkpointing = patch, size // patch, checkpointing
        self.conditioning = Conditioning(
            features=FEATURES,
            width=width,
            num_classes=num_classes,
            scalars=scalars,
            token_width=token_width,
            image_channels=image_channels,
        )
        self.patch_in = xavier(nn.Conv2d(in_channels + image_channels, width, patch, stride=patch))
        self.register_buffer("place", positions(width, self.side), persistent=False)
        self.modulation = zero_init(nn.Linear(width, 2 * width))
        self.linear_out = zero_init(nn.Linear(width, patch**2 * (out_channels or in_channels)))

    @abstractmethod
    def transform(self, h: Tensor, embedding: Tensor, tokens: Tokens | None) -> Tensor:
        """Map the image's tokens `(B, N, C)` to the same shape; see `DiTBlock.forward`."""

    def forward(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the raw output, `(B, C, H, W)`.

        Args:
            x: Scaled noisy images `(B, C, H, W)`.
            logsnr: Noise level `(B,)`, or `(B, 1, H, W)` for one per pixel; a patch has the mean of its embeddings.
            cond: See `Conditioning`.

        Raises:
            ValueError: If the images have another side, or a condition is out of range, of a wrong shape, or unknown.
        """
        if x.shape[2:] != (self.side * self.patch,) * 2:
            raise ValueError(
                f"{type(self).__name__} is built for images of side {self.side * self.patch}, got {tuple(x.shape)}"
            )
        self.conditioning.check(cond, type(self).__name__)
        embedding = self.conditioning(logsnr, cond, x.shape[0])
        if embedding.ndim == 4:
            embedding = F.adaptive_avg_pool2d(embedding, (self.side, self.side)).flatten(2).transpose(1, 2)
        tokens = self.conditioning.tokens(cond, x.shape[0])
        h = self.patch_in(self.conditioning.with_image(x, cond)).flatten(2).transpose(1, 2)
        # channels innermost: a residual stream in any other order would be copied by every norm
        h = h.contiguous() + self.place
        h = self.transform(h, embedding, tokens)
        assert isinstance(self.modulation, nn.Linear)
        out = self.linear_out(modulated(h, *told(self.modulation, embedding, 2)))
        # (B, side side, patch patch C) -> (B, C, side patch, side patch)
        out = out.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (self.side, self.side))
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class DiT(PatchTransformer):
    """A network `(x, logsnr, cond) -> raw` of the shape of `x`, zero at initialisation.

    Args:
        in_channels: See `PatchTransformer`; so the others that are not named here.
        size: See there.
        patch: See there.
        width: See there.
        depth: Number of blocks.
        heads: Number of attention heads.
        mlp_ratio: Width of the perceptrons' inner layer, in `width`.
        dropout: Probability of dropping one of their activations.
        qk_norm: Whether queries and keys are normalised; not in the paper.
        num_classes: See there.
        out_channels: See there.
        scalars: See there.
        token_width: See there; text is attended to in every block.
        image_channels: See there.
        checkpointing: See there.

    Raises:
        ValueError: If sizes do not divide.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        qk_norm: bool = False,
        num_classes: int = 0,
        out_channels: int | None = None,
        scalars: Sequence[str] = (),
        token_width: int = 0,
        image_channels: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            size=size,
            patch=patch,
            width=width,
            num_classes=num_classes,
            out_channels=out_channels,
            scalars=scalars,
            token_width=token_width,
            image_channels=image_channels,
            checkpointing=checkpointing,
        )
        self.blocks = nn.ModuleList(
            DiTBlock(
                width=width,
                heads=heads,
                embedding=width,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                qk_norm=qk_norm,
                token_width=token_width,
            )
            for _ in range(depth)
        )

    def transform(self, h: Tensor, embedding: Tensor, tokens: Tokens | None) -> Tensor:
        """See `PatchTransformer.transform`."""
        for block in self.blocks:
            h = run(block, h, embedding, tokens, checkpointing=self.checkpointing)
        return h
