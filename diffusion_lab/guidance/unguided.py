"""No guidance: the option that leaves the denoiser as it is."""

from __future__ import annotations

from diffusion_lab.typing import DenoiserFn


def unguided(denoiser: DenoiserFn) -> DenoiserFn:
    """Return `denoiser` itself."""
    return denoiser


Unguided = unguided
"""The same under the name that a config would expect of a guidance."""
