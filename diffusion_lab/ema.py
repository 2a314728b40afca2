r"""Averaged weights: a shadow copy of a module that follows it.

    shadow <- decay shadow + (1 - decay) live        after each update

A profile says what `decay` is. With n images seen and b images an update,

    constant     decay = 2^(-b / h),  h = min(half_life, ramp_up n): the half-life in images, shorter at the start so
    that the
                 random initial weights are forgotten
    power        decay = (1 - b / n)^(gamma + 1): a profile proportional to tau^gamma over the whole run, whose width
    is a
                 fixed fraction sigma_rel of the run's length, however long it becomes

gamma and sigma_rel are tied by sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), so gamma is the largest
real root of g^3 + 7 g^2 + (16 - sigma_rel^-2) g + (12 - sigma_rel^-2).

Shadows are never swapped into the live module: they are modules of their own, to be sampled and scored directly. Where
the live module is sharded, so is its shadow, and each process averages the parts that it holds.

References:
    Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024, section 3 and appendix C.
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, appendix F.2 (ramp-up).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_lab.sharded import gather, load_whole, local


@lru_cache
def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Return the exponent of the power-function profile of relative width `sigma_rel`.

    Raises:
        ValueError: If no profile is so wide: `sigma_rel` must be in (0, 0.28].
    """
    inverse = sigma_rel**-2 if sigma_rel > 0 else np.inf
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]) if np.isfinite(inverse) else np.array([])
    real = [float(root.real) for root in roots if abs(root.imag) < 1e-9 and root.real >= 0]
    if not real:
        raise ValueError(f"a power-function average needs sigma_rel in (0, 0.28], got {sigma_rel}")
    return max(real)


@runtime_checkable
class Profile(Protocol):
    """How fast an average forgets."""

    def decay(self, images_seen: int, images_per_update: int) -> float:
        """Return the factor of the old average in the update after `images_seen` images."""
        ...


@dataclass(frozen=True, kw_only=True)
class ConstantDecay:
    """Exponential average with a half-life in images, ramped up at the start.

    Args:
        half_life_images: Images after which a weight's influence has halved.
        ramp_up: The half-life is at most this fraction of the images seen; None for no ramp.

    Raises:
        ValueError: If a parameter is not positive.
    """

    half_life_images: float = 500_000.0
    ramp_up: float | None = 0.05

    def __post_init__(self) -> None:
        if self.half_life_images <= 0 or (self.ramp_up is not None and self.ramp_up <= 0):
            raise ValueError("ConstantDecay needs positive half_life_images and ramp_up")

    def decay(self, images_seen: int, images_per_update: int) -> float:
        """See `Profile`."""
        half_life = self.half_life_images
        if self.ramp_up is not None:
            half_life = min(half_life, self.ramp_up * images_seen)
        return 0.5 ** (images_per_update / half_life) if half_life > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class PowerFunction:
    """EDM2's power-function average of relative width `sigma_rel`; the first update copies the live weights.

    Raises:
        ValueError: If `sigma_rel` is out of range.
    """

    sigma_rel: float = 0.1

    def __post_init__(self) -> None:
        sigma_rel_to_gamma(self.sigma_rel)

    @property
    def gamma(self) -> float:
        """Exponent of the profile."""
        return sigma_rel_to_gamma(self.sigma_rel)

    def decay(self, images_seen: int, images_per_update: int) -> float:
        """See `Profile`."""
        return max(0.0, 1.0 - images_per_update / max(images_seen, 1)) ** (self.gamma + 1.0)


class EMA:
    """A shadow of a module.

    Args:
        module: What to follow; copied now.
        profile: How fast to forget.

    Attributes:
        module: The shadow, in evaluation mode and without gradients.
    """

    def __init__(self, module: nn.Module, profile: Profile) -> None:
        self.profile = profile
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._followed: nn.Module | None = None

    def _follow(self, module: nn.Module) -> None:
        """Remember where both modules keep their tensors: walking their trees costs more than the update itself.

        Parameters are kept as objects and buffers by owner and name, so that moving a module to another device, which
        replaces storages and buffers, changes nothing here.
        """
        self._followed = module
        self._shadow: list[Tensor] = list(self.module.parameters())
        self._live: list[Tensor] = list(module.parameters())
        self._buffers = [
            (mine, theirs, name)
            for mine, theirs in zip(self.module.modules(), module.modules(), strict=True)
            for name in mine._buffers
        ]

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: int, images_per_update: int) -> None:
        """Move the shadow towards `module`, the live one, after `images_seen` images; buffers are copied.

        One fused call for all parameters of a kind: some three times faster than one call each.
        """
        weight = 1.0 - self.profile.decay(images_seen, images_per_update)
        if self._followed is not module:
            self._follow(module)
        torch._foreach_lerp_([local(p) for p in self._shadow], [local(p) for p in self._live], weight)
        for mine, theirs, name in self._buffers:
            mine.get_buffer(name).copy_(theirs.get_buffer(name))

    def state_dict(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Weights and buffers of the shadow, whole; if it is sharded, every process must call this.

        Args:
            keep: Whether this process wants what is sharded; it gets empty tensors otherwise.
        """
        return gather(self.module.state_dict(), keep=keep)

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restore the shadow from whole tensors.

        Raises:
            RuntimeError: If names or shapes differ.
        """
        load_whole(self.module, state_dict)
