r"""The classifier whose features score small grey images: a few convolutions, one linear embedding, one linear head.

    images in [-1, 1]  --[conv, SiLU, conv, SiLU, halve] x stages-->  flatten  --linear-->  features --linear--> logits

The features are linear in the last hidden layer, hence closer to a Gaussian than rectified ones, and after training
they are shifted and scaled to mean 0 and variance 1 over the training images (`standardise` folds that into the
linear layers and leaves the logits as they were). A Fréchet distance is thus in units of the data's own variance per
feature. There is neither dropout nor batch normalisation: the network is the same function in training and evaluation
mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """A small classifier of grey square images.

    Args:
        size: Side of the images.
        channels: Channels of each stage; each but its convolutions halves the side (rounding up).
        dim: Number of features.
        classes: Number of classes.
    """

    def __init__(self, *, size: int, channels: Sequence[int], dim: int, classes: int = 10) -> None:
        super().__init__()
        self.size = size
        layers: list[nn.Module] = []
        before, side = 1, size
        for width in channels:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
            layers += [nn.AvgPool2d(2, ceil_mode=True)]
            before, side = width, -(-side // 2)
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.embed = nn.Linear(before * side * side, dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images `(N, 1, size, size)` in [-1, 1] to features `(N, dim)` and logits `(N, classes)`."""
        features = self.embed(self.trunk(x))
        return features, self.head(features)

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Give the features mean 0 and variance 1 over those given `(N, dim)`, without changing the logits.

        f' = (f - m) / s needs the embedding's rows over s and its bias (b - m) / s; the head takes W s and c + W m.
        """
        mean, std = features.mean(dim=0), features.std(dim=0)
        self.head.bias.add_(self.head.weight @ mean)
        self.head.weight.mul_(std)
        self.embed.bias.copy_((self.embed.bias - mean) / std)
        self.embed.weight.div_(std[:, None])
