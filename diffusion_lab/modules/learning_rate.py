"""Learning-rate schedules as pure functions of the images seen.

    lr(images_seen) = lr_of_the_optimizer * factor(images_seen)

    factor = min(1, (images_seen + 1) / (warmup_images + 1)) * decay(images_seen)

Because the factor is a function of the clock, there is no scheduler state to save, to restore or to get out of step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class LRSchedule(Protocol):
    """Anything that turns the clock into a factor on the learning rate."""

    def __call__(self, images_seen: int) -> float:
        """Return the factor for the step that starts after `images_seen` images."""
        ...


def _warmup(images_seen: int, warmup_images: int) -> float:
    # + 1 so that the very first step is small but not lost
    return 1.0 if images_seen >= warmup_images else (images_seen + 1) / (warmup_images + 1)


def _check(*, max_images: int, warmup_images: int, final: float) -> None:
    if warmup_images < 0:
        raise ValueError(f"warmup_images must not be negative, got {warmup_images}")
    if max_images <= warmup_images:
        raise ValueError(f"max_images ({max_images}) must exceed warmup_images ({warmup_images})")
    if not 0.0 <= final <= 1.0:
        raise ValueError(f"final must be within [0, 1], got {final}")


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up, then 1.

    Args:
        warmup_images: Images until the full learning rate is reached; 0 starts there.

    Raises:
        ValueError: If `warmup_images` is negative.
    """

    warmup_images: int = 0

    def __post_init__(self) -> None:
        if self.warmup_images < 0:
            raise ValueError(f"warmup_images must not be negative, got {self.warmup_images}")

    def __call__(self, images_seen: int) -> float:
        """Return the factor on the learning rate."""
        return _warmup(images_seen, self.warmup_images)


@dataclass(frozen=True, kw_only=True)
class CosineDecay:
    """Linear warm-up, then half a cosine from 1 down to `final` at `max_images`.

    Args:
        max_images: Where the decay ends; the factor stays at `final` after it.
        warmup_images: Images until the full learning rate is reached.
        final: Factor at the end.

    Raises:
        ValueError: If the warm-up is negative or not shorter than the run, or `final` outside [0, 1].
    """

    max_images: int
    warmup_images: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        _check(max_images=self.max_images, warmup_images=self.warmup_images, final=self.final)

    def __call__(self, images_seen: int) -> float:
        """Return the factor on the learning rate."""
        done = (images_seen - self.warmup_images) / (self.max_images - self.warmup_images)
        done = min(1.0, max(0.0, done))
        decay = self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * done))
        return _warmup(images_seen, self.warmup_images) * decay


@dataclass(frozen=True, kw_only=True)
class LinearDecay:
    """Linear warm-up, then a straight line from 1 down to `final` at `max_images`.

    Args:
        max_images: Where the decay ends; the factor stays at `final` after it.
        warmup_images: Images until the full learning rate is reached.
        final: Factor at the end.

    Raises:
        ValueError: If the warm-up is negative or not shorter than the run, or `final` outside [0, 1].
    """

    max_images: int
    warmup_images: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        _check(max_images=self.max_images, warmup_images=self.warmup_images, final=self.final)

    def __call__(self, images_seen: int) -> float:
        """Return the factor on the learning rate."""
        done = (images_seen - self.warmup_images) / (self.max_images - self.warmup_images)
        done = min(1.0, max(0.0, done))
        return _warmup(images_seen, self.warmup_images) * (1.0 + (self.final - 1.0) * done)


@dataclass(frozen=True, kw_only=True)
class InverseSquareRoot:
    """Linear warm-up, 1 until `reference_images`, then sqrt(reference_images / images_seen).

    EDM2's schedule; its weights keep their norm, so nothing else makes its steps shorter.

    Args:
        reference_images: Images until the decay begins; the paper's t_ref times its batch.
        warmup_images: Images until the full learning rate is reached.

    Raises:
        ValueError: If `reference_images` is not positive or the warm-up negative.

    References:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024, eq. 67.
    """

    reference_images: int
    warmup_images: int = 0

    def __post_init__(self) -> None:
        if self.reference_images < 1 or self.warmup_images < 0:
            raise ValueError(
                f"InverseSquareRoot needs reference_images >= 1 and warmup_images >= 0, got "
                f"{self.reference_images} and {self.warmup_images}"
            )

    def __call__(self, images_seen: int) -> float:
        """Return the factor on the learning rate."""
        decay = math.sqrt(self.reference_images / max(images_seen, self.reference_images))
        return _warmup(images_seen, self.warmup_images) * decay
