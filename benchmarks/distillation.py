"""Distillation: every method's students of 1, 2, 4 and 8 steps beside their teacher, on digits and on MNIST.

    python benchmarks/distillation.py [--data digits] [--seeds 3] [--only progressive ...] [--runs runs/distillation]
                                      [--workers 2]

Trains a teacher a seed, and from it the students of every method as their laptop recipes say (`METHODS`, under four
minutes each on a core). Each is asked for as many samples as there are test images: Fréchet distance, precision and
recall. What a training costs is told in evaluations of the teacher: processor seconds of the whole command over those
of one image in one call.

Known runs and figures are kept below --runs, so a script that was stopped goes on and seeds add up. Results:
benchmarks/results/distillation_<data>.json; samples side by side in docs/images/distillation_<data>.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, report
from PIL import Image, ImageDraw

from diffusion_lab.app.build import load_denoiser

TEACHERS = {"digits": "digits/quickstart", "mnist": "mnist/quickstart"}
SAMPLES = {"digits": 1437, "mnist": 2000}
STEPS = (1, 2, 4, 8)
MANY = 256
SCALE = 2
PLAIN = ("guidance=none", "modifiers=static_threshold", "grid=uniform_u", "sampler=ddim")
"""How the teacher is sampled: as its students learn to step."""
SHOWN = 16
COLUMNS = {"FD": "frechet", "precision": "precision", "recall": "recall"}


TEACHERS_AS = {"": PLAIN, "guided-": ("guidance=cfg", f"guidance.scale={SCALE}", *PLAIN[1:])}


@dataclass(frozen=True)
class Method:
    """Students of a teacher.

    Attributes:
        experiment: Folder and file of conf/experiment; `{data}` is the data set's.
        steps: Numbers of steps that it has students for.
        words: More words to train a student of N steps, `{steps}`.
        asked: Words to sample that student by.
        one_run: Whether one run has all students.
        of: The method whose student is the teacher; "" for the teacher itself.
        guided: Whether it is compared with the guided teacher.
    """

    experiment: str
    steps: Sequence[int] = STEPS
    words: Sequence[str] = ()
    asked: Sequence[str] = ()
    one_run: bool = False
    of: str = ""
    guided: bool = False


HALVED = ("ema=steps_{steps}", "grid.steps={steps}")
AT_SCALE = f"guidance.scale={SCALE}"
METHODS = {
    "progressive": Method("progressive/{data}", asked=HALVED, one_run=True),
    "consistency": Method("consistency/{data}", words=("method.steps={steps}",)),
    "consistency training": Method(
        "consistency/{data}", words=("method.steps={steps}", "method.from_data=true")
    ),
    "moment matching": Method("moment_matching/{data}", words=("method.steps={steps}",)),
    "moment matching, instant": Method("moment_matching/{data}_instant", steps=(8,)),
    "EM, K = 16": Method("em/{data}", steps=(1,)),
    "EM, K = 1": Method(
        "em/{data}", steps=(1,), words=("method.loss.langevin_steps=1", "method.loss.gamma_z=0")
    ),
    "distribution matching": Method("distribution_matching/{data}", steps=(1,)),
    "sCM": Method("scm/{data}", asked=("grid.steps={steps}",), one_run=True),
    "shortcut": Method("shortcut/{data}", asked=("grid.steps={steps}",), one_run=True),
    "reflow": Method("reflow/{data}", asked=("grid.steps={steps}",), one_run=True),
    "reflow, one step": Method("reflow/{data}_one_step", steps=(1,), of="reflow"),
    "guided": Method(
        "guided_distillation/{data}", steps=(MANY,), asked=(AT_SCALE, "grid.steps={steps}"), guided=True
    ),
    "guided, progressive": Method(
        "guided_distillation/{data}_steps", asked=(AT_SCALE, *HALVED), one_run=True, of="guided", guided=True
    ),
    "guided, stochastic": Method(
        "guided_distillation/{data}_stochastic",
        steps=(2, 4, 8),
        asked=(AT_SCALE, *HALVED),
        one_run=True,
        of="guided",
        guided=True,
    ),
}


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
    return folder


def scored(folder: Path, key: str, n: int, words: Sequence[str]) -> dict[str, Any]:
    """Score a run sampled in one way, unless that is known, and return the figures."""
    kept = folder / "benchmark" / f"{key}.json"
    if not kept.is_file():
        out = folder / "benchmark" / key
        call(
            "evaluate.py",
            f"run={folder}",
            f"out={out}",
            f"num_samples={n}",
            "measures=[frechet,prdc]",
            *words,
        )
        records = json.loads((out / "metrics.json").read_text())["evaluations"][-1]["records"]
        found = {record["metric"]: record["value"] for record in records}
        floor = {f"real {record['metric']}": record["real"] for record in records}
        kept.write_text(json.dumps(found | floor))
    return dict(json.loads(kept.read_text()))


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
    return runs / data / f"{name.replace(' ', '_')}-{'all' if many else steps}-{seed}"


def teach(runs: Path, data: str, seed: int, *, guided: bool) -> None:
    """Train and score a teacher; with guidance too, if there are students to be compared with that."""
    folder = train(teacher_of(runs, data, seed), f"experiment={TEACHERS[data]}", f"seed={seed}")
    for key, words in TEACHERS_AS.items():
        for steps in (*STEPS, MANY) if guided or not key else ():
            scored(folder, f"{key}{steps}", SAMPLES[data], [*words, f"grid.steps={steps}"])


def distil(runs: Path, data: str, name: str, steps: int, seed: int) -> None:
    """Train and score a student."""
    method = METHODS[name]
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
        scored(folder, f"{one}", SAMPLES[data], [word.format(steps=one) for word in method.asked])
    print(f"{name}, {'all' if method.one_run else steps} steps, seed {seed}: done", flush=True)


def figures(folders: Sequence[Path], key: str) -> dict[str, Any] | None:
    """Mean over seeds of what is known of students, with their number."""
    files = [folder / "benchmark" / f"{key}.json" for folder in folders]
    found = [json.loads(file.read_text()) for file in files if file.is_file()]
    if not found:
        return None
    told = {column: statistics.mean(one[metric] for one in found) for column, metric in COLUMNS.items()}
    return {**told, "each": [one["frechet"] for one in found], "seeds": len(found)}


def summary(runs: Path, data: str, seeds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and ratios of what is known."""
    rows: list[dict[str, Any]] = []
    teachers = [teacher_of(runs, data, seed) for seed in range(seeds)]
    known = [folder for folder in teachers if (folder / "benchmark" / f"{MANY}.json").is_file()]
    shape = (1, 8, 8) if data == "digits" else (1, 28, 28)
    second = statistics.mean(evaluation_s(folder, shape) for folder in known)
    floors = [json.loads((folder / "benchmark" / f"{MANY}.json").read_text()) for folder in known]
    floor = {
        column: statistics.mean(one[f"real {metric}"] for one in floors) for column, metric in COLUMNS.items()
    }
    rows.append({"method": "real images", **floor})
    best: dict[str, float] = {}
    for key in TEACHERS_AS:
        for steps in (MANY, *reversed(STEPS)):
            told = figures(teachers, f"{key}{steps}")
            if told is not None:
                best[f"{key}{steps}"] = told["FD"]
                name = f"teacher, DDIM{f', guidance {SCALE}' if key else ''}"
                rows.append({"method": name, "steps": steps, **told})
    ratios = {}
    for name, method in METHODS.items():
        for steps in sorted(method.steps, reverse=True):
            folders = [student_of(runs, data, name, steps, seed) for seed in range(seeds)]
            told = figures(folders, f"{steps}")
            if told is None:
                continue
            files = [folder / "benchmark" / "seconds" for folder in folders]
            spent = [sum(map(float, file.read_text().split())) for file in files if file.is_file()]
            cost = statistics.mean(spent) / second / 1e6
            rows.append({"method": name, "steps": steps, **told, "cost, M teacher evaluations": cost})
            key = "guided-" if method.guided else ""
            ratios[f"{name}, {steps}: teacher of {MANY} steps over it"] = best[f"{key}{MANY}"] / told["FD"]
            if steps != MANY:
                ratios[f"{name}, {steps}: teacher of as many steps over it"] = (
                    best[f"{key}{steps}"] / told["FD"]
                )
    return rows, ratios


def drawn(place: Path) -> np.ndarray:
    """The first samples of a scored run, bytes `(SHOWN, C, H, W)`."""
    evaluation = json.loads((place / "metrics.json").read_text())["evaluations"][-1]
    with np.load(Path(evaluation["samples"]) / "samples.npz") as stored:
        images: np.ndarray = stored["images"][:SHOWN]
    return images


def picture(runs: Path, data: str) -> None:
    """A row of samples for the teacher and each student of the first seed, all from the same noise."""
    side, gap, words = 32, 3, 170
    lines: list[tuple[str, Path]] = [
        (f"teacher, {steps}", teacher_of(runs, data, 0) / "benchmark" / f"{steps}") for steps in (MANY, 4, 1)
    ]
    for name, method in METHODS.items():
        lines += [
            (f"{name}, {steps}", student_of(runs, data, name, steps, 0) / "benchmark" / f"{steps}")
            for steps in sorted(method.steps, reverse=True)
        ]
    lines = [(label, place) for label, place in lines if (place / "metrics.json").is_file()]
    sheet = Image.new("L", (words + SHOWN * (side + gap), len(lines) * (side + gap)), 255)
    pen = ImageDraw.Draw(sheet)
    for k, (label, place) in enumerate(lines):
        pen.text((2, k * (side + gap) + 10), label, fill=0)
        for j, image in enumerate(drawn(place)):
            large = Image.fromarray(np.squeeze(image)).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (words + j * (side + gap), k * (side + gap)))
    sheet.save(ROOT / "docs" / "images" / f"distillation_{data}.png", optimize=True)


def main(words: Sequence[str] | None = None) -> None:
    """Train and score what is asked for, and report on all that is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=list(TEACHERS), default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", nargs="+", type=int, choices=STEPS, default=list(STEPS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "distillation")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(words)
    runs = options.runs.resolve()
    with ThreadPoolExecutor(options.workers) as pool:
        guided = any(METHODS[name].guided for name in options.only)
        list(pool.map(lambda seed: teach(runs, options.data, seed, guided=guided), range(options.seeds)))
        # students of students after their teachers
        for later in (False, True):
            jobs = [
                (name, steps, seed)
                for seed in range(options.seeds)
                for name in options.only
                if bool(METHODS[name].of) == later
                for steps in (METHODS[name].steps[:1] if METHODS[name].one_run else METHODS[name].steps)
                if METHODS[name].one_run or steps in (*options.steps, MANY)
            ]
            list(pool.map(lambda job: distil(runs, options.data, *job), jobs))
    rows, ratios = summary(runs, options.data, options.seeds)
    picture(runs, options.data)
    report(f"distillation_{options.data}", rows, ratios)


if __name__ == "__main__":
    main()
