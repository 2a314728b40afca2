r"""The Inception Score: are the images of one class each, and of all classes together?

    IS = exp( mean_i KL( p(class | x_i) || mean_j p(class | x_j) ) )

within each of 10 parts of the set, mean and standard deviation over the parts. No real images enter; those that stand
in for samples give the ceiling at the same n. With the scores of the Inception network (without their bias, as
customary) it is the published number; with another classifier it counts that one's classes.

A part is known by the index of the image: part s holds the images [s n / 10, (s + 1) n / 10) of a fixed random order,
torch-fidelity's. For each are
kept its number of images, sum_i p_i and sum_i p_i log p_i, since

    mean_i KL(p_i || q) = mean_i sum p_i log p_i - sum q log q,    q = mean_i p_i,

so that memory does not grow with n. torch-fidelity gives the same number, but needs all scores at once; it shuffles
them first unless told not to. The score grows with the number of images in a part, so only equal n compare.

References:
    Salimans et al., "Improved Techniques for Training GANs", 2016, section 4.
    Barratt & Sharma, "A Note on the Inception Score", 2018, on what it does not tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.metrics.collect import Batch, Collect
from diffusion_lab.metrics.features import LOGITS
from diffusion_lab.metrics.measures.base import REAL, SAMPLES, Quantity, Reading, Sets
from diffusion_lab.metrics.stats import Reduce

SHUFFLE = 2020
"""Seed of torch-fidelity's order."""
SCORE = Quantity(name="inception_score", short="IS", better="higher")


@dataclass(frozen=True)
class Classes:
    """Keep how sure a classifier is of each image, and which classes it sees in each part of the set.

    Attributes:
        splits: Number of parts; as many as images where there are fewer.
    """

    splits: int = 10

    asks = False

    @property
    def wants(self) -> tuple[str, ...]:
        """See `Collect`."""
        return (LOGITS,)

    def start(self, n: int, dims: Mapping[str, int]) -> ClassesCollector:
        """See `Collect`."""
        return ClassesCollector(n, min(self.splits, max(n, 1)), dims[LOGITS])


class ClassesCollector:
    """Collector of `Classes`.

    Attributes:
        counts: `(splits,)` images of each part, float64.
        classes: `(splits, K)` sums of the probabilities, float64.
        certainty: `(splits,)` sums of p log p, float64.
    """

    def __init__(self, n: int, splits: int, classes: int) -> None:
        # torch-fidelity's own order: a set sorted by class would have parts of few classes each
        order = torch.from_numpy(np.random.RandomState(SHUFFLE).permutation(n))
        self.place = torch.empty(n, dtype=torch.int64).scatter_(0, order, torch.arange(n))
        self.ends = torch.tensor([(s + 1) * n // splits for s in range(splits)], dtype=torch.int64)
        self.counts = torch.zeros(splits, dtype=torch.float64)
        self.classes = torch.zeros(splits, classes, dtype=torch.float64)
        self.certainty = torch.zeros(splits, dtype=torch.float64)

    def update(self, batch: Batch) -> None:
        """See `Collector`."""
        part = torch.searchsorted(self.ends, self.place[batch.index.cpu()], right=True)
        log_p = batch.outputs[LOGITS].detach().double().log_softmax(dim=1).cpu()
        p = log_p.exp()
        self.counts.index_add_(0, part, torch.ones(len(part), dtype=torch.float64))
        self.classes.index_add_(0, part, p)
        self.certainty.index_add_(0, part, (p * log_p).sum(dim=1))

    def merge(self, other: ClassesCollector) -> None:
        """See `Collector`."""
        self.counts = self.counts + other.counts
        self.classes = self.classes + other.classes
        self.certainty = self.certainty + other.certainty

    def all_reduce(self, reduce: Reduce) -> ClassesCollector:
        """See `Collector`."""
        together = ClassesCollector(0, len(self.counts), 0)
        together.ends = self.ends
        together.counts = reduce(self.counts.clone()).cpu()
        together.classes = reduce(self.classes.clone()).cpu()
        together.certainty = reduce(self.certainty.clone()).cpu()
        return together

    def state_dict(self) -> dict[str, Tensor]:
        """See `Collector`."""
        return {
            "ends": self.ends.clone(),
            "counts": self.counts.clone(),
            "classes": self.classes.clone(),
            "certainty": self.certainty.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Collector`."""
        self.ends, self.counts = state["ends"], state["counts"]
        self.classes, self.certainty = state["classes"], state["certainty"]

    @property
    def scores(self) -> Tensor:
        """The score of each part that holds images, float64."""
        seen = self.counts > 0
        n, q = self.counts[seen], self.classes[seen] / self.counts[seen, None]
        return (self.certainty[seen] / n - torch.xlogy(q, q).sum(dim=1)).exp()


@dataclass(frozen=True, kw_only=True)
class InceptionScore:
    """The Inception Score.

    Attributes:
        splits: Number of parts that the set is cut into.

    Raises:
        ValueError: If there is none.
    """

    splits: int = 10

    name = "inception_score"
    labels = False

    def __post_init__(self) -> None:
        if self.splits < 1:
            raise ValueError(f"splits must be positive, not {self.splits}")

    @property
    def must(self) -> Mapping[str, Sequence[Collect]]:
        """See `Measure`."""
        return {SAMPLES: (Classes(self.splits),)}

    @property
    def may(self) -> Mapping[str, Sequence[Collect]]:
        """See `Measure`."""
        return {REAL: (Classes(self.splits),)}

    def __call__(self, sets: Sets) -> list[Reading]:
        """See `Measure`."""
        what, real = Classes(self.splits), sets.get(REAL)
        scores = sets[SAMPLES].kept[what].scores
        return [
            Reading(
                quantity=SCORE,
                value=scores.mean().item(),
                spread=scores.std(correction=0).item() if len(scores) > 1 else None,
                n=sets[SAMPLES].n,
                real=None if real is None else real.kept[what].scores.mean().item(),
                real_n=None if real is None else real.n,
            )
        ]
