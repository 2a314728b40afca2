"""What sampling costs besides the network: time of a sampler over calls x time of one call.

The quickstart's network on a batch of 100 images, 20 steps, no guidance. A call is timed on its own, on inputs like
those it gets while sampling; rounds alternate between the bare calls and the sampler.

    python benchmarks/sampler_overhead.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import ROOT, interleaved, median_ratio, report
from hydra import compose, initialize_config_dir

from diffusion_lab.app.build import instantiate, plain
from diffusion_lab.guidance import Unguided
from diffusion_lab.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, Generation, Heun
from diffusion_lab.samplers.grids import uniform_u

SAMPLERS = {"ddim": DDIM(), "ddpm": DDPM(), "euler": Euler(), "heun": Heun(), "dpmpp_2m": DPMSolverPP2M()}


def main() -> None:
    """Time every sampler and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=100)
    options = parser.parse_args()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = plain(compose("train", ["experiment=digits/quickstart", "name=benchmark"]))
    denoiser = instantiate(config["method"]["denoiser"], "denoiser").eval().requires_grad_(False)
    schedule = instantiate(config["schedule"], "schedule")
    cond = {"label": torch.arange(options.batch) % 10}
    x = torch.randn(options.batch, *config["shape"], generator=torch.Generator().manual_seed(0))
    logsnr = torch.zeros(options.batch)
    rows, ratios = [], {}
    for name, sampler in SAMPLERS.items():
        recipe = Generation(
            sampler=sampler, grid=uniform_u(schedule, 20), guidance=Unguided, shape=config["shape"]
        )
        nfe = recipe.nfe(denoiser.interpolant)

        def calls(nfe: int = nfe) -> None:
            with torch.no_grad():
                for _ in range(nfe):
                    denoiser(x, logsnr, cond)

        def sample(recipe: Generation = recipe) -> None:
            recipe(denoiser, seeds=range(options.batch), cond=cond)

        seconds = interleaved({"calls": calls, "sampling": sample}, options.rounds)
        overhead = median_ratio(seconds["sampling"], seconds["calls"])
        rows.append(
            {
                "sampler": name,
                "calls": nfe,
                "ms a call": 1e3 * statistics.median(seconds["calls"]) / nfe,
                "sampling / (calls x call)": overhead,
            }
        )
        ratios[f"{name}_calls_over_sampling"] = 1.0 / overhead
    report("sampler_overhead", rows, ratios)


if __name__ == "__main__":
    main()
