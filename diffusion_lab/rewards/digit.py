r"""How surely a picture of a digit is seen as the one that was asked for.

    r(x0) = log p(label | x0)

under the packaged classifier of the pictures' size: that of the 8x8 digits, or that of MNIST. Its features are those
that `metrics=digits` and `metrics=mnist` measure with, so a distance in them is no independent judge of what this
reward has made.
"""

from __future__ import annotations

from torch import Tensor

from diffusion_lab.metrics.features import MNISTCNN, CNNFeatures, DigitsCNN
from diffusion_lab.rewards.classifier import ClassLogProbability
from diffusion_lab.typing import Cond

KINDS: dict[tuple[int, ...], type[DigitsCNN] | type[MNISTCNN]] = {(1, 8, 8): DigitsCNN, (1, 28, 28): MNISTCNN}


class DigitProbability:
    """log p(label | x0) in nats, with a gradient.

    Args:
        label: The digit; None takes each sample's own, `cond["label"]`.

    Raises:
        ValueError: If (at call) the pictures are of no size that there is a classifier for, or there is no label.
    """

    def __init__(self, *, label: int | None = None) -> None:
        self.label = label
        self._extractor: CNNFeatures | None = None

    def __call__(self, x0: Tensor, cond: Cond | None = None) -> Tensor:
        """Return `(B,)`, at most 0, for `x0` `(B, 1, 8, 8)` or `(B, 1, 28, 28)` in [-1, 1]."""
        return ClassLogProbability(classifier=self._logits, label=self.label)(x0, cond)

    def _logits(self, x0: Tensor) -> Tensor:
        kind = KINDS.get(tuple(x0.shape[1:]))
        if kind is None:
            raise ValueError(f"the reward knows digits of 1x8x8 and 1x28x28, not {tuple(x0.shape[1:])}")
        if not isinstance(self._extractor, kind):
            self._extractor = kind().to(x0.device)
        logits: Tensor = self._extractor.network(x0.float())[1]
        return logits
