r"""What a network is told besides the image: the noise level, and a class label.

    noise level    e(l) = [cos(f_k l), sin(f_k l)]_k,   f_k geometric between two angular frequencies
    label          a table of num_classes + 1 vectors; the last is the null label, for `NO_LABEL` and for no condition

The frequencies are in radians per unit of log-SNR. The slowest turns once over some 60 units, more than any schedule
spans, so levels are never confused; the fastest resolves a few tenths of a unit. At l = ±inf the level is held at the
nearest end of what training can have shown.

References:
    Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (sinusoidal embedding of the noise level).
    Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022 (the null label).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffusion_lab.typing import NO_LABEL, Cond

LOGSNR_LIMIT = 30.0


class LogSNREmbedding(nn.Module):
    """Sinusoidal features of log-SNR, then a two-layer perceptron.

    Args:
        features: Number of sinusoidal features; even.
        width: Width of the output.
        slowest: Smallest angular frequency, radians per unit of log-SNR.
        fastest: Largest one.

    Raises:
        ValueError: If `features` is odd.
    """

    frequencies: Tensor

    def __init__(self, *, features: int, width: int, slowest: float = 0.1, fastest: float = 6.0) -> None:
        super().__init__()
        if features % 2:
            raise ValueError(f"LogSNREmbedding needs an even number of features, got {features}")
        frequencies = torch.logspace(math.log10(slowest), math.log10(fastest), features // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, logsnr: Tensor) -> Tensor:
        """Return `(B, width)` for `logsnr` of shape `(B,)`; infinite levels are allowed."""
        angles = logsnr.float().clamp(-LOGSNR_LIMIT, LOGSNR_LIMIT)[:, None] * self.frequencies
        return self.layers(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedding(nn.Module):
    """A learned vector a class, and one for "no label".

    Args:
        num_classes: Number of classes; labels are 0 .. num_classes - 1.
        width: Width of the output.
    """

    def __init__(self, *, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.table.weight, std=1.0 / math.sqrt(width))

    def forward(self, cond: Cond | None, batch: int) -> Tensor:
        """Return `(batch, width)` for `cond["label"]` `(batch,)`; `None`, no such key and `NO_LABEL` mean no label.

        `cond["label_embedding"]` `(batch, width)`, where it is given, is returned itself.

        Raises:
            ValueError: If a label on the CPU is neither a class nor `NO_LABEL`. On a GPU the embedding's own check on
                the device answers, because reading the labels here would make every step wait; so it does in a
                compiled network, whose graph a look at the labels would break.
        """
        if cond is not None and "label_embedding" in cond:
            return cond["label_embedding"]
        null = self.num_classes
        if cond is None or "label" not in cond:
            label = torch.full((batch,), null, device=self.table.weight.device)
        else:
            label = cond["label"]
            if label.device.type == "cpu" and not torch.compiler.is_compiling():
                low, high = (int(v) for v in label.aminmax())
                if low < NO_LABEL or high >= null:
                    wrong = low if low < NO_LABEL else high
                    raise ValueError(
                        f"label {wrong} is not one of the model's {null} classes (0 .. {null - 1})"
                    )
            label = torch.where(label == NO_LABEL, null, label)
        return self.table(label)
