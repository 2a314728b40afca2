r"""Fidelity apart from diversity: precision and recall, density and coverage of the samples' features.

`metrics/neighbours.py` computes them, and says what they are. They depend on the number of points: the value of real
images beside each is taken with as many of them, against the same reference.

References:
    Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019.
    Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffusion_lab.metrics.collect import Collected
from diffusion_lab.metrics.measures.banks import OfBanks
from diffusion_lab.metrics.measures.base import REAL, REFERENCE, SAMPLES, Quantity, Reading, Sets
from diffusion_lab.metrics.neighbours import Manifolds, manifolds

QUANTITIES = (
    Quantity(name="precision", short="precision", better="higher", percent=True),
    Quantity(name="recall", short="recall", better="higher", percent=True),
    Quantity(name="density", short="density", better="higher"),
    Quantity(name="coverage", short="coverage", better="higher", percent=True),
)


@dataclass(frozen=True, kw_only=True)
class PRDC(OfBanks):
    """Precision, recall, density and coverage.

    Attributes:
        k: Neighbours of precision and recall; 3 in the paper.
        k_density: Neighbours of density and coverage; 5 in the paper.
        output: The extractor's output that is compared.
        most: Images of each set that are compared, spread evenly where there are more.
    """

    k: int = 3
    k_density: int = 5

    name = "prdc"

    def __call__(self, sets: Sets) -> list[Reading]:
        """See `Measure`."""

        def of(judged: Collected) -> tuple[Manifolds, int]:
            rows = judged.kept[self.bank].rows
            found = manifolds(rows, sets[REFERENCE].kept[self.bank].rows, k=self.k, k_density=self.k_density)
            return found, len(rows)

        values, n = of(sets[SAMPLES])
        real, real_n = of(sets[REAL]) if REAL in sets else ((None,) * len(QUANTITIES), None)
        return [
            Reading(quantity=quantity, value=value, n=n, real=floor, real_n=real_n)
            for quantity, value, floor in zip(QUANTITIES, values, real, strict=True)
        ]
