r"""The statistics of a model that DPM-Solver-v3 needs, and how they are estimated.

Along the probability-flow ODE, with y = x / alpha, the half log-SNR lam = logsnr / 2 and e^-lam = sigma / alpha,

    dy/dlam = -f - l y,      f = e^-lam eps - l y,      f' = df/dlam = e^-lam ((l - 1) eps + eps') - l' y.

The three functions of lam, one value for each coordinate of the data, make f as easy to follow as can be:

    l = diag E[sigma d eps / dx]                        minimises E |sigma d eps / dx - diag(l)|^2, so that f depends
                                                        little on x; estimated as E[v * (sigma d eps / dx v)], v = +-1
    s = Cov(f, f') / Var(f),  b = E[f'] - s E[f]        minimise E |f' - s f - b|^2, so that f' is nearly s f + b

eps' is the total derivative of eps along the ODE, and the expectation is over noisy data. f and f' are linear in eps, y
and eps', so one pass over the data that keeps their means and products gives s and b after l and l' are known. Where f
does not vary (Gaussian data, where eps is linear in x) s is 0.

References:
    Zheng, Lu, Chen & Zhu, "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics", 2023, eqs. 5,
    11 and appendix C.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.forward_mode import jvp
from diffusion_lab.process.broadcast import expand_logsnr
from diffusion_lab.rng import SampleRNG
from diffusion_lab.typing import Cond, DenoiserFn

BATCH = 128
# of f relative to the square of its terms, below which f does not vary
FLAT = 1e-8


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """l, s and b at increasing log-SNRs; between them they are linear in the log-SNR, outside constant.

    Attributes:
        logsnr: Levels `(n,)`, increasing, float64.
        l: Linear part of sigma eps, `(n, *D)` or broadcastable to it.
        s: Growth rate of f, likewise.
        b: Drift of f, likewise.
    """

    logsnr: Tensor
    l: Tensor
    s: Tensor
    b: Tensor

    def __call__(self, logsnr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `l`, `s` and `b` at the levels `(m,)`, each `(m, *D)`."""
        at = logsnr.clamp(self.logsnr[0], self.logsnr[-1])
        right = torch.searchsorted(self.logsnr, at).clamp(1, len(self.logsnr) - 1)
        left = right - 1
        weight = (at - self.logsnr[left]) / (self.logsnr[right] - self.logsnr[left])
        weight = weight.reshape(-1, *[1] * (self.l.ndim - 1))
        l, s, b = (torch.lerp(of[left], of[right], weight) for of in (self.l, self.s, self.b))
        return l, s, b

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file keeps, by name."""
        return {"logsnr": self.logsnr, "l": self.l, "s": self.s, "b": self.b}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Statistics:
        """Build from `tensors()`.

        Raises:
            KeyError: If one is missing.
        """
        return cls(**{name: tensors[name].to("cpu", torch.float64) for name in ("logsnr", "l", "s", "b")})


def constant(l: float, s: float, b: float) -> Statistics:
    """Return statistics that are the same everywhere: (0, -1, 0) is noise prediction, (1, 0, 0) data prediction."""
    value = {"l": l, "s": s, "b": b}
    levels = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    return Statistics(logsnr=levels, **{name: torch.full((2, 1), v).double() for name, v in value.items()})


def estimate(
    denoiser: DenoiserFn,
    x0: Tensor,
    logsnr: Tensor,
    *,
    cond: Cond | None = None,
    rng: SampleRNG,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Estimate the statistics of a denoiser on data.

    Args:
        denoiser: E[x0 | x], differentiable in forward mode by x and logsnr.
        x0: Clean data `(n, *D)`; a thousand images suffice.
        logsnr: Levels `(m,)`, finite, increasing; about a hundred.
        cond: Conditions of the data.
        rng: One stream a row of `x0`.
        progress: Called as `progress(done, total)` after each level.

    Raises:
        ValueError: If the levels do not increase or there are fewer than three.
    """
    logsnr = logsnr.detach().to("cpu", torch.float64)
    if len(logsnr) < 3 or not bool((logsnr.diff() > 0).all()):
        raise ValueError("DPM-Solver-v3's statistics need at least three increasing log-SNRs")
    moments: list[dict[str, Tensor]] = []
    for index, level in enumerate(logsnr):
        moments.append(_moments(denoiser, x0, level, cond, rng))
        if progress is not None:
            progress(index + 1, len(logsnr))
    at = {name: torch.stack([level[name] for level in moments]) for name in moments[0]}
    lam = logsnr / 2
    l = at["l"]
    (slope,) = torch.gradient(l, spacing=(lam,), dim=0)
    rho = torch.exp(-lam).reshape(-1, *[1] * (l.ndim - 1))
    # f = rho eps - l y and f' = rho (l - 1) eps + rho eps' - l' y as combinations of (eps, y, eps')
    f = {"eps": rho, "y": -l}
    df = {"eps": rho * (l - 1), "y": -slope, "deps": rho.expand_as(l)}
    mean_f, mean_df = (sum(c * at[name] for name, c in of.items()) for of in (f, df))

    def covariance(one: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
        return sum(  # type: ignore[return-value]
            c * d * (at["*".join(sorted((p, q)))] - at[p] * at[q])
            for p, c in one.items()
            for q, d in other.items()
        )

    variance = covariance(f, f)
    size = sum((c * c * (at[f"{p}*{p}"] - at[p] ** 2)).clamp_min(0) for p, c in f.items())
    varies = variance > FLAT * size
    s = torch.where(varies, covariance(f, df) / torch.where(varies, variance, torch.ones_like(variance)), 0.0)
    b = mean_df - s * mean_f
    return Statistics(logsnr=logsnr, l=l, s=s, b=b)  # type: ignore[arg-type]


def _moments(
    denoiser: DenoiserFn, x0: Tensor, logsnr: Tensor, cond: Cond | None, rng: SampleRNG
) -> dict[str, Tensor]:
    """Means over the data of l's estimate, of eps, y, eps' and of their products, float64 `(*D,)`."""
    interpolant = denoiser.interpolant
    alpha, sigma = (float(c) for c in interpolant(logsnr))
    noise = rng.randn_like(x0)
    probe = torch.where(rng.rand(x0.shape[1:], dtype=x0.dtype, device=x0.device) < 0.5, -1.0, 1.0).to(
        x0.dtype
    )
    total: dict[str, Tensor] = {}
    for start in range(0, len(x0), BATCH):
        rows = slice(start, start + BATCH)
        part = None if cond is None else {name: value[rows] for name, value in cond.items()}
        x = alpha * x0[rows] + sigma * noise[rows]
        level = expand_logsnr(logsnr, x).to(x.dtype)

        def eps_of(x: Tensor, level: Tensor, part: Cond | None = part) -> Tensor:
            alpha, sigma = (c.reshape(-1, *[1] * (x.ndim - 1)) for c in interpolant(level))
            return (x - alpha * denoiser(x, level, part)) / sigma

        eps, jacobian_probe = jvp(lambda x, level=level: eps_of(x, level), (x,), (probe[rows],))
        # dx/dlam = (dalpha/dlam) y + alpha dy/dlam,  dy/dlam = -e^-lam eps,  dlogsnr/dlam = 2
        slope = float(jvp(lambda l: interpolant(l)[0], (logsnr,), (torch.full_like(logsnr, 2.0),))[1])
        y = x / alpha
        along = (slope * y - sigma * eps, torch.full_like(level, 2.0))
        _, deps = jvp(eps_of, (x, level), along)
        terms = {"eps": eps.double(), "y": y.double(), "deps": deps.double()}
        found = {"l": sigma * (probe[rows] * jacobian_probe).double(), **terms}
        names = sorted(terms)
        found |= {f"{p}*{q}": terms[p] * terms[q] for i, p in enumerate(names) for q in names[i:]}
        for name, value in found.items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + value.sum(0).cpu()
    return {name: value / len(x0) for name, value in total.items()}
