"""What the laboratory costs: steps a second of the Lightning run over those of a bare PyTorch loop.

Both train the quickstart's network by the quickstart's loss on the quickstart's batches. The run has everything that a
run has: averages, gradient clipping and the finite check, logs, throughput, loss by noise level, progress, preemption.
The bare loop has what the method needs: batches, the loss, clipping, AdamW, one average. Rounds alternate in one
process.

    python benchmarks/train_step.py [--steps 60] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROOT, median_ratio, report
from hydra import compose, initialize_config_dir

from diffusion_lab.app.assemble import assemble
from diffusion_lab.app.build import plain
from diffusion_lab.ema import EMA, ConstantDecay
from diffusion_lab.images import to_float
from diffusion_lab.rng import StepRNG


def configured(folder: Path) -> dict:
    """Compose the quickstart with its callbacks' files in `folder` and nothing that happens but once a run."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        # pictures and checkpoints happen every tens of thousands of images; here the step itself is timed
        never = "every_images=1_000_000_000"
        cfg = compose(
            "train",
            [
                "experiment=digits/quickstart",
                f"paths.run={folder}",
                "max_images=1_000_000_000",
                "name=benchmark",
                f"callbacks.sample_grid.{never}",
                f"callbacks.checkpoints.{never}",
            ],
        )
    return plain(cfg)


class Timer:
    """Stops the run after a number of steps and tells how long they took, warm-up excluded."""

    def __init__(self, steps: int, warmup: int) -> None:
        self.steps, self.warmup, self.seconds = steps, warmup, 0.0

    def callback(self):  # noqa: ANN201 (a Lightning callback, imported late)
        """Return the callback."""
        import lightning.pytorch as pl

        timer = self

        class Stop(pl.Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:  # noqa: ANN001
                if module.step == timer.warmup:
                    timer.began = time.perf_counter()
                if module.step == timer.warmup + timer.steps:
                    timer.seconds = time.perf_counter() - timer.began
                    trainer.should_stop = True

        return Stop()


def lightning_round(configure: Callable[[Path], dict], steps: int, warmup: int) -> float:
    """Return the seconds of `steps` steps of the run that `configure` composes for a folder."""
    with tempfile.TemporaryDirectory() as folder:
        parts = assemble(configure(Path(folder)))
        timer = Timer(steps, warmup)
        parts.trainer.callbacks.append(timer.callback())
        parts.trainer.fit(parts.module, datamodule=parts.data)
    if not timer.seconds:
        raise SystemExit("the run ended before its steps were done")
    return timer.seconds


def bare_round(steps: int, warmup: int) -> float:
    """Return the seconds of `steps` steps of the loop that one would write by hand."""
    with tempfile.TemporaryDirectory() as folder:
        parts = assemble(configured(Path(folder)))
    denoiser, loss, total = parts.module.denoiser, parts.module.loss, parts.module.global_batch_size
    parameters = list(denoiser.parameters())
    optimizer = parts.module.optimizer_factory(parameters)
    average = EMA(denoiser, ConstantDecay(half_life_images=50_000))
    denoiser.train()
    parts.data.setup()
    batches = iter(parts.data.loader(start=0))
    for step in range(warmup + steps):
        if step == warmup:
            began = time.perf_counter()
        batch = next(batches)
        rng = StepRNG(seed=0, step=step, positions=slice(None), total=total)
        optimizer.zero_grad(set_to_none=True)
        loss(denoiser, to_float(batch["x0"]), {"label": batch["label"]}, rng).total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(denoiser, (step + 1) * total, total)
    return time.perf_counter() - began


def main() -> None:
    """Time both and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    bare, run = [], []
    for round_ in range(options.rounds + 1):
        pair = bare_round(options.steps, 5), lightning_round(configured, options.steps, 5)
        if round_:  # the first pair warms the machine
            bare.append(pair[0])
            run.append(pair[1])
    rows = [
        {"loop": name, "steps/s": options.steps / statistics.median(seconds), "rounds": options.rounds}
        for name, seconds in (("bare PyTorch", bare), ("diffusion_lab run", run))
    ]
    report("train_step", rows, {"run_over_bare_loop": median_ratio(bare, run)})


if __name__ == "__main__":
    main()
