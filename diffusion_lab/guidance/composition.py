r"""Composition: several conditions at once, each with a weight, and some of them with a minus sign.

    x0_hat = x0_uncond + sum_i w_i (x0_i - x0_uncond),        x0_i = E[x0 | x, label_i]

which is the score of p(x) prod_i [p(x | label_i) / p(x)]^(w_i) at each noise level: AND for positive weights, NOT for a
negative one beside them. One label of weight w is classifier-free guidance of scale w, to the bit. Labels of weight 0
are not asked about, nor is the unconditional model where the weights add up to 1.

Known bias: the product of noised densities is not the noised product, so samples are not from the product of the data
densities but, as a rule, more certain: for classes of variance s under data of variance S, w = (1, 1), the ODE ends
with variance s^2 / S instead of s S / (2 S - s).

References:
    Liu et al., "Compositional Visual Generation with Composable Diffusion Models", 2022, eq. 11.
    Du et al., "Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC", 2023,
    section 3 (the bias).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.guidance.branches import answers
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn, conditional_of


class Composition:
    """A denoiser that is told several labels at once. An evaluation for each label, and one without any.

    The labels are those of every sample and take the place of `cond["label"]`; other conditions go to all branches.

    Args:
        denoiser: Trained with and without labels.
        labels: Classes, each 0 or more.
        weights: One a label; negative for "not".
        batched: Whether all answers come from one call, which needs the memory of all.

    Raises:
        ValueError: If there are no labels, not as many weights, or a label is no class.
    """

    def __init__(
        self, denoiser: DenoiserFn, labels: Sequence[int], weights: Sequence[float], batched: bool = True
    ) -> None:
        if not labels or len(labels) != len(weights):
            raise ValueError(
                f"Composition needs at least one label and one weight each, got labels={list(labels)} and "
                f"weights={list(weights)}"
            )
        for label in labels:
            if not isinstance(label, int) or isinstance(label, bool) or label < 0:
                raise ValueError(f"Composition needs labels that are classes, 0 or more, got {label!r}")
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.denoiser, self.batched = denoiser, batched
        self.labels, self.weights = tuple(labels), tuple(float(weight) for weight in weights)

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the composed x0_hat, of the shape of `x`; `cond["label"]` is ignored."""
        rest = {name: value for name, value in (cond or {}).items() if name != "label"}
        branches: list[Cond | None] = []
        weights = [weight for weight in self.weights if weight != 0.0]
        for label, weight in zip(self.labels, self.weights, strict=True):
            if weight != 0.0:
                branches.append({**rest, "label": torch.full((len(x),), label, device=x.device)})
        if math.isclose(sum(weights), 1.0, abs_tol=1e-9):
            given = answers(self.denoiser, x, logsnr, branches, batched=self.batched)
            return _weighted(given, weights)
        without, *given = answers(self.denoiser, x, logsnr, [rest or None, *branches], batched=self.batched)
        if len(given) == 1:
            return torch.lerp(without, given[0], weights[0])
        return _weighted([without, *(x0 - without for x0 in given)], [1.0, *weights])


def _weighted(terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = terms[0] * weights[0]
    for term, weight in zip(terms[1:], weights[1:], strict=True):
        total = total + weight * term
    return total
