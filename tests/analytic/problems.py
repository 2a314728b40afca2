"""Exact problems on which samplers are proved."""

import math
from functools import cache
from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf
from scipy import integrate

from diffusion_lab.denoisers import GaussianDenoiser, GaussianMixtureDenoiser
from diffusion_lab.process import Cosine, RectifiedFlow, VarianceExploding, VariancePreserving
from diffusion_lab.samplers import DDIM, DDPM

D64 = torch.float64
INTERPOLANTS = {"vp": VariancePreserving(), "ve": VarianceExploding(), "rf": RectifiedFlow()}
PURE_COSINE = Cosine(logsnr_min=-math.inf, logsnr_max=math.inf)


# ---- the samplers that every property is checked for ----------------------------------------------------------------

CONF = Path(__file__).parents[2] / "conf" / "sampler"


def _from_conf(path):
    """Build a sampler from its file, as Hydra would."""
    node = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    return hydra.utils.instantiate(node, _convert_="all")


# every file of conf/sampler that needs no model to be fitted to first nor one with a learned variance nor the field of
# a bridge nor a student, and options that change the arithmetic
ALL_SAMPLERS = {
    path.stem: _from_conf(path)
    for path in sorted(CONF.glob("*.yaml"))
    if path.stem not in ("iddpm", "renoise", "shortcut")
}
ALL_SAMPLERS = {
    name: sampler
    for name, sampler in ALL_SAMPLERS.items()
    if getattr(sampler, "fitted", True) and not getattr(sampler, "carries", False)
} | {
    "ddim_half": DDIM(eta=0.5),
    "ddim_one": DDIM(eta=1.0),
    "ddpm_lower": DDPM(interpolation=0.0),
    "ddpm_middle": DDPM(interpolation=0.3),
    "ddpm_upper": DDPM(interpolation=1.0),
}
STOCHASTIC = {
    name: sampler for name, sampler in ALL_SAMPLERS.items() if getattr(sampler, "stochastic", False)
}
DETERMINISTIC = {name: sampler for name, sampler in ALL_SAMPLERS.items() if name not in STOCHASTIC}


def mixture_1d(interpolant):
    """The mixture of the order test protocol: weights .3/.7, means -1/.8, standard deviations .2/.35; two classes."""
    return GaussianMixtureDenoiser(
        means=torch.tensor([[-1.0], [0.8]], dtype=D64),
        variances=torch.tensor([0.2, 0.35], dtype=D64) ** 2,
        weights=torch.tensor([0.3, 0.7], dtype=D64),
        labels=torch.tensor([0, 1]),
        interpolant=interpolant,
    )


def mixture_4d(interpolant):
    """Three components in four dimensions, for comparisons with public code."""
    draw = torch.Generator().manual_seed(0)
    return GaussianMixtureDenoiser(
        means=torch.randn(3, 4, generator=draw, dtype=D64),
        variances=torch.tensor([0.05, 0.1, 0.2], dtype=D64),
        weights=torch.tensor([0.2, 0.3, 0.5], dtype=D64),
        interpolant=interpolant,
    )


def gaussian(interpolant, variance, dim=1, mean=0.0):
    """N(mean, variance) in `dim` dimensions."""
    return GaussianDenoiser(
        mean=torch.full((dim,), mean, dtype=D64),
        covariance=torch.full((dim,), variance, dtype=D64),
        interpolant=interpolant,
    )


def order_levels(steps, warp=0.0, uneven=0.0):
    """`steps` + 1 log-SNRs from -5 to 5: in equal steps, or not.

    `warp` makes the steps grow smoothly away from the middle, 5 sinh(warp u) / sinh(warp) for u in [-1, 1]; `uneven`
    moves every second level by that part of a step, so that neighbouring steps keep their ratio as N grows.
    """
    levels = torch.linspace(-5, 5, steps + 1, dtype=D64)
    levels[1:-1:2] += uneven * 10 / steps
    return 5 * torch.sinh(warp * levels / 5) / math.sinh(warp) if warp else levels


def solve(sampler, interpolant, steps, warp=0.0, uneven=0.0):
    """x0-scaled end points at log-SNR 5 of the order test protocol: 9 starts at -5, steps equal unless said."""
    grid = torch.cat([order_levels(steps, warp, uneven), torch.tensor([math.inf], dtype=D64)])
    alpha, sigma = interpolant(grid[0])
    # the same starts in every interpolant: x / sqrt(alpha^2 + sigma^2) is shared
    x = torch.linspace(-2, 2, 9, dtype=D64)[:, None] * torch.sqrt(alpha**2 + sigma**2)
    states = {}
    sampler(mixture_1d(interpolant), x, grid, on_step=lambda k, logsnr, x, x0: states.__setitem__(k, x))
    return states[steps - 1] / interpolant(grid[steps])[0]


def observed_order(sampler, interpolant, reference, steps=(160, 320), warp=0.0, uneven=0.0):
    """log2 of the ratio of the last two errors of the order test protocol, and all the errors."""
    errors = [float((solve(sampler, interpolant, n, warp, uneven) - reference).abs().max()) for n in steps]
    return math.log2(errors[-2] / errors[-1]), errors


def exact_trajectory(interpolant, levels):
    """Points of the ODE's solutions at `levels` by DOP853, from 9 starts at log-SNR -5; `(len(levels), 9, 1)`."""
    problem = mixture_1d(INTERPOLANTS["vp"])

    def slope(lam, y):
        alpha, sigma = INTERPOLANTS["vp"](torch.tensor(2 * lam, dtype=D64))
        x = alpha * torch.from_numpy(y)[:, None]
        x0 = problem(x, torch.full((len(y),), 2 * lam, dtype=D64))
        return -(sigma / alpha * (x - alpha * x0) / sigma).ravel().numpy()

    start = torch.linspace(-2, 2, 9, dtype=D64) / INTERPOLANTS["vp"](torch.tensor(-5.0, dtype=D64))[0]
    lams = [float(level) / 2 for level in levels]
    found = integrate.solve_ivp(
        slope, (-2.5, lams[-1]), start.numpy(), method="DOP853", t_eval=lams, rtol=1e-12, atol=1e-13
    )
    alphas = interpolant(torch.as_tensor(levels, dtype=D64))[0]
    return torch.from_numpy(found.y.T.copy())[:, :, None] * alphas[:, None, None]


@cache
def exact_ends():
    """What `solve` converges to; the same in every interpolant."""
    vp = INTERPOLANTS["vp"]
    return exact_trajectory(vp, [5.0])[0] / vp(torch.tensor(5.0, dtype=D64))[0]
