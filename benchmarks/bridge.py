"""Stochastic interpolants on pairs of digits: from blurred to sharp, against the blurred ones as they are.

    python benchmarks/bridge.py [--only plain told] [--runs runs/bridge]

Two runs of experiment=stochastic_interpolant/digits, a minute or two each on a core: `plain`, whose field sees only
where a sample is, and `told`, which also sees the source all the way (model.image_channels=1). Each is sampled by the
ODE and by the SDE, at 50 evaluations. All start from the same 500 spoilt test images, and are compared with the
originals (PSNR) and with the whole test set (Fréchet distance, and whether a small classifier recognises the digit).
The originals themselves give the floor. Known runs and samples are kept below --runs. Results:
benchmarks/results/bridge.json, from which docs/losses.md has its table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, report

from diffusion_lab.app.config.choices import read_run
from diffusion_lab.app.evaluate import read_samples
from diffusion_lab.app.runs.record import read
from diffusion_lab.app.scoring.judging import Samples, Yardstick, score, yardstick
from diffusion_lab.data.image_sets import Held
from diffusion_lab.metrics.protocol import Source

N = 500
RUNS = {"plain": [], "told": ["model.image_channels=1"]}
SAMPLERS = {
    "ODE": ["sampler=transport_ode", "grid.steps=25"],
    "SDE": ["sampler=transport_sde", "grid.steps=50"],
}


def command(app: str, *words: str) -> None:
    """Run an entry point on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, f"{app}.py", *words], cwd=ROOT, check=True, env=environment)


def drawn(name: str, runs: Path, max_images: int | None) -> dict[str, Path]:
    """Train a run and sample it both ways, as far as that is not done; return the folders of samples."""
    folder = runs / name
    if not (folder / "export").is_dir():
        words = ["experiment=stochastic_interpolant/digits", f"paths.runs={runs.parent}", f"name={runs.name}"]
        shorter = [] if max_images is None else [f"max_images={max_images}"]
        command("train", *words, f"run_id={name}", "trainer=cpu", *RUNS[name], *shorter)
    found = {}
    for sampler, words in SAMPLERS.items():
        found[sampler] = folder / f"benchmark-{sampler}"
        if not (found[sampler] / "samples.npz").is_file():
            command("sample", f"run={folder}", f"num_samples={N}", f"out={found[sampler]}", *words)
    return found


def row(what: str, samples: Samples, judge: Yardstick, psnr: float | None, calls: int) -> dict[str, Any]:
    """One row of the table."""
    values = {record.metric: record.value for record in score(samples, judge)}
    return {
        "samples": what,
        "PSNR, dB": "–" if psnr is None else psnr,
        f"FD@{N}": values["frechet"],
        "recognised": f"{100 * values['accuracy']:.1f} %",
        "calls": calls,
    }


def stored(folder: Path, name: str, labels: torch.Tensor | None) -> Samples:
    """Return another array that lies beside samples."""
    with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays[name]).permute(0, 3, 1, 2).contiguous()
    return Samples(Held(images, labels, name), Source(), folder)


def main(words: Sequence[str] | None = None) -> None:
    """Run what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(RUNS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bridge")
    parser.add_argument("--max-images", type=int, help="train shorter, to try this script")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.only or RUNS:
        folders = drawn(name, options.runs.resolve(), options.max_images)
        trained = read_run(options.runs / name)
        judge = yardstick(trained, trained["metrics"], "cpu")
        for sampler, folder in folders.items():
            samples, told = read_samples(folder), read(folder / "record.json")
            numbers = told["sources"]
            if not rows:
                sources = stored(folder, "sources", samples.labels)
                rows.append(
                    row("the blurred ones as they are", sources, judge, numbers["psnr_of_sources"], 0)
                )
                originals = stored(folder, "originals", samples.labels)
                rows.append(row("their originals", originals, judge, None, 0))
            what = f"{sampler}, the field {'sees' if name == 'told' else 'does not see'} the source"
            rows.append(row(what, samples, judge, numbers["psnr_of_samples"], told["nfe"]))
    best = min(entry[f"FD@{N}"] for entry in rows[2:])
    report("bridge", rows, {"FD, blurred over carried": rows[0][f"FD@{N}"] / best})


if __name__ == "__main__":
    main()
