r"""What was copied from the training set: nearest neighbours of the samples among the training images, in features.

With d_1 <= d_2 the distances of a sample to its nearest and second nearest training image,

    copies            share of the samples with d_1 <= d_2 / 3: one training image is nearer than all others by far
    nearest_train     mean of d_1

The ratio needs no unit, so it means the same for all features; a third is the customary threshold. Beside both stands
the same number for held-out images, which cannot be copies: a model that generalises scores as they do. A mean distance
well below theirs is memorisation; above it, samples are just bad.

What hides copies: a training image that stands in the set twice, nearly but not exactly alike, has d_1 = d_2. And only
`train_most` training images, spread evenly, are searched: with a larger training set the share of copies is a lower
bound, and the mean distance an upper one.

References:
    Yoon et al., "Diffusion Probabilistic Models Generalize when They Fail to Memorize", 2023 (the ratio).
    Gu et al., "On Memorization in Diffusion Models", 2025 (the threshold of 1/3; both on pixels).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusion_lab.metrics.collect import Bank, Collect, Collected
from diffusion_lab.metrics.measures.banks import OfBanks
from diffusion_lab.metrics.measures.base import HELD_OUT, SAMPLES, TRAIN, Quantity, Reading, Sets
from diffusion_lab.metrics.neighbours import nearest

COPIES = Quantity(name="copies", short="copies", better="lower", percent=True)
NEAREST = Quantity(name="nearest_train", short="distance to train", better="higher")


@dataclass(frozen=True, kw_only=True)
class Memorisation(OfBanks):
    """Share of copies, and mean distance to the nearest training image.

    Attributes:
        ratio: A sample is a copy if its nearest training image is nearer than this part of the second nearest's
            distance.
        output: The extractor's output in which neighbours are sought.
        most: Samples that are judged, and held-out images, spread evenly where there are more.
        train_most: Training images that are searched, spread evenly where there are more.

    Raises:
        ValueError: If the ratio is not between 0 and 1.
    """

    ratio: float = 1 / 3
    train_most: int = 50_000

    name = "memorisation"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio must be between 0 and 1, not {self.ratio}")

    @property
    def train_bank(self) -> Bank:
        """What it needs of the training set."""
        return Bank(self.output, self.train_most)

    @property
    def must(self) -> Mapping[str, Sequence[Collect]]:
        """See `Measure`."""
        return {SAMPLES: (self.bank,), TRAIN: (self.train_bank,)}

    @property
    def may(self) -> Mapping[str, Sequence[Collect]]:
        """See `Measure`."""
        return {HELD_OUT: (self.bank,)}

    def __call__(self, sets: Sets) -> list[Reading]:
        """See `Measure`."""
        train = sets[TRAIN]

        def of(judged: Collected) -> tuple[float, float, int]:
            near = nearest(judged.kept[self.bank].rows, train.kept[self.train_bank].rows, 2)
            copies = (near[:, 0] <= self.ratio * near[:, 1]).double().mean()
            return copies.item(), near[:, 0].mean().item(), len(near)

        copies, distance, n = of(sets[SAMPLES])
        real = of(sets[HELD_OUT]) if HELD_OUT in sets else (None, None, None)
        return [
            Reading(quantity=quantity, value=value, n=n, real=floor, real_n=real[2], against=TRAIN)
            for quantity, value, floor in ((COPIES, copies, real[0]), (NEAREST, distance, real[1]))
        ]
