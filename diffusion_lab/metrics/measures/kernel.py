r"""The kernel distance of the samples' features to the reference's: KID where the features are the Inception's.

    k(a, b) = (a b / d + 1)^3,    KD = E k(x, x') + E k(y, y') - 2 E k(x, y),

the unbiased estimate of the squared maximum mean discrepancy, x != x', so that unlike the Fréchet distance it does not
depend on n and may fall below zero; averaged over random subsets, whose standard deviation is its spread. The
estimator is torch-fidelity's, with its default seed and in its order of images, on features widened to float64.

Where a set is smaller than a subset should be, the subsets are as large as the set: the estimate stays unbiased, only
the spread is another one. Subsets that would be both sets whole are all the same, and are taken once, without a spread.

References:
    Binkowski et al., "Demystifying MMD GANs", 2018, section 4 (KID).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffusion_lab.metrics.measures.banks import OfBanks
from diffusion_lab.metrics.measures.base import REAL, REFERENCE, SAMPLES, Quantity, Reading, Sets

KERNEL = Quantity(name="kernel", short="KD", published="KID", better="lower")


@dataclass(frozen=True, kw_only=True)
class Kernel(OfBanks):
    """The kernel distance.

    Attributes:
        subsets: Number of subsets.
        size: Images in a subset.
        seed: Draws the subsets.
        output: The extractor's output that is compared.
        most: Images of each set that subsets are drawn from, spread evenly where there are more.

    Raises:
        ValueError: If a number is not positive, or a subset has fewer than two images.
    """

    subsets: int = 100
    size: int = 1000
    seed: int = 2020

    name = "kernel"

    def __post_init__(self) -> None:
        if self.subsets < 1 or self.size < 2:
            raise ValueError(f"{self.subsets} subsets of {self.size} images: one of two images is the least")

    def __call__(self, sets: Sets) -> list[Reading]:
        """See `Measure`."""
        samples, reference, real = (self.rows(sets, part) for part in (SAMPLES, REFERENCE, REAL))
        assert samples is not None and reference is not None
        value, spread = self.distance(samples, reference)
        return [
            Reading(
                quantity=KERNEL,
                value=value,
                spread=spread,
                n=len(samples),
                real=None if real is None else self.distance(real, reference)[0],
                real_n=None if real is None else len(real),
            )
        ]

    def distance(self, first: Tensor, second: Tensor) -> tuple[float, float | None]:
        """Return the distance of features `(N, d)` and `(M, d)`, and its standard deviation over subsets.

        Raises:
            ValueError: If a set has fewer than two rows.
        """
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

        size = min(self.size, len(first), len(second))
        if size < 2:
            raise ValueError(
                f"a kernel distance needs two images of each set, not {len(first)} and {len(second)}"
            )
        subsets = 1 if size == len(first) == len(second) else self.subsets
        found = kid_features_to_metric(
            first.double(),
            second.double(),
            kid_subsets=subsets,
            kid_subset_size=size,
            kid_kernel="poly",
            kid_kernel_poly_degree=3,
            kid_kernel_poly_gamma=None,
            kid_kernel_poly_coef0=1.0,
            rng_seed=self.seed,
            verbose=False,
        )
        return found[KEY_METRIC_KID_MEAN], None if subsets == 1 else found[KEY_METRIC_KID_STD]
