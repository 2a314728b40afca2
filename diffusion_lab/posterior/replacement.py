r"""Replacement: known pixels are put in by hand, at the noise of the moment.

With y known on a mask m, before each call

    x <- m (alpha y + sigma n) + (1 - m) x,        n ~ N(0, I) from the sample's seed and the level,

and of the answer the known part is y: x0 <- m y + (1 - m) x0. Most samplers treat entries alone: what they do to an
entry depends on its x and its x0 only. For those the known entries of their own z are never read by anything that ends
in an unknown entry, and this equals overwriting z itself by a draw of q(z | y) after every step; the last step returns
y. (Samplers that take norms over an image, such as `predictor_corrector` with a finite snr, see their own z.)

The result is NOT the posterior: unknown pixels follow E[x0 | x], which has been shown y only as noisy as x, and not
E[x0 | x, y]. On two Gaussians with correlation 0.9, given a = 1.5, it draws b with mean 0.94 and variance 0.31, where
the truth is 1.35 and 0.19; more steps do not mend that, Langevin steps at each level do in part (1.22 and 0.23 with
one). y counts as free of noise.

The corrector of Video Diffusion, z <- z - (delta / 2) sigma eps + sqrt(delta) sigma n with delta = 0.1, is a
`predictor_corrector` whose step is bounded at delta / 2 and always reaches the bound:

    guidance=replacement sampler=predictor_corrector sampler.ancestral=true sampler.snr=inf sampler.longest=0.05

It corrects before the step leaves a level instead of after the step arrives, which is the same sequence. The known
pixels of the correction and of the step that follows are one draw.

References:
    Ho et al., "Video Diffusion Models", 2022, section 3.1 (the replacement method and what it lacks).
    Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021, appendix I.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.guidance import unguided
from diffusion_lab.measurements import Masking, Operator
from diffusion_lab.posterior.common import measurement, require_mask
from diffusion_lab.process.broadcast import expand_logsnr
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.rng import SampleRNG, derive_seed
from diffusion_lab.typing import SEED, Cond, DenoiserFn, GuidanceFactory, conditional_of


class Replacement:
    """A denoiser that is shown the known pixels. One call an evaluation. Not calibrated: see the module.

    Args:
        denoiser: Unconditional denoiser, or one under its own conditions.
        operator: A mask.
        inner: Guidance below this one.

    Raises:
        ValueError: If `operator` is no mask, or (at call) the measurement or the seeds are missing or do not fit.
    """

    draws = True

    def __init__(self, denoiser: DenoiserFn, operator: Operator, inner: GuidanceFactory = unguided) -> None:
        self.operator: Masking = require_mask(operator, "Replacement")
        self.denoiser = inner(denoiser)
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return x0 with y on the known pixels, of the shape of `x`."""
        y = measurement(cond, x, self.operator)
        known = self.operator.known(x) > 0
        x0 = self.denoiser(shown(self.interpolant, x, y, known, logsnr, cond), logsnr, cond)
        return torch.where(known, y, x0)


def shown(
    interpolant: Interpolant, x: Tensor, y: Tensor, known: Tensor, logsnr: Tensor, cond: Cond | None
) -> Tensor:
    """Return `x` with its known pixels drawn from q(x | y) by each sample's seed, of the shape of `x`."""
    return torch.where(known, marginal(interpolant, y, _noise(x, logsnr, cond), logsnr), x)


def _noise(x: Tensor, logsnr: Tensor, cond: Cond | None) -> Tensor:
    """Standard normal numbers like `x` that belong to each sample's seed and level."""
    if cond is None or SEED not in cond or cond[SEED].shape != x.shape[:1]:
        raise ValueError(
            f"replacement draws noise: it needs cond['{SEED}'], one int64 for each of {len(x)} samples"
        )
    # in float32, so that a float64 run has the same keys
    levels = expand_logsnr(logsnr, x).to(torch.float32).flatten(1 if logsnr.ndim > 1 else 0).tolist()
    keys = zip(cond[SEED].tolist(), levels, strict=True)
    rng = SampleRNG([derive_seed("replacement", seed, repr(level)) % 2**32 for seed, level in keys])
    return rng.randn_like(x)
