"""A matrix as a measurement: the operator on which posterior samplers are proved."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Linear:
    """y = A x0 of vectors.

    Attributes:
        matrix: A `(m, n)`.

    Raises:
        ValueError: If `matrix` has not two axes, or (at call) samples are not `(B, n)`.
    """

    matrix: Tensor

    linear = True

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2:
            raise ValueError(f"Linear needs a matrix (m, n), got {tuple(self.matrix.shape)}")

    def __call__(self, x0: Tensor) -> Tensor:
        """Return A x0 `(B, m)` of `x0` `(B, n)`."""
        if x0.ndim != 2 or x0.shape[1] != self.matrix.shape[1]:
            raise ValueError(f"Linear measures vectors (B, {self.matrix.shape[1]}), got {tuple(x0.shape)}")
        # a sum for each entry, not a matrix product: the latter may round a row otherwise in another batch
        return (x0[:, None, :] * self.matrix.to(x0)).sum(-1)
