"""What a step costs besides the denoiser: ours, diffusers' and k-diffusion's, side by side in one run.

Each steps down the same grid with a denoiser that answers x / 2; the time between its first and its last call, less
the time inside it, over the steps between, is what the sampler itself takes. Setting up (a scheduler's timesteps, our
grid) is left out, and so is what an adapter to another library would cost. Rounds alternate between the contenders.

    python benchmarks/sampler_steps.py [--rounds 21]
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, median_ratio, report
from peers import k_diffusion_sampling
from samplers import log_grid, samplers
from torch import Tensor

from diffusion_lab.process import VariancePreserving
from diffusion_lab.rng import SampleRNG
from diffusion_lab.typing import Cond

STEPS = 50
SHAPES = {"100 x 1 x 8 x 8": (100, 1, 8, 8), "16 x 3 x 64 x 64": (16, 3, 64, 64)}
K_DIFFUSION = {
    "euler": ("sample_euler", {}),
    "heun": ("sample_heun", {}),
    "edm": ("sample_heun", {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}),
    "ddpm_lower": ("sample_euler_ancestral", {}),
    "dpmpp_2m": ("sample_dpmpp_2m", {}),
    "dpmpp_2s": ("sample_dpmpp_2s_ancestral", {"eta": 0.0}),
    "dpmpp_2m_sde": ("sample_dpmpp_2m_sde", {}),
}  # fmt: skip
DIFFUSERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}),
    "sa_solver": (
        "SASolverScheduler",
        {"predictor_order": 3, "corrector_order": 4, "tau_func": lambda t: 1.0},
    ),
}


class Clocked:
    """x / 2, which knows how long it took and when it was called."""

    interpolant = VariancePreserving()

    def __init__(self) -> None:
        self.calls, self.inside, self.first, self.last = 0, 0.0, 0.0, 0.0

    def __call__(self, x: Tensor, logsnr: Tensor | None = None, cond: Cond | None = None) -> Tensor:
        """Return half of `x`."""
        began = time.perf_counter()
        answer = 0.5 * x
        now = time.perf_counter()
        self.first = self.first or began
        # what is inside the last call lies behind the interval that is measured
        self.inside, self.last = self.inside + (self.last_took if self.calls else 0.0), began
        self.last_took = now - began
        self.calls += 1
        return answer

    def outside(self) -> float:
        """Seconds outside the denoiser, a call, between the first call's begin and the last call's begin."""
        return (self.last - self.first - self.inside) / (self.calls - 1)


def ours(name: str, x: Tensor) -> Callable[[], float]:
    """Our sampler."""
    sampler, grid = samplers()[name], log_grid(STEPS)

    def run() -> float:
        clocked = Clocked()
        sampler(clocked, x, grid, rng=SampleRNG(range(len(x))))
        return clocked.outside()

    return run


def k_diffusion(name: str, x: Tensor) -> Callable[[], float]:
    """A function of k-diffusion."""
    function, options = K_DIFFUSION[name]
    sample, sigmas = getattr(k_diffusion_sampling(), function), torch.exp(-log_grid(STEPS) / 2).float()

    def run() -> float:
        clocked = Clocked()
        with torch.no_grad():
            sample(lambda y, sigma: clocked(y), x, sigmas, disable=True, **options)
        return clocked.outside()

    return run


def diffusers(name: str, x: Tensor) -> Callable[[], float]:
    """A scheduler of diffusers, stepped as its pipelines do: scale the input, call the model, step."""
    scheduler_name, options = DIFFUSERS[name]
    make: Any = getattr(importlib.import_module("diffusers"), scheduler_name)

    def run() -> float:
        scheduler = make(prediction_type="sample", **options)
        scheduler.set_timesteps(STEPS)
        clocked, y = Clocked(), x
        with torch.no_grad():
            for t in scheduler.timesteps:
                answer = clocked(scheduler.scale_model_input(y, t))
                y = scheduler.step(answer, t, y).prev_sample
        return clocked.outside()

    return run


def main() -> None:
    """Time every method that somebody else has too, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, ratios = [], {}
    for shape_name, shape in SHAPES.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for name in [name for name in samplers() if name in DIFFUSERS or name in K_DIFFUSION]:
            contenders = {"diffusion_lab": ours(name, x)}
            if name in DIFFUSERS:
                contenders["diffusers"] = diffusers(name, x)
            if name in K_DIFFUSION:
                contenders["k-diffusion"] = k_diffusion(name, x)
            found: dict[str, list[float]] = {library: [] for library in contenders}
            interleaved(
                {
                    library: (lambda f=f, into=found[library]: into.append(f()))
                    for library, f in contenders.items()
                },
                options.rounds,
            )
            row: dict[str, Any] = {"sampler": name, "batch": shape_name}
            for library, seconds in found.items():
                row[f"{library}, us a call"] = 1e6 * statistics.median(seconds)
                if library != "diffusion_lab":
                    ratio = median_ratio(seconds, found["diffusion_lab"])
                    key = f"{name}_{library}_over_ours"
                    ratios[key] = min(ratio, ratios.get(key, float("inf")))
            rows.append(row)
    report("sampler_steps", rows, ratios)


if __name__ == "__main__":
    main()
