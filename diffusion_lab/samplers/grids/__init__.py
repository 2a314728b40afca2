r"""Sampling grids: increasing log-SNRs that end at +inf. A grid of N steps has N + 1 levels and costs N calls or more.

    uniform_u         logsnr(u_i), u_i = 1 - i / N, the last replaced by +inf: the schedule's own spacing
    power_time        logsnr(u_i), u_i = (1 - i / N)^power: DEIS's spacing
    beta_quantile     logsnr(u_i), u_i the quantile 1 - i / N of a Beta distribution
    uniform_time      logsnr = 2 log((1 - t) / t), t_i = 1 - i / N: rectified flow's spacing
    shifted_time      uniform_time with t -> shift t / (1 + (shift - 1) t): SD3's spacing for larger images
    uniform_logsnr    N levels from logsnr_min to logsnr_max, then +inf: the solvers' spacing
    karras            sigma^(1/rho) linear, N levels from sigma_max to sigma_min, then +inf: EDM's spacing
    from_sigmas       any decreasing list of EDM noise levels, as other code bases print them
    from_logsnrs      any increasing list of log-SNRs
    interpolated      a printed list brought to another number of steps

Fitted grids are objects whose `fit` takes a denoiser and data (`fitted.py`):

    AlignYourSteps    minimises an upper bound on the Kullback-Leibler divergence of the sampled paths
    GITS              cheapest path through the local errors of a fine trajectory
"""

from diffusion_lab.samplers.grids.align_your_steps import AlignYourSteps
from diffusion_lab.samplers.grids.basic import from_sigmas, karras, uniform_logsnr, uniform_u
from diffusion_lab.samplers.grids.beta import beta_quantile
from diffusion_lab.samplers.grids.fitted import FittedGrid
from diffusion_lab.samplers.grids.gits import GITS
from diffusion_lab.samplers.grids.interpolate import interpolated
from diffusion_lab.samplers.grids.listed import from_logsnrs
from diffusion_lab.samplers.grids.power import power_time
from diffusion_lab.samplers.grids.shifted_time import shifted_time
from diffusion_lab.samplers.grids.uniform_time import uniform_time

__all__ = [
    "GITS",
    "AlignYourSteps",
    "FittedGrid",
    "beta_quantile",
    "from_logsnrs",
    "from_sigmas",
    "interpolated",
    "karras",
    "power_time",
    "shifted_time",
    "uniform_logsnr",
    "uniform_time",
    "uniform_u",
]
