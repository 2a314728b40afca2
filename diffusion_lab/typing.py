"""The vocabulary that every part of the house shares.

A denoiser is a callable that returns the posterior mean

    x0_hat = E[x0 | x],      x = alpha x0 + sigma eps,   eps ~ N(0, I),   logsnr = log(alpha^2 / sigma^2).

`logsnr` always is the full log signal-to-noise ratio (solver papers use half of it), and is the only noise
coordinate: how it becomes (alpha, sigma) is the denoiser's `interpolant`.

Shape rule: `logsnr.shape == x.shape[:k]` for some k; normally `(B,)`, `(B, T)` for noise per frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from diffusion_lab.process.interpolants import Interpolant

Cond = Mapping[str, Tensor]
"""What a sample is conditioned on, by name: `{"label": (B,) int64, "text": (B, L, D), "image": (B, C, H, W)}`.

`None` in place of the mapping means unconditional for the whole batch; a label of `NO_LABEL` means it for one example.
"""

SEED, MEASUREMENT = "seed", "measurement"
FOR_WRAPPERS = (SEED, MEASUREMENT)
"""Keys of a `Cond` that are no conditions of the model, but tell a guidance about each sample; models ignore them.

`seed` `(B,)` int64 is there for guidances that draw noise, `measurement` `(B, *M)` for those that sample a posterior.
"""

STEPS = "steps"
"""Key of a `Cond` by which a sampler tells a model, `(B,)`, how many steps it takes; see `denoisers/shortcut.py`."""

NOT_OF_THE_SAMPLE = (*FOR_WRAPPERS, STEPS)
"""Keys of a `Cond` that do not say what a sample is to be: an unconditional branch hears them too."""

NO_LABEL = -1
"""The value of `cond["label"]` for an example whose label was dropped or is not given."""

OnStep = Callable[[int, Tensor, Tensor, Tensor], None]
"""`on_step(index, logsnr, x, x0)`: called by a sampler after each evaluation that closes or opens a step."""


@runtime_checkable
class DenoiserFn(Protocol):
    """Anything that returns E[x0 | x]: a network, a closed form, or a wrapper around another denoiser."""

    interpolant: Interpolant

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the posterior mean of x0, of the shape of `x`, at noise level `logsnr` (`x.shape[:k]`)."""
        ...


GuidanceFactory = Callable[[DenoiserFn], DenoiserFn]
"""A guidance with all its settings bound but the denoiser: what a config builds."""


def conditional_of(denoiser: DenoiserFn) -> DenoiserFn:
    """Return the denoiser below all guidance and modifiers: a wrapper's attribute `conditional`, or itself.

    Second-order quantities (the posterior's covariance, its error) are those of the model, not of its guided answer.
    """
    inner: DenoiserFn = getattr(denoiser, "conditional", denoiser)
    return inner
