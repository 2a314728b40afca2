r"""The share of the samples that a classifier recognises as the class they were asked for.

Beside it stands the share of the real reference images that it recognises, the ceiling. A label below 0 asks for
nothing and is not judged.

References:
    Ravuri & Vinyals, "Classification Accuracy Score for Conditional Generative Models", 2019, trains a classifier on
    samples instead; this is the simpler question to one that was trained on real images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.metrics.collect import Batch, Collect
from diffusion_lab.metrics.features import LOGITS
from diffusion_lab.metrics.measures.base import REFERENCE, SAMPLES, Quantity, Reading, Sets
from diffusion_lab.metrics.stats import Reduce

ACCURACY = Quantity(name="accuracy", short="accuracy", better="higher", percent=True)


@dataclass(frozen=True)
class Answers:
    """Keep how many images were asked for by class, and how many of them are recognised."""

    asks = True

    @property
    def wants(self) -> tuple[str, ...]:
        """See `Collect`."""
        return (LOGITS,)

    def start(self, n: int, dims: Mapping[str, int]) -> AnswersCollector:
        """See `Collect`."""
        return AnswersCollector()


class AnswersCollector:
    """Collector of `Answers`.

    Attributes:
        counts: Right answers and questions, float64.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2, dtype=torch.float64)

    def update(self, batch: Batch) -> None:
        """See `Collector`."""
        if batch.labels is not None:
            labels = batch.labels.cpu()
            asked = labels >= 0
            right = (batch.outputs[LOGITS].argmax(dim=1).cpu() == labels) & asked
            self.counts += torch.stack([right.sum(), asked.sum()])

    def merge(self, other: AnswersCollector) -> None:
        """See `Collector`."""
        self.counts = self.counts + other.counts

    def all_reduce(self, reduce: Reduce) -> AnswersCollector:
        """See `Collector`."""
        together = AnswersCollector()
        together.counts = reduce(self.counts.clone()).cpu()
        return together

    def state_dict(self) -> dict[str, Tensor]:
        """See `Collector`."""
        return {"counts": self.counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Collector`."""
        self.counts = state["counts"]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The share of samples that show the class asked for."""

    name = "accuracy"
    labels = True

    @property
    def must(self) -> Mapping[str, Sequence[Collect]]:
        """See `Measure`."""
        return {SAMPLES: (Answers(),)}

    @property
    def may(self) -> Mapping[str, Sequence[Collect]]:
        """See `Measure`."""
        return {REFERENCE: (Answers(),)}

    def __call__(self, sets: Sets) -> list[Reading]:
        """See `Measure`."""
        right, asked = sets[SAMPLES].kept[Answers()].counts.tolist()
        if not asked:
            return []
        of_reference = sets[REFERENCE].kept.get(Answers()) if REFERENCE in sets else None
        real_right, real_asked = (0.0, 0.0) if of_reference is None else of_reference.counts.tolist()
        return [
            Reading(
                quantity=ACCURACY,
                value=right / asked,
                n=round(asked),
                real=real_right / real_asked if real_asked else None,
                real_n=round(real_asked) or None,
            )
        ]
