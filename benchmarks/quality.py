"""Quality at equal time: our recipe and two peers', trained for the same computing time on MNIST, without labels.

    python benchmarks/quality.py [--seeds 0 1 2] [--minutes 10] [--workers 2] [--runs runs/quality] [--only NAME ...]

Ten minutes on two cores are counted as twenty minutes of processor time of one thread, so that two contenders run side
by side, on a machine that may do other things besides. Contenders: `diffusion_lab` (experiment=mnist/ten_minutes, run
as a user would, with all its callbacks), denoising-diffusion-pytorch and diffusers, each at the settings of its README
or example, and with our batch size, learning rate, decay and average ("tuned"). All networks have about as many
parameters.

What is compared is the Fréchet distance of 1,000 samples to the 60,000 training images on the features of mnist-cnn:
to draw more from the slower networks would take longer than to train them. Each model is sampled in 50 steps by DDIM
and by its stochastic form (eta = 1); the better of the two counts. Noise on the way mends what a network that has not
trained long gets wrong in the large. The floor is the same distance of as many real test images, the mean over ten
thousand of them. Models and figures are kept below --runs, so a script that was stopped goes on; seeds add up in the
result, also where their runs are gone. Results: benchmarks/results/quality.json; a strip of each contender's samples in
docs/images/quality_<contender>.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import diffusion_lab  # noqa: F401  (first: it cures torchvision)

# isort: split

import numpy as np
import torch
from common import ROOT, added_to, commit, report
from hydra import compose, initialize_config_dir
from PIL import Image
from quality_peers import PEERS, Discrete, Settings
from torch import Tensor, nn

from diffusion_lab.app.assemble import assemble
from diffusion_lab.app.build import plain
from diffusion_lab.data.mnist import MNIST
from diffusion_lab.data.order import order
from diffusion_lab.guidance import unguided
from diffusion_lab.images import to_float, to_uint8
from diffusion_lab.metrics.features import MNISTCNN
from diffusion_lab.metrics.frechet import frechet_from_stats
from diffusion_lab.metrics.stats import gaussian_stats
from diffusion_lab.process import Cosine
from diffusion_lab.samplers.ddim import DDIM
from diffusion_lab.samplers.generate import Generation
from diffusion_lab.samplers.grids import uniform_u

OURS = "diffusion_lab"
EXPERIMENT = "mnist/ten_minutes"
SHAPE = (1, 28, 28)
WIDTHS = {"denoising-diffusion-pytorch": 24, "diffusers": 28}
NAMES = [OURS, *(f"{peer}, {how}" for how in ("tuned", "default") for peer in PEERS)]
MARKS = (0.25, 0.5, 1.0)
SAMPLERS = {"ddim": (DDIM(eta=0.0), 50), "ddim, eta 1": (DDIM(eta=1.0), 50)}
ON_CURVE = "ddim, eta 1"
N, N_CURVE = 1000, 500
PROBE_S = 20.0
MARGIN = 0.97
SHOWN = 24


@cache
def images(split: str) -> Tensor:
    """The images of MNIST as bytes."""
    data = MNIST(batch_size=1, seed=0)
    return (data.train_images() if split == "train" else data.test_images())[0]


def configured(folder: Path, seed: int, max_images: int, words: Sequence[str] = ()) -> dict[str, Any]:
    """Compose our recipe, as its command line would, with `words` on top."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        fixed = [
            f"experiment={EXPERIMENT}",
            f"seed={seed}",
            f"max_images={max_images}",
            f"paths.run={folder}",
        ]
        return plain(compose("train", [*fixed, "name=quality", "trainer.accelerator=cpu", *words]))


def watcher(budget: float, marks: Sequence[float], keep: Callable[[nn.Module, dict[str, Any]], None]) -> Any:
    """A callback that keeps the average at shares of the budget, and stops the run when it is spent."""
    import lightning.pytorch as pl

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.began, self.left = time.process_time(), list(marks)

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.spent = time.process_time() - self.began
            self.seen = module.images_seen
            while self.left and self.spent >= self.left[0] * budget:
                self.keep(module, self.left.pop(0))
            if self.spent >= budget:
                trainer.should_stop = True

        def on_train_end(self, trainer: Any, module: Any) -> None:
            if self.left:  # it was through before the budget was
                self.keep(module, 1.0)

        def keep(self, module: Any, mark: float) -> None:
            facts = {"mark": mark, "seconds": self.spent, "images": self.seen}
            keep(next(iter(module.averages.values())).network, facts)

    return Watch()


def train_ours(seed: int, folder: Path, budget: float, words: Sequence[str] = ()) -> None:
    """Train our recipe, with `words` on top, as long as the budget lasts by the speed of a probe."""

    def fit(max_images: int, seconds: float, marks: Sequence[float], keep: Any) -> Any:
        parts = assemble(configured(folder / "run", seed, max_images, words))
        watch = watcher(seconds, marks, keep)
        parts.trainer.callbacks.append(watch)
        parts.trainer.fit(parts.module, datamodule=parts.data)
        return watch

    batch = configured(folder / "run", seed, 1_000_000, words)["batch_size"]
    probe = fit(1_000_000_000, PROBE_S, (), lambda *_: None)
    max_images = int(MARGIN * budget * probe.seen / probe.spent) // batch * batch
    subprocess.run(["rm", "-rf", str(folder / "run")], check=True)
    fit(max_images, budget, MARKS, lambda network, facts: store(folder, network, facts))


def train_peer(name: str, seed: int, folder: Path, budget: float) -> None:
    """Train a peer until the budget is spent."""
    peer_name, how = name.split(", ")
    config = configured(folder / "run", seed, 1_000_000)
    torch.manual_seed(seed)  # theirs draw from the global random state, the weights first
    peer = PEERS[peer_name](WIDTHS[peer_name], SHAPE, settings(config) if how == "tuned" else None)
    data, size = images("train"), peer.batch_size
    marks, seen, began = list(MARKS), 0, time.process_time()
    while marks:
        rows = order(seed, len(data), np.arange(seen, seen + size))
        peer.loss(to_float(data[torch.from_numpy(rows)])).backward()
        seen += size
        spent = time.process_time() - began
        peer.step(min(1.0, spent / budget), seen)
        while marks and spent >= marks[0] * budget:
            facts = {"mark": marks.pop(0), "seconds": spent, "images": seen}
            store(folder, peer.averaged(), facts)


def settings(config: dict[str, Any]) -> Settings:
    """What of our recipe the tuned peers take over."""
    from diffusion_lab.app.build import instantiate

    warmup = config["lr_schedule"]["warmup_images"]
    return Settings(
        batch_size=config["batch_size"],
        optimizer=instantiate(config["optimizer"], "optimizer"),
        rate=lambda share, seen: min(1.0, seen / warmup) * max(1e-3, 1.0 - share),
        profile=next(iter(instantiate(config["averages"], "averages").values())),
        clip=config["callbacks"]["gradient_norm"]["clip"],
    )


def store(folder: Path, network: nn.Module, facts: dict[str, Any]) -> None:
    """Keep the weights of an averaged network."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), folder / f"{facts['mark']}.pt")
    facts["parameters"] = sum(p.numel() for p in network.parameters())
    (folder / f"{facts['mark']}.json").write_text(json.dumps(facts))


# ---- scores ----------------------------------------------------------------------------------------------


def trained(
    name: str, folder: Path, mark: float, words: Sequence[str] = ()
) -> tuple[Any, Callable[[int], Tensor]]:
    """Return the denoiser of a mark and its grid of so many steps; ours with the words it was trained by."""
    state = torch.load(folder / f"{mark}.pt", weights_only=True)
    if name == OURS:
        denoiser = assemble(configured(folder / "scored", 0, 1_000_000, words)).module.denoiser
        denoiser.network.load_state_dict(state)
        return denoiser.eval(), lambda steps: uniform_u(Cosine(), steps)
    peer = PEERS[name.split(", ")[0]](WIDTHS[name.split(", ")[0]], SHAPE, None)
    peer.network.load_state_dict(state)
    # only to sample, which takes them a third less time so: how they train is theirs
    peer.network.to(memory_format=torch.channels_last)
    discrete: Discrete = peer.discrete(peer.network).eval()
    return discrete, discrete.grid


@torch.no_grad()
def draw(denoiser: Any, grid: Tensor, sampler: Any, n: int) -> Tensor:
    """Draw n images as bytes; sample i has the same noise for every contender."""
    generation = Generation(sampler=sampler, grid=grid, guidance=unguided, shape=SHAPE)
    blocks = [range(first, min(n, first + 100)) for first in range(0, n, 100)]
    return torch.cat([to_uint8(generation(denoiser, seeds=seeds)) for seeds in blocks])


@cache
def reference(runs: Path) -> Any:
    """Statistics of the training images, kept in a file: their features take a minute."""
    kept = runs / "features.pt"
    if not kept.is_file():
        runs.mkdir(parents=True, exist_ok=True)
        aside = runs / f"features-{os.getpid()}.part"
        torch.save(MNISTCNN().eval()(images("train")), aside)
        aside.replace(kept)
    return gaussian_stats(torch.load(kept, weights_only=True))


def distance(drawn: Tensor, runs: Path) -> float:
    """Fréchet distance to the training images."""
    return frechet_from_stats(gaussian_stats(MNISTCNN().eval()(drawn)), reference(runs))


def score(name: str, folder: Path) -> dict[str, Any]:
    """Score all marks of a trained contender."""
    curve, final = [], {}
    for mark in MARKS:
        denoiser, grid = trained(name, folder, mark)
        facts = json.loads((folder / f"{mark}.json").read_text())
        for key, (sampler, steps) in SAMPLERS.items():
            if mark != MARKS[-1] and key != ON_CURVE:
                continue
            drawn = draw(denoiser, grid(steps), sampler, N_CURVE if mark != MARKS[-1] else N)
            if key == ON_CURVE:
                curve.append({**facts, "fd": distance(drawn[:N_CURVE], folder.parent)})
            if mark == MARKS[-1]:
                final[key] = distance(drawn, folder.parent)
                np.save(folder / f"{key}.npy", drawn[:40].numpy())
    return {"curve": curve, "final": final}


def worker(name: str, seed: int, folder: Path, budget: float) -> None:
    """Train and score one contender, unless it is done."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{MARKS[-1]}.pt").is_file():
        (train_ours(seed, folder, budget) if name == OURS else train_peer(name, seed, folder, budget))
    (folder / "score.json").write_text(json.dumps(score(name, folder) | {"commit": commit()}))


# ---- the whole -------------------------------------------------------------------------------------------


def place(runs: Path, name: str, seed: int, minutes: float) -> Path:
    """Folder of a contender."""
    return runs / f"{name.replace(', ', '-')}-{seed}-{minutes:g}min"


def run(name: str, seed: int, runs: Path, minutes: float) -> None:
    """Let a process of its own do one contender, unless its figures are known."""
    folder = place(runs, name, seed, minutes)
    if not (folder / "score.json").is_file():
        words = ["--worker", name, "--seed", str(seed), "--runs", str(runs), "--minutes", str(minutes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        runs.mkdir(parents=True, exist_ok=True)
        with (runs / f"{folder.name}.log").open("w") as log:
            subprocess.run(
                [sys.executable, __file__, *words], check=True, env=environment, stdout=log, stderr=log
            )
    print(f"{name}, seed {seed}: done", flush=True)


def by_seed(runs: Path, minutes: float, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What is known here of each contender and seed."""
    files = {
        (name, seed): place(runs, name, seed, minutes) / "score.json" for name in NAMES for seed in seeds
    }
    return [
        {"contender": name, "seed": seed, "minutes": minutes, **json.loads(file.read_text())}
        for (name, seed), file in files.items()
        if file.is_file()
    ]


def summary(
    runs: Path, minutes: float, each: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and ratios of what is known."""
    test = images("test")
    floor = statistics.mean(distance(test[first :: len(test) // N], runs) for first in range(len(test) // N))
    rows, best = [], {}
    for name in NAMES:
        found = [one for one in each if (one["contender"], one["minutes"]) == (name, minutes)]
        if not found:
            continue
        asked = [key for key in SAMPLERS if all(key in one["final"] for one in found)]
        means = {key: statistics.mean(one["final"][key] for one in found) for key in asked}
        key = min(means, key=lambda key: means[key])
        best[name] = means[key]
        last = [one["curve"][-1] for one in found]
        row = {
            "contender": name,
            "parameters, M": last[0]["parameters"] / 1e6,
            "images a CPU-second": statistics.mean(one["images"] / one["seconds"] for one in last),
            "images": [one["images"] for one in last],
            f"FD@{N}": means[key],
            "seeds": [one["final"][key] for one in found],
            "sampler": f"{key}, {SAMPLERS[key][1]} NFE",
        }
        for k, mark in enumerate(MARKS[:-1]):
            row[f"FD@{N_CURVE} at {mark * minutes:g} min"] = statistics.mean(
                one["curve"][k]["fd"] for one in found
            )
        rows.append(row)
    rows.append({"contender": "real test images", f"FD@{N}": floor})
    ratios = {}
    tuned = [value for name, value in best.items() if name.endswith("tuned")]
    if OURS in best:
        ratios["twice_the_floor_over_ours"] = 2 * floor / best[OURS]
        for name, value in best.items():
            if name != OURS:
                ratios[name] = value / best[OURS]
        if tuned:
            ratios["better_tuned_peer_over_1.2_ours"] = min(tuned) / (1.2 * best[OURS])
    return rows, ratios


def main(words: Sequence[str] | None = None) -> None:
    """Run the contenders asked for, and report on all that are known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    runs = options.runs.resolve()
    if options.worker:
        folder = place(runs, options.worker, options.seed, options.minutes)
        worker(options.worker, options.seed, folder, 2 * 60 * options.minutes)
        return
    torch.set_num_threads(1)
    jobs = [(name, seed) for seed in options.seeds for name in options.only]
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(lambda job: run(*job, runs, options.minutes), jobs))
    each = added_to(
        "quality", by_seed(runs, options.minutes, options.seeds), ("contender", "seed", "minutes")
    )
    rows, ratios = summary(runs, options.minutes, each)
    pictures(runs, options.minutes, options.seeds[0])
    report("quality", rows, ratios, {"by_seed": each})


def pictures(runs: Path, minutes: float, seed: int) -> None:
    """A strip of samples for each contender that is at hand, the same noise in every column, and one of real images."""
    places = {name: place(runs, name, seed, minutes) for name in NAMES}
    strips = {"real": images("test")[:SHOWN].numpy()}
    for name, folder in places.items():
        if (folder / "score.json").is_file():
            final = json.loads((folder / "score.json").read_text())["final"]
            strips[name] = np.load(folder / f"{min(final, key=final.get)}.npy")[:SHOWN]
    for name, strip in strips.items():
        spaced = np.pad(strip[:, 0], ((0, 0), (0, 0), (0, 2)), constant_values=255)
        sheet = Image.fromarray(np.concatenate(spaced, axis=1))
        sheet.save(ROOT / "docs" / "images" / f"quality_{name.replace(', ', '_')}.png", optimize=True)


if __name__ == "__main__":
    main()
