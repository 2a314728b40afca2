r"""The log-probability of a class under a classifier of clean samples.

    r(x0) = log softmax(f(x0))_c

With a perfect classifier, and lambda = 1, steering an unconditional model by it samples p(x0 | c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.typing import NO_LABEL, Cond


@dataclass(frozen=True, kw_only=True)
class ClassLogProbability:
    """log p(class | x0).

    Attributes:
        classifier: From clean samples `(B, *D)` to logits `(B, classes)`.
        label: The class; None takes each sample's own, `cond["label"]`, where `NO_LABEL` earns 0.

    Raises:
        ValueError: If (at call) there is no label, or one that the classifier does not know.
    """

    classifier: Callable[[Tensor], Tensor]
    label: int | None = None

    def __call__(self, x0: Tensor, cond: Cond | None = None) -> Tensor:
        """Return `(B,)` in nats, at most 0."""
        if self.label is not None:
            label = torch.full((len(x0),), self.label, device=x0.device)
        elif cond is not None and "label" in cond:
            label = cond["label"].to(x0.device)
        else:
            raise ValueError('ClassLogProbability needs a class: its argument label, or cond["label"]')
        logits = self.classifier(x0)
        given = label != NO_LABEL
        if bool((given & ((label < 0) | (label >= logits.shape[1]))).any()):
            raise ValueError(
                f"the classifier knows the classes 0 .. {logits.shape[1] - 1}, got {label.tolist()}"
            )
        log_p = torch.log_softmax(logits, dim=1).gather(1, torch.where(given, label, 0)[:, None])[:, 0]
        return torch.where(given, log_p, torch.zeros_like(log_p))
