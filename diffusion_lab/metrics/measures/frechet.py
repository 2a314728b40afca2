r"""The Fréchet distance of the samples' features to the reference's, and that of real images beside it: FID, sFID, FD.

    d^2 = |m_1 - m_2|^2 + tr C_1 + tr C_2 - 2 tr (C_1 C_2)^{1/2}

`metrics/frechet.py` computes it. With the output `spatial` of the Inception network it is the sFID: 7 channels of a
17x17 map as they are, so that where things stand in the image counts.

References:
    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017 (FID).
    Nash et al., "Generating Images with Sparse Representations", 2021, section 4 (sFID).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusion_lab.metrics.collect import Collect, Collected, Moments
from diffusion_lab.metrics.features import FEATURES, SPATIAL
from diffusion_lab.metrics.frechet import frechet_from_stats
from diffusion_lab.metrics.measures.base import REAL, REFERENCE, SAMPLES, Quantity, Reading, Sets

QUANTITIES = {
    FEATURES: Quantity(name="frechet", short="FD", published="FID", better="lower"),
    SPATIAL: Quantity(name="spatial_frechet", short="sFD", published="sFID", better="lower"),
}


@dataclass(frozen=True, kw_only=True)
class Frechet:
    """The Fréchet distance.

    Attributes:
        output: "features", or "spatial".

    Raises:
        ValueError: If the output is another one.
    """

    output: str = FEATURES

    labels = False

    def __post_init__(self) -> None:
        if self.output not in QUANTITIES:
            raise ValueError(f"Frechet compares {' or '.join(QUANTITIES)}, not {self.output!r}")

    @property
    def name(self) -> str:
        """See `Measure`."""
        return QUANTITIES[self.output].name

    @property
    def must(self) -> Mapping[str, Sequence[Collect]]:
        """See `Measure`."""
        return {SAMPLES: (Moments(self.output),), REFERENCE: (Moments(self.output),)}

    @property
    def may(self) -> Mapping[str, Sequence[Collect]]:
        """See `Measure`."""
        return {REAL: (Moments(self.output),)}

    def __call__(self, sets: Sets) -> list[Reading]:
        """See `Measure`."""

        def distance(of: Collected) -> float:
            return frechet_from_stats(of.moments(self.output), sets[REFERENCE].moments(self.output))

        real = sets.get(REAL)
        return [
            Reading(
                quantity=QUANTITIES[self.output],
                value=distance(sets[SAMPLES]),
                n=sets[SAMPLES].n,
                real=None if real is None else distance(real),
                real_n=None if real is None else real.n,
            )
        ]
