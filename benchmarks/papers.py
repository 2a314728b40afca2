"""Every paper's recipe: how it is run at the paper's scale and on digits, what was published, what comes out here.

    python benchmarks/papers.py [--only ddpm vdm ...] [--runs runs/papers] [--workers 2]

Trains the laptop sibling of every paper once, as its recipe says (one to six minutes each on a core), and draws 500
samples the same way.
Known runs and figures are kept below --runs. Results: benchmarks/results/papers.json, from which docs/papers.md has its
table, and docs/images/papers.png, a row of samples for each paper.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, report
from PIL import Image, ImageDraw

from diffusion_lab.app.config.choices import read_run
from diffusion_lab.app.runs.record import read, training_seconds

N = 500
SHOWN = 20
PICTURE = ROOT / "docs" / "images" / "papers.png"


@dataclass(frozen=True)
class Paper:
    """One row.

    Attributes:
        folder: Of conf/experiment.
        what: Title or subject, authors and year.
        scale: Data sets at the paper's own scale.
        published: The paper's figure for them, with its measure.
    """

    folder: str
    what: str
    scale: tuple[str, ...]
    published: str


PAPERS = (
    Paper(
        "ddpm",
        "DDPM: noise prediction, plain squared error. Ho, Jain & Abbeel 2020",
        ("cifar10",),
        "FID 3.17",
    ),
    Paper(
        "iddpm",
        "Improved DDPM: cosine schedule, learned variance. Nichol & Dhariwal 2021",
        ("cifar10",),
        "FID 3.19, 3.17 bits/dim",
    ),
    Paper(
        "vdm",
        "VDM: the bound with a learned schedule. Kingma, Salimans, Poole & Ho 2021",
        ("cifar10", "imagenet32", "imagenet64"),
        "2.65, 3.72, 3.40 bits/dim",
    ),
    Paper(
        "edm", "EDM: preconditioning, Heun. Karras et al. 2022", ("cifar10", "imagenet64"), "FID 1.79, 1.36"
    ),
    Paper(
        "cfg", "Classifier-free guidance. Ho & Salimans 2022", ("imagenet64", "imagenet128"), "FID 1.55, 2.43"
    ),
    Paper(
        "simple_diffusion",
        "simple diffusion: shifted schedules, U-ViT. Hoogeboom, Heek & Salimans 2023",
        ("imagenet128", "imagenet256", "imagenet512"),
        "FID 1.91, 2.77, 3.54",
    ),
    Paper(
        "vdm_plus_plus",
        "VDM++: falling weightings, adaptive noise levels. Kingma & Gao 2023",
        (),
        "FID 1.43 (ImageNet-64, EDM's recipe with a falling weighting)",
    ),
    Paper("rectified_flow", "Rectified flow. Liu et al. 2022", (), "FID 2.58 (CIFAR-10)"),
    Paper(
        "stochastic_interpolant",
        "Stochastic interpolants: from blurred to sharp. Albergo, Boffi & Vanden-Eijnden 2023",
        (),
        "",
    ),
    Paper("sit", "SiT: flows on DiT. Ma et al. 2024", ("imagenet256",), "FID 2.06"),
    Paper("sd3", "SD3's flow: logit-normal times, shifted steps. Esser et al. 2024", (), ""),
    Paper(
        "sid2",
        "SiD2: sigmoid loss, residual U-ViT. Hoogeboom et al. 2024",
        ("imagenet64", "imagenet128", "imagenet256", "imagenet512"),
        "FID 1.38 (256), 1.48 (512)",
    ),
    Paper(
        "edm2",
        "EDM2: magnitude preservation, post-hoc EMA. Karras et al. 2024",
        ("imagenet512",),
        "FID 1.91 (XXL)",
    ),
)


def place(runs: Path, paper: Paper) -> Path:
    """The run folder of a laptop sibling."""
    return runs / paper.folder / "digits" / "benchmark"


def run(paper: Paper, runs: Path) -> None:
    """Train and score one laptop sibling, unless its figures are known."""
    folder = place(runs, paper)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kept = folder / "benchmark.json"
    if not kept.is_file():
        if not (folder / "export").is_dir():
            words = [f"experiment={paper.folder}/digits", f"paths.runs={runs}", "run_id=benchmark"]
            subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True, env=environment)
        trained_s = training_seconds(read(folder / "record.json"))
        words = [f"run={folder}", f"num_samples={N}"]
        subprocess.run([sys.executable, "evaluate.py", *words], cwd=ROOT, check=True, env=environment)
        subprocess.run(
            [sys.executable, "sample.py", f"run={folder}", f"num_samples={SHOWN}", f"out={folder / 'shown'}"],
            cwd=ROOT, check=True, env=environment,
        )  # fmt: skip
        records = json.loads((folder / "metrics.json").read_text())["evaluations"][-1]["records"]
        kept.write_text(json.dumps({"trained_s": trained_s, "records": records}))
    print(f"{paper.folder}: done", flush=True)


def row(paper: Paper, folder: Path) -> dict[str, Any]:
    """One row of the table; a paper that was not run yet has no figures."""
    at_scale = " ".join(f"`experiment={paper.folder}/{data}`" for data in paper.scale) or "–"
    told: dict[str, Any] = {
        "paper": paper.what,
        "at its scale": at_scale,
        "on digits": f"`experiment={paper.folder}/digits`",
        "published": paper.published or "–",
        f"here, FD@{N}": "not measured",
    }
    if not (folder / "benchmark.json").is_file():
        return told
    found = json.loads((folder / "benchmark.json").read_text())
    values = {record["metric"]: record["value"] for record in found["records"]}
    floor = next(record["real"] for record in found["records"] if record["metric"] == "frechet")
    config = read_run(folder)
    return {
        **told,
        f"here, FD@{N}": values["frechet"],
        "real data": floor,
        "recognised": f"{100 * values['accuracy']:.1f} %",
        "steps": config["grid"].get("steps", ""),
        "trained, s": round(found["trained_s"]),
    }


def picture(runs: Path) -> None:
    """A row of samples for each paper, its name before it."""
    side, gap, words = 32, 4, 120
    measured = [paper for paper in PAPERS if (place(runs, paper) / "benchmark.json").is_file()]
    height = len(measured) * (side + gap) + gap
    sheet = Image.new("L", (words + SHOWN * (side + gap) + gap, height), 255)
    draw = ImageDraw.Draw(sheet)
    for k, paper in enumerate(measured):
        top = gap + k * (side + gap)
        draw.text((gap, top + side // 3), paper.folder, fill=0)
        shown = np.load(place(runs, paper) / "shown" / "samples.npz")
        for j, image in enumerate(shown[shown.files[0]][:SHOWN]):
            large = Image.fromarray(image.squeeze()).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (words + j * (side + gap), top))
    PICTURE.parent.mkdir(exist_ok=True)
    sheet.save(PICTURE, optimize=True)


def main(words: Sequence[str] | None = None) -> None:
    """Run the papers asked for, and write the table of all that are known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[paper.folder for paper in PAPERS])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "papers")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    by_name = {paper.folder: paper for paper in PAPERS}
    wanted = [by_name[name] for name in options.only or by_name]
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(lambda paper: run(paper, options.runs.resolve()), wanted))
    picture(options.runs)
    report("papers", [row(paper, place(options.runs, paper)) for paper in PAPERS], {})


if __name__ == "__main__":
    main()
