"""Samplers against each other and against diffusers and k-diffusion: error and Fréchet distance by cost.

    exact     ten Gaussians in 64 dimensions, the classes of scikit-learn's digits, with their exact denoiser: root mean
              square error against the ODE's solution (deterministic samplers) and Fréchet distance of 2,048
              samples to the mixture's own moments (all samplers; the mean of four draws for those that draw noise)
    digits    Fréchet distance of samples of the quickstart's model, trained with three seeds; and for deterministic
              samplers the root mean square error against that model's own ODE, from the same noise
    mnist     the same on a model of MNIST, three sampling seeds; needs DIFFUSION_LAB_DATA

Cost is counted in evaluations of the denoiser (NFE), one with a forward-mode derivative as two; for each budget a
sampler takes the most steps that fit. The rows "(derivative free)" count that one once. Everybody starts from the same
noise on the same grid of equal steps in log-SNR.

    python benchmarks/samplers.py exact digits mnist [--runs runs/benchmarks] [--workers 2]

Models are trained into `--runs` unless they are there. Results: benchmarks/results/samplers_<part>.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import ROOT, report
from exact_problem import fitted_on_mixture, mixture, moments, sample_moments
from models import extractor, loaded, trained
from omegaconf import OmegaConf
from peers import PEERS
from torch import Tensor

from diffusion_lab.app.build import instantiate
from diffusion_lab.forward_mode import is_dual
from diffusion_lab.images import to_uint8
from diffusion_lab.metrics.frechet import frechet_distance, frechet_from_stats
from diffusion_lab.metrics.stats import gaussian_stats
from diffusion_lab.process import VariancePreserving
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import Heun
from diffusion_lab.samplers.grids import uniform_logsnr, uniform_u
from diffusion_lab.typing import Cond

BUDGETS = (5, 8, 10, 15, 20, 50)
ENDS = (-10.0, 10.0)
FREE = " (derivative free)"
# they choose their own number of evaluations, trade it for rounds in parallel, or want a model with a learned variance,
# or the field of a bridge
LEFT_OUT = {"adaptive_rk", "paradigms", "iddpm", "transport_ode", "transport_sde"}
ON_MNIST = (
    "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_3m", "unipc", "deis", "dpm_solver_v3", "addim", "covariance",
    "covariance_block", "covariance_scalar", "ddpm", "dpmpp_2m_sde",
)  # fmt: skip


# ---- samplers and what they cost -------------------------------------------------------------------------------


def samplers() -> dict[str, Any]:
    """Build every file of conf/sampler, by name."""
    found = {}
    for file in sorted((ROOT / "conf" / "sampler").glob("*.yaml")):
        if file.stem not in LEFT_OUT:
            found[file.stem] = instantiate(OmegaConf.to_container(OmegaConf.load(file)), file.stem)
    # the variance that k-diffusion's ancestral sampler has
    found["ddpm_lower"] = replace(found["ddpm"], interpolation=0.0)
    return found


class Costing:
    """A denoiser that counts its evaluations, one that is differentiated as `dual`."""

    def __init__(self, denoiser: Any, dual: int) -> None:
        self.interpolant, self.denoiser, self.dual, self.cost = denoiser.interpolant, denoiser, dual, 0

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        self.cost += self.dual if is_dual(x) else 1
        return self.denoiser(x, logsnr, cond)


class Shrink:
    """x0 = x / 2: the cheapest denoiser that has a derivative, for counting costs."""

    interpolant = VariancePreserving()

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        return 0.5 * x


def cost(sampler: Any, steps: int, dual: int = 2) -> int:
    """Return the evaluations that a grid of `steps` steps costs, one with a derivative counted as `dual`."""
    counting = Costing(Shrink(), dual)
    sampler(counting, torch.zeros(1, 1, 8, 8), log_grid(steps), rng=SampleRNG([0]))
    return counting.cost


def probes(name: str) -> Any:
    """Return a sampler to count the calls of `name` with: one that is fitted costs what DDIM costs."""
    sampler = samplers()[name]
    return sampler if getattr(sampler, "fitted", True) else samplers()["ddim"]


def steps_within(sampler: Any, budget: int, dual: int = 2) -> int | None:
    """Return the most steps whose cost fits the budget, or None if not even one does."""
    best = None
    for steps in range(1, budget + 1):
        if cost(sampler, steps, dual) > budget:
            break
        best = steps
    return best


def log_grid(steps: int) -> Tensor:
    """Equal steps in log-SNR, which the ODE solvers like; a single one starts at pure noise."""
    return (
        uniform_logsnr(*ENDS, steps)
        if steps > 1
        else torch.tensor([ENDS[0], float("inf")], dtype=torch.float64)
    )


def cosine_grid(steps: int) -> Tensor:
    """Equal steps of the cosine schedule, which noise likes."""
    from diffusion_lab.process import Cosine

    return uniform_u(Cosine(logsnr_min=ENDS[0], logsnr_max=ENDS[1]), steps)


GRIDS: dict[str, Callable[[int], Tensor]] = {"logsnr": log_grid, "cosine": cosine_grid}


# ---- the exact problem ---------------------------------------------------------------------------------------


def exact(_: argparse.Namespace) -> None:
    """Run the exact problem."""
    problem, (mean, cov) = mixture(), moments(mixture())
    rng = SampleRNG(range(2048))
    start = rng.randn((64,), dtype=torch.float64) * VariancePreserving()(log_grid(2)[0])[1]
    few = start[:256]
    truth = Heun()(problem, few, uniform_logsnr(*ENDS, 1000))
    draw = torch.Generator().manual_seed(0)
    component = torch.randint(10, (2048,), generator=draw)
    real = problem.means[component] + problem.variances[component].sqrt() * torch.randn(
        2048, 64, generator=draw, dtype=torch.float64
    )
    rows: list[dict[str, Any]] = [
        {"sampler": "exact samples", "by": "", "FD@2048": frechet_distance(*sample_moments(real), mean, cov)}
    ]
    found: dict[tuple[str, str, int], float] = {}
    for name, sampler in samplers().items():
        # costs are counted before fitting, which ties a sampler to the shape of its data
        probe = sampler if getattr(sampler, "fitted", True) else samplers()["ddim"]
        sampler = fitted_on_mixture(sampler, problem)
        for budget in BUDGETS:
            steps = steps_within(probe, budget)
            if steps is None:
                continue
            grid = log_grid(steps)
            runs: dict[str, Callable[[Tensor, int, int], Tensor]] = {
                "diffusion_lab": lambda x, n, seed, s=sampler, g=grid: s(
                    problem, x, g, rng=SampleRNG(range((seed + 1) * n, (seed + 2) * n))
                )
            }
            for library, peer in PEERS.get(name, {}).items():
                runs[library] = lambda x, n, seed, p=peer, g=grid: p(problem, x, g, None, seed)
            for library, run in runs.items():
                row = {"sampler": name, "by": library, "NFE": cost(probe, steps), "budget": budget}
                noisy = getattr(sampler, "stochastic", False)
                found_distances = [
                    frechet_distance(*sample_moments(run(start, 2048, seed)), mean, cov)
                    for seed in range(4 if noisy else 1)
                ]
                row["FD@2048"] = statistics.mean(found_distances)
                if not noisy:
                    row["RMSE"] = float((run(few, 256, 0) - truth).square().mean().sqrt())
                rows.append(row)
                found[name, library, budget] = row.get("RMSE", row["FD@2048"])
        print(name, "done", flush=True)
    report(
        "samplers_exact",
        rows,
        against_peers(found),
        {"by_cost": by_cost(rows, "RMSE") + by_cost(rows, "FD@2048")},
    )


def by_cost(rows: Sequence[dict[str, Any]], figure: str) -> list[dict[str, Any]]:
    """Arrange one figure of ours as a table, a sampler a row and a budget a column, the better grid in each cell."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["by"] == "diffusion_lab" and figure in row:
            cells = table.setdefault(row["sampler"], {"sampler": row["sampler"], "figure": figure})
            column = f"{row['budget']} NFE"
            cells[column] = min(row[figure], cells.get(column, float("inf")))
    columns = ["sampler", "figure", *(f"{budget} NFE" for budget in BUDGETS)]
    return [{column: cells.get(column, "") for column in columns} for cells in table.values()]


def against_peers(found: dict[tuple[str, str, int], float]) -> dict[str, float]:
    """Return, for each method and library, the median over budgets of their error over ours."""
    ratios = {}
    for name, peers in PEERS.items():
        for library in peers:
            pairs = [(found.get((name, library, b)), found.get((name, "diffusion_lab", b))) for b in BUDGETS]
            quotients = [theirs / ours for theirs, ours in pairs if theirs is not None and ours]
            if quotients:
                ratios[f"{name}_{library}_over_ours"] = statistics.median(quotients)
    return ratios


# ---- models --------------------------------------------------------------------------------------------------


@torch.no_grad()
def distance(folder: Path, name: str, library: str, steps: int, grid: str, seed: int, n: int) -> float:
    """Return the Fréchet distance of `n` samples to the test images; nan where a sampler refuses so few steps.

    It is kept beside the run, so that a benchmark that was interrupted goes on.
    """
    key = f"{sources(name, library)} {name} {library} {steps} {grid} {seed} {n}"
    kept = folder / "fitted" / f"distance-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not kept.is_file():
        try:
            found = _distance(folder, name, library, steps, grid, seed, n)
        except ValueError:
            found = float("nan")
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps({"key": key, "distance": found}))
    return float(json.loads(kept.read_text())["distance"])


@cache
def sources(name: str, library: str) -> str:
    """Hash what a sampler's samples depend on: its own file, what all samplers share, and the peers' adapters."""
    package = ROOT / "diffusion_lab"
    shared = [package / "samplers" / "base.py", *sorted((package / "process").rglob("*.py"))]
    own = Path(str(sys.modules[type(samplers()[name]).__module__].__file__))
    conf = ROOT / "conf" / "sampler" / f"{name}.yaml"
    files = [own, *shared, *([conf] if conf.is_file() else [])]
    files += [ROOT / "benchmarks" / "peers.py"] if library != "diffusion_lab" else []
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@torch.no_grad()
def ode_errors(folder: Path, tasks: Sequence[tuple[str, int]], seed: int, n: int = 64) -> list[float]:
    """Return the RMSE of samples to the solution of the model's own ODE, from the same noise.

    Args:
        folder: The run.
        tasks: Deterministic samplers by name, each with its number of steps, of equal size in log-SNR.
        seed: Of the noise.
        n: Samples.
    """
    denoiser, x0, _, _ = loaded(folder)
    seeds = [seed * 2**20 + i for i in range(n)]
    cond = {"label": torch.arange(n) % 10}
    start = float(denoiser.interpolant(log_grid(2)[0])[1]) * SampleRNG(seeds).randn(x0.shape[1:])
    truth = samplers()["dpmpp_3m"](denoiser, start, log_grid(300), cond=cond)
    found = []
    for name, steps in tasks:
        end = fitted_on_run(folder, name)(denoiser, start, log_grid(steps), cond=cond)
        found.append(float((end - truth).square().mean().sqrt()))
    return found


def _distance(folder: Path, name: str, library: str, steps: int, grid: str, seed: int, n: int) -> float:
    denoiser, x0, _, reference = loaded(folder)
    sampler = fitted_on_run(folder, name)
    levels, finished = GRIDS[grid](steps), []
    start = denoiser.interpolant(levels[0])[1]
    for first in range(0, n, 128):
        seeds = [seed * 2**20 + i for i in range(first, min(first + 128, n))]
        cond = {"label": torch.tensor([i % 10 for i in seeds])}
        rng = SampleRNG(seeds)
        x = float(start) * rng.randn(x0.shape[1:])
        if library == "diffusion_lab":
            end = sampler(denoiser, x, levels, cond=cond, rng=rng)
        else:
            end = PEERS[name][library](denoiser, x, levels, cond, seed + first)
        finished.append(to_uint8(torch.nan_to_num(end)))
    return frechet_from_stats(gaussian_stats(extractor(tuple(x0.shape[1:]))(torch.cat(finished))), reference)


@cache
def fitted_on_run(folder: Path, name: str) -> Any:
    """Build a sampler, fitted to the run's denoiser on training images where it wants to be."""
    sampler = samplers()[name]
    if getattr(sampler, "fitted", True):
        return sampler
    from safetensors.torch import load_file, save_file

    from diffusion_lab.samplers.dpm_solver_v3_statistics import Statistics

    file = folder / "fitted" / f"benchmark-{name}.safetensors"
    if not file.is_file():
        denoiser, x0, labels, _ = loaded(folder)
        chosen = torch.linspace(0, len(x0) - 1, 256).long()
        tensors = sampler.fit(denoiser, x0[chosen], {"label": labels[chosen]}, SampleRNG(range(256)))
        file.parent.mkdir(exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    return replace(sampler, statistics=Statistics.of(load_file(file)))


def on_model(part: str, options: argparse.Namespace) -> None:
    """Fréchet distance by cost on trained models."""
    torch.set_num_threads(1)
    seeds, n = range(3), options.n or (256 if part == "digits" else 128)
    folders = {seed: trained(options.runs, part, seed if part == "digits" else 0) for seed in seeds}
    budgets = BUDGETS if part == "digits" else BUDGETS[:-1]
    tasks: list[tuple[Any, ...]] = []
    contenders = [(name, name, 2) for name in samplers() if part == "digits" or name in ON_MNIST]
    contenders.append(("covariance" + FREE, "covariance", 1))
    for label, name, dual in contenders:
        probe = probes(name)
        for budget in budgets if dual == 2 else (5, 8, 10):
            steps = steps_within(probe, budget, dual)
            if steps is None:
                continue
            for grid in GRIDS if budget <= 20 and part == "digits" else ("logsnr",):
                peers = PEERS.get(name, {}) if grid == "logsnr" and budget == 10 else {}
                tasks += [
                    (label, library, budget, cost(probe, steps, dual), steps, grid, seed)
                    for library in ("diffusion_lab", *peers)
                    for seed in seeds
                ]
    for seed in seeds:
        fitted_on_run(folders[seed], "dpm_solver_v3")
    calls = [(folders[t[-1]], t[0].removesuffix(FREE), t[1], t[4], t[5], t[6], n) for t in tasks]
    with ProcessPoolExecutor(options.workers) as pool:
        distances = []
        for k, found in enumerate(pool.map(distance, *zip(*calls, strict=True), chunksize=4)):
            distances.append(found)
            if k % 50 == 0:
                print(f"{part} {k}/{len(tasks)}", flush=True)
    groups: dict[tuple[Any, ...], list[float]] = {}
    for task, found in zip(tasks, distances, strict=True):
        if not math.isnan(found):
            groups.setdefault(task[:-1], []).append(found)
    label = f"FD@{n} ({extractor((1, 8, 8) if part == 'digits' else (1, 28, 28)).name})"
    rows = [
        {
            "sampler": name, "by": library, "budget": budget, "NFE": nfe, "grid": grid, label: statistics.mean(values),
            "seeds": values,
        }
        for (name, library, budget, nfe, _, grid), values in groups.items()
    ]  # fmt: skip
    exactly = [
        (label, name, budget, steps)
        for label, name, dual in contenders
        if not getattr(samplers()[name], "stochastic", False)
        for budget in budgets
        if (steps := steps_within(probes(name), budget, dual)) is not None
    ]
    jobs = [(folders[seed], [(name, steps) for _, name, _, steps in exactly], seed) for seed in seeds]
    with ProcessPoolExecutor(options.workers) as pool:
        errors = list(pool.map(ode_errors, *zip(*jobs, strict=True)))
    ode_rows = [
        {
            "sampler": label, "by": "diffusion_lab", "budget": budget, "RMSE": statistics.mean(e[k] for e in errors),
            "seeds": [e[k] for e in errors],
        }
        for k, (label, _, budget, _) in enumerate(exactly)
    ]  # fmt: skip
    at_ten = {(r["sampler"], r["by"], r["budget"]): r[label] for r in rows if r["grid"] == "logsnr"}
    report(
        f"samplers_{part}",
        [*rows, *ode_rows],
        against_peers(at_ten),
        {"by_cost": by_cost(rows, label), "to_ode": by_cost(ode_rows, "RMSE")},
    )


def main(words: Sequence[str] | None = None) -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=["exact", "digits", "mnist"])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmarks")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--n", type=int, default=None, help="samples for each distance")
    options = parser.parse_args(words)
    for part in options.parts:
        if part == "exact":
            exact(options)
        else:
            on_model(part, options)


if __name__ == "__main__":
    main()
