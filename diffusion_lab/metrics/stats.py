r"""Mean and covariance of a stream of features, in float64, mergeable in any order.

Kept are the count, the mean and the *centred* second moment

    n,    m = (1/n) sum_i f_i,    S = sum_i (f_i - m)(f_i - m)^T,         cov = S / (n - 1).

The textbook shortcut `sum f f^T - n m m^T` subtracts two huge numbers when the mean is large against the spread, and
in float32 loses all digits of the covariance; S never does. Two parts merge by

    d = m_b - m_a,    n = n_a + n_b,    m = m_a + (n_b / n) d,    S = S_a + S_b + (n_a n_b / n) d d^T,

and any number of processes at once by two sums over them: first n and n m, which give the common mean, then

    S_r + n_r (m_r - m)(m_r - m)^T.

Memory is one matrix of the feature dimension, whatever n.

References:
    Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, eq. 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Takes a float64 tensor of this process, returns its sum over all processes; every process must call it."""


class GaussianStats:
    """Streaming count, mean and covariance of feature vectors.

    Args:
        dim: Length of a feature vector; None takes that of the first update. A process that may see no feature at all
            needs it to take part in `all_reduce`.
    """

    def __init__(self, dim: int | None = None) -> None:
        self._n = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None
        if dim is not None:
            self._mean = torch.zeros(dim, dtype=torch.float64)
            self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @classmethod
    def of(cls, mean: Tensor, cov: Tensor) -> GaussianStats:
        """Return statistics with mean `(d,)` and covariance `(d, d)`, as if of two vectors: the number is not known."""
        made = cls()
        made._n, made._mean = 2, mean.to(torch.float64)
        made._scatter = cov.to(torch.float64, copy=True)
        return made

    @property
    def n(self) -> int:
        """Number of feature vectors seen."""
        return self._n

    @property
    def dim(self) -> int:
        """Length of a feature vector.

        Raises:
            ValueError: If it is not known yet.
        """
        return self._moments()[0].shape[0]

    @property
    def mean(self) -> Tensor:
        """The mean `(d,)`, float64.

        Raises:
            ValueError: If no feature was seen.
        """
        if self._n == 0:
            raise ValueError("the mean of no features is undefined")
        return self._moments()[0]

    @property
    def cov(self) -> Tensor:
        """The unbiased covariance `(d, d)`, float64, divided by n - 1.

        Raises:
            ValueError: If fewer than two features were seen.
        """
        if self._n < 2:
            raise ValueError(f"a covariance needs at least two features, there are {self._n}")
        return self._moments()[1] / (self._n - 1)

    def update(self, features: Tensor) -> None:
        """Add features `(N, d)` of any floating-point dtype; N may be 0.

        Raises:
            ValueError: On another shape, another dimension than before, or values that are not finite.
        """
        if features.ndim != 2:
            raise ValueError(f"features must be (N, d), not {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise ValueError("features hold values that are not finite; are the images?")
        wide = features.detach().to(torch.float64)
        count, dim = wide.shape
        if self._mean is None:
            self._mean, self._scatter = wide.new_zeros(dim), wide.new_zeros(dim, dim)
        elif self._mean.shape[0] != dim:
            raise ValueError(f"features of {dim} dimensions cannot join those of {self._mean.shape[0]}")
        if not count:
            return
        mean_a, scatter = (x.to(wide.device) for x in self._moments())
        mean_b, n = wide.mean(dim=0), self._n + count
        delta = mean_b - mean_a
        # both terms of the merge as one product, added in place: the matrix is large, a batch is not
        rows = torch.cat([wide - mean_b, delta[None] * (self._n * count / n) ** 0.5])
        self._scatter = scatter.addmm_(rows.T, rows)
        self._mean = mean_a + (count / n) * delta
        self._n = n

    def merge(self, other: GaussianStats) -> None:
        """Add what `other` has seen.

        Raises:
            ValueError: If the dimensions differ.
        """
        if other._mean is None:
            return
        mean_b, scatter_b = other._moments()
        if self._mean is None:
            self._mean, self._scatter = torch.zeros_like(mean_b), torch.zeros_like(scatter_b)
        mean_a, scatter_a = self._moments()
        if mean_a.shape != mean_b.shape:
            raise ValueError(
                f"features of {mean_b.shape[0]} dimensions cannot join those of {mean_a.shape[0]}"
            )
        n = self._n + other._n
        if n == 0:
            return
        # the device of the newcomer wins: an accumulator made empty on the CPU follows the features to theirs
        mean_a, scatter_a = mean_a.to(mean_b.device), scatter_a.to(mean_b.device)
        delta = mean_b - mean_a
        self._mean = mean_a + (other._n / n) * delta
        self._scatter = scatter_a + scatter_b + (self._n * other._n / n) * torch.outer(delta, delta)
        self._n = n

    def all_reduce(self, reduce: Reduce) -> GaussianStats:
        """Return the statistics of all processes together; this object is left as it is.

        With torch.distributed:

            def reduce(x):
                torch.distributed.all_reduce(x)  # sums in place
                return x

        Args:
            reduce: Sums a float64 tensor over all processes. It is called twice, by every process.

        Raises:
            ValueError: If this process saw no feature and was made without `dim`.
        """
        mean, scatter = self._moments()
        count = mean.new_tensor([float(self._n)])
        sums = reduce(torch.cat([count, self._n * mean]))
        total = round(sums[0].item())
        common = sums[1:] / max(total, 1)
        delta = mean - common
        together = GaussianStats()
        together._n = total
        together._mean = common
        together._scatter = reduce(scatter + self._n * torch.outer(delta, delta))
        return together

    def state_dict(self) -> dict[str, Tensor]:
        """Return the statistics as CPU tensors `n`, `mean`, `scatter`."""
        mean, scatter = self._moments()
        return {"n": torch.tensor(self._n), "mean": mean.cpu().clone(), "scatter": scatter.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the statistics by those of `state_dict`."""
        self._n = int(state["n"])
        self._mean = state["mean"].to(torch.float64, copy=True)
        self._scatter = state["scatter"].to(torch.float64, copy=True)

    def _moments(self) -> tuple[Tensor, Tensor]:
        if self._mean is None or self._scatter is None:
            raise ValueError("the dimension of the features is not known yet: give dim, or update first")
        return self._mean, self._scatter


def gaussian_stats(features: Tensor) -> GaussianStats:
    """Return the statistics of features `(N, d)` that are all in memory."""
    stats = GaussianStats()
    stats.update(features)
    return stats
