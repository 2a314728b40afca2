"""What measures share that compare outputs of samples with those of real images, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from diffusion_lab.metrics.collect import Bank, Collect
from diffusion_lab.metrics.features import FEATURES
from diffusion_lab.metrics.measures.base import REAL, REFERENCE, SAMPLES, Sets


@dataclass(frozen=True, kw_only=True)
class OfBanks:
    """A measure of the outputs of at most so many images of each set; a base, not a measure itself.

    Attributes:
        output: The extractor's output that is compared.
        most: Images of each set that are compared, spread evenly where there are more.
    """

    output: str = FEATURES
    most: int = 10_000

    labels = False

    @property
    def bank(self) -> Bank:
        """What it needs of a set."""
        return Bank(self.output, self.most)

    @property
    def must(self) -> Mapping[str, Sequence[Collect]]:
        """See `Measure`."""
        return {SAMPLES: (self.bank,), REFERENCE: (self.bank,)}

    @property
    def may(self) -> Mapping[str, Sequence[Collect]]:
        """See `Measure`."""
        return {REAL: (self.bank,)}

    def rows(self, sets: Sets, part: str) -> Tensor | None:
        """Return the outputs `(m, d)` of a set; None if there is no such set."""
        rows: Tensor | None = sets[part].kept[self.bank].rows if part in sets else None
        return rows
