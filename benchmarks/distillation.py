"""Distillation: every method's students of 1, 2, 4 and 8 steps beside their teacher, on digits and on MNIST.

    python benchmarks/distillation.py [--data digits] [--seeds 0 1 2] [--only progressive ...] [--workers 2]
                                      [--runs runs/distillation]

Trains a teacher a seed, and from it the students of every method as their laptop recipes say (`METHODS`). Each is asked
for `SAMPLES`, of digits as many as there are training images: Fréchet distance from the test images and from the
training images, precision and recall. What a training costs is told in evaluations of the
teacher: processor seconds of the whole command over those of one image in one call.

Known runs and figures are kept below --runs, so a script that was stopped goes on. Figures are added to what the result
holds already: seeds add up, also where their runs are gone. Results: benchmarks/results/distillation_<data>.json;
samples side by side in docs/images/distillation_<data>.png, made where all runs of a seed are at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, added_to, commit, report
from distillation_methods import MANY, METHODS, SCALE, STEPS, methods
from PIL import Image, ImageDraw
from torch import Tensor

from diffusion_lab.app.build import load_denoiser
from diffusion_lab.data.digits import Digits
from diffusion_lab.data.mnist import MNIST
from diffusion_lab.metrics.features import MNISTCNN, CNNFeatures, DigitsCNN
from diffusion_lab.metrics.frechet import frechet_from_stats
from diffusion_lab.metrics.stats import GaussianStats, gaussian_stats

TEACHERS = {
    "digits": ("experiment=digits/quickstart",),
    "mnist": ("experiment=mnist/ten_minutes", "num_classes=10"),
}
SAMPLES = {"digits": 1437, "mnist": 1000}
PLAIN = ("guidance=none", "modifiers=static_threshold", "grid=uniform_u", "sampler=ddim")
"""How the teacher is sampled: as its students learn to step."""
SHOWN = 16
COLUMNS = {"FD": "frechet", "FD, training": "training", "precision": "precision", "recall": "recall"}
ANCESTRAL = ("sampler=ddpm", "sampler.interpolation=0.0")
TEACHERS_AS = {
    "": ("teacher, DDIM", PLAIN, (*STEPS, MANY)),
    "ancestral-": ("teacher, ancestral", (*PLAIN[:-1], *ANCESTRAL), (MANY,)),
    "guided-": (
        f"teacher, DDIM, guidance {SCALE}",
        ("guidance=cfg", f"guidance.scale={SCALE}", *PLAIN[1:]),
        (*STEPS, MANY),
    ),
}
"""Ways of asking the teacher: what they are called, the words, and the numbers of steps."""


def call(*words: str) -> float:
    """Run a command of the repository on one thread; return the processor seconds it took."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return usage.ru_utime + usage.ru_stime


def train(folder: Path, *words: str) -> Path:
    """Train a run, unless it is there, and return its folder."""
    if not (folder / "export").is_dir():
        names = [f"paths.runs={folder.parent.parent}", f"name={folder.parent.name}", f"run_id={folder.name}"]
        spent = call("train.py", *names, "resume=auto", *words)
        (folder / "benchmark").mkdir(exist_ok=True)
        with (folder / "benchmark" / "seconds").open("a") as file:
            file.write(f"{spent}\n")
        (folder / "benchmark" / "commit").write_text(commit())
    return folder


@cache
def extractor(data: str) -> CNNFeatures:
    """The network that the distances are taken by."""
    return DigitsCNN() if data == "digits" else MNISTCNN()


def summed_up(data: str, images: Tensor) -> GaussianStats:
    """Mean and covariance of the features of images, bytes `(N, C, H, W)`."""
    return gaussian_stats(torch.cat([extractor(data)(part) for part in images.split(1000)]))


@cache
def real(data: str) -> tuple[GaussianStats, float]:
    """Summary of the training images, and how far from them as many test images are as there are, or are samples."""
    source = Digits(batch_size=1, seed=0) if data == "digits" else MNIST(batch_size=1, seed=0)
    training, test = summed_up(data, source.train_images()[0]), source.test_images()[0]
    parts = max(1, len(test) // SAMPLES[data])
    each = [frechet_from_stats(summed_up(data, test[first::parts]), training) for first in range(parts)]
    return training, statistics.mean(each)


def scored(folder: Path, key: str, data: str, words: Sequence[str]) -> None:
    """Score a run sampled in one way, unless that is known."""
    kept = folder / "benchmark" / f"{key}.json"
    out = folder / "benchmark" / key
    if not kept.is_file():
        call(
            "evaluate.py",
            f"run={folder}",
            f"out={out}",
            f"num_samples={SAMPLES[data]}",
            "measures=[frechet,prdc]",
            *words,
        )
        records = json.loads((out / "metrics.json").read_text())["evaluations"][-1]["records"]
        found = {record["metric"]: record["value"] for record in records}
        floor = {f"real {record['metric']}": record["real"] for record in records}
        kept.write_text(json.dumps(found | floor))
    told = json.loads(kept.read_text())
    if "training" not in told:
        training, floor = real(data)
        images = torch.from_numpy(drawn(out)).movedim(3, 1)
        told["training"] = frechet_from_stats(summed_up(data, images), training)
        kept.write_text(json.dumps(told | {"real training": floor}))


@torch.no_grad()
def evaluation_s(folder: Path, shape: Sequence[int], batch: int = 128) -> float:
    """Processor seconds that one image takes in one call of a run's network, on one thread."""
    torch.set_num_threads(1)
    denoiser = load_denoiser(folder).denoiser
    x, logsnr = torch.randn(batch, *shape), torch.zeros(batch)
    taken = []
    for _ in range(12):
        began = time.process_time()
        denoiser(x, logsnr, {"label": torch.zeros(batch, dtype=torch.int64)})
        taken.append(time.process_time() - began)
    return statistics.median(taken[2:]) / batch


def teacher_of(runs: Path, data: str, seed: int) -> Path:
    """The teacher of a seed."""
    return runs / data / f"teacher-{seed}"


def student_of(runs: Path, data: str, name: str, steps: int, seed: int) -> Path:
    """The run that has a method's student of so many steps."""
    many = METHODS[name].one_run
    return runs / data / f"{re.sub('[^A-Za-z0-9]+', '_', name)}-{'all' if many else steps}-{seed}"


def teach(runs: Path, data: str, seed: int, *, guided: bool) -> None:
    """Train and score a teacher; with guidance too, if there are students to be compared with that."""
    folder = train(teacher_of(runs, data, seed), *TEACHERS[data], f"seed={seed}")
    for key, (_, words, numbers) in TEACHERS_AS.items():
        for steps in numbers if guided or key != "guided-" else ():
            scored(folder, f"{key}{steps}", data, [*words, f"grid.steps={steps}"])


def distil(runs: Path, data: str, name: str, steps: int, seed: int) -> None:
    """Train and score a student."""
    method = methods(data)[name]
    teacher = teacher_of(runs, data, seed)
    if method.of:
        teacher = student_of(runs, data, method.of, METHODS[method.of].steps[0], seed)
    folder = student_of(runs, data, name, steps, seed)
    words = [word.format(steps=steps) for word in method.words]
    train(
        folder,
        f"experiment={method.experiment.format(data=data)}",
        f"method.teacher.run={teacher}",
        f"seed={seed}",
        *words,
    )
    for one in method.steps if method.one_run else (steps,):
        scored(folder, f"{one}", data, [word.format(steps=one) for word in method.asked])
    print(f"{name}, {'all' if method.one_run else steps} steps, seed {seed}: done", flush=True)


def known(folder: Path, key: str) -> dict[str, float] | None:
    """What is known of a run sampled in one way."""
    file = folder / "benchmark" / f"{key}.json"
    return dict(json.loads(file.read_text())) if file.is_file() else None


def by_seed(runs: Path, data: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each thing that is known here of each seed: real images, teachers, students."""
    rows: list[dict[str, Any]] = []
    shape = (1, 8, 8) if data == "digits" else (1, 28, 28)
    for seed in seeds:
        teacher = teacher_of(runs, data, seed)
        if (found := known(teacher, f"{MANY}")) is None:
            continue

        def row(
            name: str, found: dict[str, float], folder: Path, prefix: str = "", seed: int = seed
        ) -> dict[str, Any]:
            told = {column: found[f"{prefix}{metric}"] for column, metric in COLUMNS.items()}
            trained_at = (folder / "benchmark" / "commit").read_text()
            return {"method": name, "seed": seed, **told, "commit": trained_at}

        rows.append(row("real images", found, teacher, "real "))
        for key, (name, _, numbers) in TEACHERS_AS.items():
            for steps in sorted(numbers, reverse=True):
                if (found := known(teacher, f"{key}{steps}")) is not None:
                    rows.append(row(name, found, teacher) | {"steps": steps})
        second = evaluation_s(teacher, shape)
        taught = float((teacher / "benchmark" / "seconds").read_text().split()[0])
        for name, method in methods(data).items():
            for steps in sorted(method.steps, reverse=True):
                folder = student_of(runs, data, name, steps, seed)
                if (found := known(folder, f"{steps}")) is None:
                    continue
                spent = sum(map(float, (folder / "benchmark" / "seconds").read_text().split()))
                rows.append(
                    row(name, found, folder)
                    | {"steps": steps, "cost, M teacher evaluations": spent / second / 1e6}
                    | {"cost / teacher's training": spent / taught, "CPU min": spent / 60}
                )
    return rows


def summary(each: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Means over seeds, and how much nearer than its teacher each student is, over the seeds that it has."""
    cells: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for row in each:
        cells.setdefault((row["method"], row.get("steps")), []).append(row)
    rows = []
    for (name, steps), found in cells.items():
        told = dict.fromkeys(column for row in found for column in row)
        means = {
            column: statistics.mean(row[column] for row in found if column in row)
            for column in told
            if column not in ("method", "steps", "seed", "commit")
        }
        rows.append({"method": name, "steps": steps or "", **means, "seeds": len(found)})
    ratios = {}
    for (name, steps), found in cells.items():
        if name not in METHODS:
            continue
        teacher = TEACHERS_AS["guided-" if METHODS[name].guided else ""][0]
        seeds = {row["seed"] for row in found}
        mean = statistics.mean(row["FD"] for row in found)
        for words, of in {f"{MANY} steps": MANY, "as many steps": steps}.items():
            if words == "as many steps" and steps == MANY:
                continue  # said already
            its = statistics.mean(row["FD"] for row in cells[teacher, of] if row["seed"] in seeds)
            ratios[f"{name}, {steps}: teacher of {words} over it"] = its / mean
    return rows, ratios


def drawn(place: Path) -> np.ndarray:
    """The samples of a scored run, bytes `(N, H, W, C)`, also where its folder was moved."""
    evaluation = json.loads((place / "metrics.json").read_text())["evaluations"][-1]
    run = place.parents[1]
    with np.load(run / "samples" / Path(evaluation["samples"]).name / "samples.npz") as stored:
        images: np.ndarray = stored["images"]
    return images


def picture(runs: Path, data: str, seed: int) -> None:
    """A row of samples for the teacher and each student of a seed, all from the same noise, if all are at hand."""
    side, gap, words = 32, 3, 170
    lines: list[tuple[str, Path]] = [
        (f"teacher, {steps}", teacher_of(runs, data, seed) / "benchmark" / f"{steps}")
        for steps in (MANY, 4, 1)
    ]
    for name, method in methods(data).items():
        lines += [
            (f"{name}, {steps}", student_of(runs, data, name, steps, seed) / "benchmark" / f"{steps}")
            for steps in sorted(method.steps, reverse=True)
        ]
    if not all((place / "metrics.json").is_file() for _, place in lines):
        return
    sheet = Image.new("L", (words + SHOWN * (side + gap), len(lines) * (side + gap)), 255)
    pen = ImageDraw.Draw(sheet)
    for k, (label, place) in enumerate(lines):
        pen.text((2, k * (side + gap) + 10), label, fill=0)
        for j, image in enumerate(drawn(place)[:SHOWN]):
            large = Image.fromarray(np.squeeze(image)).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (words + j * (side + gap), k * (side + gap)))
    sheet.save(ROOT / "docs" / "images" / f"distillation_{data}.png", optimize=True)


def main(words: Sequence[str] | None = None) -> None:
    """Train and score what is asked for, and report on all that is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=list(TEACHERS), default="digits")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", nargs="+", type=int, choices=STEPS, default=list(STEPS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "distillation")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(words)
    runs, offered = options.runs.resolve(), methods(options.data)
    chosen = {name: offered[name] for name in options.only if name in offered}
    with ThreadPoolExecutor(options.workers) as pool:
        guided = any(method.guided for method in chosen.values())
        list(pool.map(lambda seed: teach(runs, options.data, seed, guided=guided), options.seeds))
        # students of students after their teachers
        for later in (False, True):
            jobs = [
                (name, steps, seed)
                for seed in options.seeds
                for name, method in chosen.items()
                if bool(method.of) == later
                for steps in (method.steps[:1] if method.one_run else method.steps)
                if method.one_run or steps in (*options.steps, MANY)
            ]
            list(pool.map(lambda job: distil(runs, options.data, *job), jobs))
    found = by_seed(runs, options.data, options.seeds)
    each = added_to(f"distillation_{options.data}", found, ("method", "steps", "seed"))
    rows, ratios = summary(each)
    picture(runs, options.data, options.seeds[0])
    measure = (
        f"FD@{SAMPLES[options.data]} ({options.data}-cnn) from the test images (and from the training images)"
    )
    report(f"distillation_{options.data}", rows, ratios, {"by_seed": each, "measure": measure})


if __name__ == "__main__":
    main()
