r"""VDM's U-Net: for likelihood, all of it at full resolution, and with eyes for the last bit of a pixel.

    x -> [x, sin(2^n π x), cos(2^n π x)] -> conv -> blocks -> block, attention, block -> blocks -> norm, conv -> F
                                              |______ one skip connection for every block, concatenated ______|

VDM's 8-bit data have their levels 2^-7 apart, at 2 (k + 1/2) / 256 - 1, so with n in {7, 8} the phase 2^n π x turns by
half a turn and by a whole one between neighbours: at low noise the features show which level a pixel has, which a
convolution of x cannot. For that they must be features of data in their own scale. The network sees c_in x
(`NetworkDenoiser`), which is the variance-preserving process's x itself where sigma_data = 1, and about x0 at low
noise, in every interpolant; with any other sigma_data the frequencies would mean something else. This library's bytes
lie at 2 k / 255 - 1, which 255/256 of x puts where VDM's lie.

The published network returns F + x as its estimate of eps. That is a prediction type, not a matter of the network,
which like all of ours is zero at initialisation: F stands for eps - c_in x = (1 - sigma) eps - alpha x0 in the
variance-preserving process. (With prediction v, also F = 0 gives eps_hat = sigma x, almost the same at high noise.)
And the embedding of the noise level scales and shifts here, as in our other networks; there it is added.

Sizes: `channels=128, blocks=32` for CIFAR-10, `channels=256, blocks=32` for ImageNet 32x32, `blocks=64` for 64x64;
dropout 0.1. It has no downsampling, so images may have any side.

References:
    Kingma et al., "Variational Diffusion Models", 2021, section 4.5 and appendix B, C (Fourier features).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.networks.conditioning import Conditioning
from diffusion_lab.networks.layers import (
    AttentionBlock,
    CrossAttentionBlock,
    ResidualBlock,
    group_norm,
    run,
    zero_init,
)
from diffusion_lab.networks.unet import Stage
from diffusion_lab.typing import Cond

BYTES = 255.0 / 256.0
"""From this library's bytes, 2 k / 255 - 1, to VDM's, 2 (k + 1/2) / 256 - 1, for which the frequencies are made."""


def fourier_features(x: Tensor, exponents: Sequence[int]) -> Tensor:
    """Return sin(2^n π x) and cos(2^n π x) for each n of `exponents`, `(B, 2 C len(exponents), H, W)`.

    In float32 or better, because in half precision the phases of large n would be nothing but rounding.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    phases = torch.cat([wide * (2.0**n * math.pi) for n in exponents], dim=1)
    return torch.cat([phases.sin(), phases.cos()], dim=1).to(x.dtype)


class VDMUNet(nn.Module):
    """VDM's U-Net, a network `(x, logsnr, cond) -> raw` of the shape of `x`, zero at initialisation.

    Args:
        in_channels: Channels of the images.
        channels: Channels of all feature maps.
        blocks: Residual blocks on the way down; one more on the way up.
        fourier: Exponents n of the Fourier features; none for a network without.
        dropout: Dropout probability in every residual block.
        num_classes: Number of classes; 0 for a network without, which ignores labels.
        scalars: Names of continuous scalars among the conditions.
        token_width: Width of text tokens, which the middle attends to; 0 for none.
        image_channels: Channels of a conditioning image, concatenated to the input; 0 for none.
        checkpointing: Whether to save memory in training by computing activations twice, a block at a time.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        blocks: int,
        fourier: Sequence[int] = (7, 8),
        dropout: float = 0.0,
        num_classes: int = 0,
        scalars: Sequence[str] = (),
        token_width: int = 0,
        image_channels: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        width = 4 * channels
        self.fourier, self.checkpointing = tuple(fourier), checkpointing
        self.conditioning = Conditioning(
            features=channels,
            width=width,
            num_classes=num_classes,
            scalars=scalars,
            token_width=token_width,
            image_channels=image_channels,
        )

        def residual(inputs: int) -> ResidualBlock:
            return ResidualBlock(in_channels=inputs, out_channels=channels, embedding=width, dropout=dropout)

        seen = in_channels * (1 + 2 * len(self.fourier)) + image_channels
        self.conv_in = nn.Conv2d(seen, channels, 3, padding=1)
        self.down = nn.ModuleList(residual(channels) for _ in range(blocks))
        attends = AttentionBlock(channels=channels, head_channels=channels)
        cross = (
            CrossAttentionBlock(channels=channels, head_channels=channels, token_width=token_width)
            if token_width
            else None
        )
        self.middle = nn.ModuleList(
            [Stage(residual(channels), attends, cross), Stage(residual(channels), None)]
        )
        self.up = nn.ModuleList(residual(2 * channels) for _ in range(blocks + 1))
        self.norm_out = group_norm(channels)
        self.conv_out = zero_init(nn.Conv2d(channels, in_channels, 3, padding=1))
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
        if self.fourier:
            x = torch.cat([x, fourier_features(BYTES * x, self.fourier)], dim=1)
        x = self.conditioning.with_image(x, cond)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in self.down:
            x = run(block, x, embedding, checkpointing=self.checkpointing)
            skips.append(x)
        for stage in self.middle:
            x = run(stage, x, embedding, tokens, checkpointing=self.checkpointing)
        for block in self.up:
            x = run(block, torch.cat([x, skips.pop()], dim=1), embedding, checkpointing=self.checkpointing)
        return self.conv_out(F.silu(self.norm_out(x)))
