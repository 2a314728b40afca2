r"""CADS: condition-annealed sampling, which hides the condition by noise early on, for variety.

A condition vector c of d numbers, mean m and standard deviation s, becomes, at each evaluation,

    c_noisy = sqrt(g) c + noise s sqrt(1 - g) n,                n ~ N(0, I)
    c_scaled = m + s (c_noisy - mean(c_noisy)) / std(c_noisy)
    c_hat   = mixing c_scaled + (1 - mixing) c_noisy

    g = 1                                       for logsnr >= tau1, late
    g = (logsnr - tau2) / (tau1 - tau2)         between
    g = 0                                       for logsnr <= tau2, early, logsnr = -inf included

so that guided samples first go anywhere and are bound to the condition later. Conditional rows alone are annealed: the
unconditional branch of a guidance inside keeps its null embedding. A class label is annealed as its embedding, which
the denoiser must offer, `embed(cond)`, as `NetworkDenoiser` does; every other condition of floating dtype as it is.

The thresholds are log-SNRs, so that they mean the same whatever the schedule. The paper's are times, with tau1 = 0.6
and tau2 = 0.9 on linear-beta models (DDPM's 1000 steps, beta from 1e-4 to 0.02, t = 1 noise), where log-SNR is

    logsnr(t) = -log(exp(0.1 t + 9.95 t^2) - 1):        t = 0.6 is -3.6,  t = 0.9 is -8.1,

which are the defaults here; on a cosine schedule, -2 log tan(pi t / 2), the same times are -0.64 and -3.7.

Three departures. Between the thresholds g is linear in log-SNR, where the paper's is linear in its time. The noise is
in units of the condition's own standard deviation s, where the paper's is absolute (0.25 or less, to be tuned for
each kind of embedding: divide by the embedding's s); so one value serves all conditions. And n belongs to the
sample's seed and the level, not to the evaluation, so that a sampler that asks twice at one level hears the same
condition.

It samples no stated distribution: it trades faithfulness to the condition for variety, most of all at high scales.

References:
    Sadat et al., "CADS: Unleashing the Diversity of Diffusion Models through Condition-Annealed Sampling", 2023,
    eqs. 5-7 and algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.guidance.unguided import unguided
from diffusion_lab.process.broadcast import broadcast_right, expand_logsnr
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.rng import SampleRNG, derive_seed
from diffusion_lab.typing import (
    NO_LABEL,
    NOT_OF_THE_SAMPLE,
    SEED,
    Cond,
    DenoiserFn,
    GuidanceFactory,
    conditional_of,
)


class Annealed:
    """A denoiser that hears its condition through noise: what the guidance inside of `CADS` wraps.

    Args:
        denoiser: The denoiser.
        tau1: Log-SNR from which the condition is clean.
        tau2: Log-SNR up to which it is nothing but noise.
        noise: Standard deviation of the noise, in units of that of each condition.
        mixing: Part of the condition that is rescaled to its clean mean and standard deviation, in [0, 1].
    """

    def __init__(
        self, denoiser: DenoiserFn, *, tau1: float, tau2: float, noise: float, mixing: float
    ) -> None:
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.denoiser, self.tau1, self.tau2, self.noise, self.mixing = denoiser, tau1, tau2, noise, mixing

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return E[x0 | x, c_hat], of the shape of `x`.

        Raises:
            ValueError: If there is a label and the denoiser has no `embed`, or noise is due and `cond` has no seed.
        """
        # parts of one sample at levels of their own, as frames are, share its condition
        level = expand_logsnr(logsnr, x).flatten(1).mean(1) if logsnr.ndim > 1 else expand_logsnr(logsnr, x)
        kept = ((level - self.tau2) / (self.tau1 - self.tau2)).clamp(0.0, 1.0)
        if cond is None or bool((kept == 1.0).all()):
            return self.denoiser(x, logsnr, cond)
        out = dict(self._embedded(cond))
        for name in sorted(set(out) - set(NOT_OF_THE_SAMPLE)):
            if not out[name].is_floating_point():
                continue
            clean = kept == 1.0
            if name == "label_embedding" and "label" in cond:
                clean = clean | (cond["label"].to(clean.device) == NO_LABEL)
            noisy = self._noisy(name, out[name], kept, level, cond)
            out[name] = torch.where(broadcast_right(clean, noisy).bool(), out[name], noisy)
        return self.denoiser(x, logsnr, out)

    def _embedded(self, cond: Cond) -> Cond:
        if "label" not in cond:
            return cond
        embed = getattr(self.denoiser, "embed", None)
        if embed is None:
            raise ValueError(
                f"CADS anneals the embedding of a label, and {type(self.denoiser).__name__} offers no embed(cond)"
            )
        embedded: Cond = embed(cond)
        return embedded

    def _noisy(self, name: str, c: Tensor, kept: Tensor, level: Tensor, cond: Cond) -> Tensor:
        """Return c_hat `(B, ...)` for one condition c."""
        if SEED not in cond:
            raise ValueError('CADS draws noise: it needs each sample\'s seed, cond["seed"] (B,) int64')
        # the same noise in every precision
        keys = zip(cond[SEED].tolist(), level.to(torch.float32).tolist(), strict=True)
        rng = SampleRNG([derive_seed("cads", int(seed), repr(at), name) % 2**32 for seed, at in keys])
        n = rng.randn(c.shape[1:]).to(c)
        mean, std = _moments(c)
        signal, hidden = broadcast_right(kept.sqrt(), c), broadcast_right((1 - kept).sqrt(), c)
        noisy = signal * c + self.noise * std * hidden * n
        noisy_mean, noisy_std = _moments(noisy)
        scaled = mean + std * (noisy - noisy_mean) / noisy_std.clamp_min(torch.finfo(c.dtype).tiny)
        return self.mixing * scaled + (1.0 - self.mixing) * noisy


def _moments(c: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the numbers of each row, shaped to multiply `c`."""
    flat = c.flatten(1)
    mean = flat.mean(1)
    std = (flat - mean[:, None]).square().mean(1).sqrt()
    return broadcast_right(mean, c), broadcast_right(std, c)


class CADS:
    """A guidance whose conditions are annealed. It costs what the guidance inside costs.

    Args:
        denoiser: The denoiser, with `embed(cond)` if it is conditioned on labels.
        tau1: Log-SNR from which the condition is clean.
        tau2: Log-SNR up to which it is nothing but noise, below `tau1`.
        noise: Standard deviation of the noise, in units of that of each condition; at least 0.
        mixing: psi in [0, 1]: 1 keeps each condition's mean and standard deviation, 0 lets them go.
        inner: The guidance that hears the annealed conditions.

    Raises:
        ValueError: If the thresholds are not finite and ordered, `noise` is negative or `mixing` outside [0, 1].
    """

    draws = True

    def __init__(
        self,
        denoiser: DenoiserFn,
        tau1: float = -3.6,
        tau2: float = -8.1,
        noise: float = 1.0,
        mixing: float = 1.0,
        inner: GuidanceFactory = unguided,
    ) -> None:
        if not -float("inf") < tau2 < tau1 < float("inf"):
            raise ValueError(f"CADS needs log-SNRs tau2 < tau1, both finite, got tau1={tau1} and tau2={tau2}")
        if not (noise >= 0.0 and 0.0 <= mixing <= 1.0):
            raise ValueError(f"CADS needs noise >= 0 and mixing in [0, 1], got {noise} and {mixing}")
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.guided = inner(Annealed(denoiser, tau1=tau1, tau2=tau2, noise=noise, mixing=mixing))

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return x0_hat of the guidance inside under annealed conditions, of the shape of `x`."""
        return self.guided(x, logsnr, cond)
