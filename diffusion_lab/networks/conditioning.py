r"""All that a network is told besides the noisy image, in one place: what, in which shape, and what "not given" means.

    noise level      logsnr (B,), or (B, 1, H, W) for one per pixel     added to the embedding
    label            cond["label"] (B,) int64                           added to the embedding; -1: not given
    scalars          cond[name] (B,), about standard normal             added to the embedding; nan: not given
    tokens           cond["text"] (B, L, D), cond["text_mask"] (B, L)   cross-attention; all masked: not given
    image            cond["image"] (B, C', h, w)                        concatenated to the input; zeros: not given

    embedding = silu( level(logsnr) + label(cond) + sum_k scalar_k(cond) )

A network declares which of these it hears; a key that nobody would read is refused, because a sample would look
conditioned and not be. `cond = None` means that nothing is given.

References:
    Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, section 3 (embeddings are added).
    Saharia et al., "Palette: Image-to-Image Diffusion Models", 2022, section 3 (the image is concatenated).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.networks.embeddings import LabelEmbedding, LogSNREmbedding
from diffusion_lab.typing import FOR_WRAPPERS, Cond

LABELS = ("label", "label_embedding")
TEXT, TEXT_MASK, IMAGE = "text", "text_mask", "image"


class ScalarEmbedding(nn.Module):
    """Sinusoidal features of one number an example, then a perceptron; a learned vector where it is not given (nan).

    Args:
        features: Number of sinusoidal features; even.
        width: Width of the output.
    """

    def __init__(self, *, features: int, width: int) -> None:
        super().__init__()
        self.embedding = LogSNREmbedding(features=features, width=width)
        self.null = nn.Parameter(torch.zeros(width))

    def silence(self) -> None:
        """Make it add nothing until it has learnt to: a network that gets it anew answers as it did without."""
        for parameter in self.embedding.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, value: Tensor | None, batch: int) -> Tensor:
        """Return `(batch, width)` for `value` `(batch,)`, or for None."""
        if value is None:
            return self.null.expand(batch, -1)
        missing = torch.isnan(value)
        return torch.where(missing[:, None], self.null, self.embedding(torch.where(missing, 0.0, value)))


class Conditioning(nn.Module):
    """The part of a network that listens.

    Args:
        features: Number of sinusoidal features of the noise level and of scalars; even.
        width: Width of the embedding.
        num_classes: Number of classes; with 0 labels are allowed and ignored.
        scalars: Names of the continuous scalars, keys of a `Cond`.
        token_width: Width D of the tokens of `cond["text"]`; 0 for a network that reads none.
        image_channels: Channels of `cond["image"]`; 0 for a network that sees none.

    Raises:
        ValueError: If a scalar has a name that means something else.
    """

    def __init__(
        self,
        *,
        features: int,
        width: int,
        num_classes: int = 0,
        scalars: Sequence[str] = (),
        token_width: int = 0,
        image_channels: int = 0,
    ) -> None:
        super().__init__()
        taken = {*LABELS, TEXT, TEXT_MASK, IMAGE, *FOR_WRAPPERS} & set(scalars)
        if taken:
            raise ValueError(f"no scalar may be called {min(taken)!r}: that condition is something else")
        self.token_width, self.image_channels = token_width, image_channels
        self.level_embedding = LogSNREmbedding(features=features, width=width)
        self.label_embedding = LabelEmbedding(num_classes=num_classes, width=width) if num_classes else None
        self.scalar_embeddings = nn.ModuleDict(
            {name: ScalarEmbedding(features=features, width=width) for name in scalars}
        )
        self.null_token = nn.Parameter(torch.zeros(token_width)) if token_width else None

    def reads(self) -> list[str]:
        """Keys of a `Cond` that are read, or (labels) known and ignored."""
        text = [TEXT, TEXT_MASK] if self.token_width else []
        return [*LABELS, *self.scalar_embeddings, *text, *([IMAGE] if self.image_channels else [])]

    def check(self, cond: Cond | None, reader: str) -> None:
        """Refuse a condition that nobody would read.

        Args:
            cond: What the network is told; what is meant for wrappers passes.
            reader: The network's name.

        Raises:
            ValueError: If a key is neither read nor meant for wrappers.
        """
        known = self.reads()
        for name in cond or {}:
            if name not in known and name not in FOR_WRAPPERS:
                raise ValueError(f"{reader} knows no condition {name!r}; there are: {', '.join(known)}")

    def forward(self, logsnr: Tensor, cond: Cond | None, batch: int) -> Tensor:
        """Return the embedding, `(B, width)`, or `(B, width, H, W)` for a noise level per pixel.

        Args:
            logsnr: `(B,)`, or `(B, 1, H, W)`; infinite levels are allowed.
            cond: Conditions, or None.
            batch: B.

        Raises:
            ValueError: If a label is out of range, or a level or a scalar has another shape.
        """
        if logsnr.ndim != 1 and (logsnr.ndim != 4 or logsnr.shape[1] != 1):
            raise ValueError(
                f"a noise level must be (B,), or (B, 1, H, W) for one per pixel, got {tuple(logsnr.shape)}"
            )
        told = [] if self.label_embedding is None else [self.label_embedding(cond, batch)]
        for name, scalar in self.scalar_embeddings.items():
            value = None if cond is None else cond.get(name)
            if value is not None and value.shape != (batch,):
                raise ValueError(f"condition {name!r} must have shape ({batch},), got {tuple(value.shape)}")
            told.append(scalar(value, batch))
        if logsnr.ndim == 1:
            embedding = self.level_embedding(logsnr)
        else:
            pixels = logsnr[:, 0]
            embedding = self.level_embedding(pixels.reshape(-1)).reshape(*pixels.shape, -1).movedim(-1, 1)
            told = [vector[:, :, None, None] for vector in told]
        for vector in told:
            embedding = embedding + vector
        return F.silu(embedding)

    def tokens(self, cond: Cond | None, batch: int) -> tuple[Tensor, Tensor] | None:
        """Return tokens `(B, 1 + L, D)` and which of them are there `(B, 1 + L)`; None for a network that reads none.

        The first is learned and always there, so an example whose tokens are all masked still has one to attend to.

        Raises:
            ValueError: If the tokens or their mask have another shape.
        """
        if self.null_token is None:
            return None
        null = self.null_token.expand(batch, 1, -1)
        if cond is None or TEXT not in cond:
            return null, torch.ones(batch, 1, dtype=torch.bool, device=null.device)
        text = cond[TEXT]
        if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != self.token_width:
            raise ValueError(
                f"condition 'text' must have shape ({batch}, L, {self.token_width}), got {tuple(text.shape)}"
            )
        mask = cond.get(TEXT_MASK)
        mask = (
            torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
        )
        if mask.shape != text.shape[:2]:
            raise ValueError(
                f"condition 'text_mask' must have shape {tuple(text.shape[:2])}, got {tuple(mask.shape)}"
            )
        there = torch.ones(batch, 1, dtype=torch.bool, device=text.device)
        return torch.cat([null, text.to(null.dtype)], 1), torch.cat([there, mask], 1)

    def with_image(self, x: Tensor, cond: Cond | None) -> Tensor:
        """Return `x` `(B, C, H, W)` with the channels of `cond["image"]` behind its own, resized to its side.

        Raises:
            ValueError: If the image has another number of channels.
        """
        if not self.image_channels:
            return x
        if cond is None or IMAGE not in cond:
            image = x.new_zeros(x.shape[0], self.image_channels, *x.shape[2:])
        else:
            image = cond[IMAGE].to(x.dtype)
            if image.ndim != 4 or image.shape[:2] != (x.shape[0], self.image_channels):
                raise ValueError(
                    f"condition 'image' must have shape ({x.shape[0]}, {self.image_channels}, h, w), "
                    f"got {tuple(image.shape)}"
                )
            if image.shape[2:] != x.shape[2:]:
                image = F.interpolate(image, size=x.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([x, image], dim=1)
