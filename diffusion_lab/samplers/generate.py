r"""From seeds to samples: everything that has to be fixed before a denoiser can make an image.

    noise    x = sigma(grid[0]) z,   z ~ N(0, I) from the sample's own seed
    then     x0 = sampler(modifiers(guidance(denoiser)), x, grid, cond)

The same seed gives the same image whatever its batch, since noise comes from `SampleRNG`. A guidance may say about
itself, by attributes of its class:

    draws = True               it wants each sample's seed, in cond["seed"]
    around(sampler)            it is asked for the sampler to use, because it has to touch the samples themselves
    takes_modifiers = False    its sampler puts the guided answer together, out of a modifier's reach
    adaptive = True            how often it calls the denoiser depends on the answers
    remembers = "momentum"     with this argument it remembers the evaluation before

The field of a bridge may stand in for the denoiser; its sampler `carries`, see `transport_samplers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import Sampler
from diffusion_lab.samplers.counting import BlankDenoiser, CountingDenoiser
from diffusion_lab.samplers.transport_samplers import check_kinds
from diffusion_lab.typing import SEED, Cond, DenoiserFn, GuidanceFactory, OnStep


def _built_on(factory: object) -> Iterator[object]:
    """The guidance itself, then the one it has been given to build on, and so on."""
    while factory is not None:
        yield factory
        factory = getattr(factory, "inner", None) or getattr(factory, "keywords", {}).get("inner")


def _says(factory: object, word: str, default: bool = False) -> bool:
    """What a guidance, or one it builds on, says about itself by a class attribute."""
    return any(
        getattr(getattr(part, "func", part), word, default) is not default for part in _built_on(factory)
    )


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A recipe for samples: sampler, grid, guidance with what modifies it, and the shape of one sample.

    Attributes:
        sampler: The sampler.
        grid: Increasing log-SNRs that end at +inf.
        guidance: Wraps the denoiser; `Unguided` leaves it alone.
        shape: Shape of one sample, e.g. (1, 8, 8).
        modifiers: Wrap the guided denoiser in this order, e.g. thresholding; a mapping's values stand in its order.

    Raises:
        ValueError: If the grid or the sampler is one that has yet to be fitted to a model, or a guidance that has to
            touch the samples stands where it cannot.
    """

    sampler: Sampler
    grid: Tensor
    guidance: GuidanceFactory
    shape: Sequence[int]
    modifiers: Mapping[str, GuidanceFactory] | Sequence[GuidanceFactory] = ()

    def __post_init__(self) -> None:
        for name in ("grid", "sampler"):
            part = getattr(self, name)
            if hasattr(part, "fit") and not getattr(part, "fitted", False):
                raise ValueError(
                    f"{name}: {type(part).__name__} is fitted to a trained model: name it to sample.py"
                )
        for factory in [
            *list(_built_on(self.guidance))[1:],
            *(p for m in self._modifiers for p in _built_on(m)),
        ]:
            if hasattr(factory, "around"):
                raise ValueError(
                    f"{type(factory).__name__} touches the samples between steps: it can only be the outermost guidance"
                )
        if hasattr(self.guidance, "around"):
            for factory in list(_built_on(self.guidance))[1:]:
                word = getattr(getattr(factory, "func", None), "remembers", "")
                if getattr(factory, "keywords", {}).get(word):
                    raise ValueError(
                        f"{type(self.guidance).__name__} moves samples about, which the {word} of the guidance inside "
                        f"would not follow: set {word}=0"
                    )
        if self._modifiers and _says(self.guidance, "takes_modifiers", default=True):
            raise ValueError(
                f"{type(self.guidance).__name__} takes no modifiers: its answer is put together inside the sampler"
            )

    @property
    def _modifiers(self) -> list[GuidanceFactory]:
        return list(self.modifiers.values() if isinstance(self.modifiers, Mapping) else self.modifiers)

    @property
    def adaptive(self) -> bool:
        """Whether the number of evaluations depends on what the denoiser answers."""
        return getattr(self.sampler, "adaptive", False) or _says(self.guidance, "adaptive")

    def wrapped(self, denoiser: DenoiserFn) -> DenoiserFn:
        """Return `denoiser` under guidance and modifiers."""
        denoiser = self.guidance(denoiser)
        for modifier in self._modifiers:
            denoiser = modifier(denoiser)
        return denoiser

    def __call__(
        self,
        denoiser: DenoiserFn,
        *,
        seeds: Sequence[int],
        cond: Cond | None = None,
        device: torch.device | str = "cpu",
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Return samples `(len(seeds), *shape)`, float32, images in about [-1, 1] and not clipped.

        Args:
            denoiser: E[x0 | x].
            seeds: One seed a sample.
            cond: Conditions of the batch, on `device`.
            device: Where to sample.
            on_step: See `Stepper.__call__`.

        Raises:
            ValueError: If the grid starts where the process has infinite noise, or the sampler is one for other models.
        """
        check_kinds(denoiser, self.sampler)
        rng = SampleRNG(seeds)
        if any(_says(factory, "draws") for factory in (self.guidance, *self._modifiers)):
            cond = {**(cond or {}), SEED: torch.tensor(list(seeds), dtype=torch.int64, device=device)}
        around = getattr(self.guidance, "around", None)
        sampler = self.sampler if around is None else around(self.sampler)
        _, sigma = denoiser.interpolant(self.grid[0])
        if not math.isfinite(float(sigma)):
            raise ValueError(
                "this grid starts at logsnr = -inf, where the variance-exploding process has no samples"
            )
        x = sigma * rng.randn(self.shape, device=device)
        return sampler(self.wrapped(denoiser), x, self.grid, cond=cond, rng=rng, on_step=on_step)

    def nfe(self, interpolant: Interpolant, cond: Cond | None = None) -> int:
        """Return the evaluations one sample costs, counted on a run with a denoiser that answers zero.

        That is the true number unless the recipe is `adaptive`.
        """
        counting = CountingDenoiser(BlankDenoiser(interpolant), batch=1)
        self(counting, seeds=[0], cond=cond)
        return counting.calls
