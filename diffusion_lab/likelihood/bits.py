r"""From nats to bits per dimension, and from single images to a mean with its interval.

Models of images are often densities p(y) of real numbers, while an image has D values on levels that lie w apart. They
meet by adding noise u from the bin of a level, [-w/2, w/2)^D. What the model says of the level itself is the integral

    P(x) = ∫ over the bin of p(x + u) du = E_{u ~ q(. | x)} [ p(x + u) / q(u | x) ],          q any law on the bin,
    -log P(x) <= E_q [ log q(u | x) - log p(x + u) ]                                          (Jensen),

and with the uniform law, q = w^-D, so that nats of the density become bits of the levels by

    bits/dim = ( -log p(x + u) / D - log w ) / log 2.

The unit of the data is in w: 256 levels on [0, 1] have w = 1/256 and -log2 w = 8, VDM's on [-1, 1] w = 2/256 and 7, the
house's, level k at 2k/255 - 1, w = 2/255 and log2(127.5) = 6.994. The same density in other units (y = a y') differs by
D log a, which w takes back.

The interval is that of a mean of independent images, Student's: mean ± t(n - 1) s / sqrt(n). It holds what a further
set of images would change, and the noise of every image's own estimate.

References:
    Theis, van den Oord & Bethge, "A note on the evaluation of generative models", 2016, section 3.1 (the bound).
    Ho et al., "Flow++", 2019, section 3.1 (any q).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats
from torch import Tensor

from diffusion_lab.losses.vlb_terms import bits


def bits_per_dim(nll: Tensor, dims: int, bin_width: float) -> Tensor:
    """Return bits per dimension of data on levels, from the density of the data with uniform noise added.

    Args:
        nll: -log p(x + u) of all dimensions together, in nats, any shape; u uniform on the bins.
        dims: D, the number of dimensions.
        bin_width: w, the distance of neighbouring levels, in the unit of the density.

    Raises:
        ValueError: If `dims` or `bin_width` is not positive.
    """
    if dims < 1 or not 0.0 < bin_width < math.inf:
        raise ValueError(f"bits_per_dim needs dims >= 1 and a bin_width > 0, got {dims} and {bin_width}")
    return bits(nll / dims - math.log(bin_width))


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over independent images.

    Attributes:
        mean: The mean.
        standard_error: s / sqrt(n); nan for a single image.
        half_width: Half the 95 % confidence interval; nan for a single image.
        n: Number of images.
    """

    mean: float
    standard_error: float
    half_width: float
    n: int


def interval(values: Tensor, confidence: float = 0.95) -> Interval:
    """Return mean, standard error and confidence interval of one value an image, `(n,)`.

    Raises:
        ValueError: If there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    values = values.double()
    error = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    quantile = float(stats.t.ppf(0.5 + 0.5 * confidence, n - 1)) if n > 1 else math.nan
    return Interval(mean=float(values.mean()), standard_error=error, half_width=quantile * error, n=n)
