"""What the laboratory costs a student: its steps a second over those of the method as a bare loop, and memory.

Each method's recipe on digits, `experiment=<method>/digits`, runs as `train.py` would run it, with all its callbacks
but what happens once in tens of thousands of images (pictures, checkpoints, Fréchet distance). Its peer is the loop
that one would write from the paper (`distillation_loops.py`, `distillation_loops_players.py`): the same networks,
called as often, on the same batches, the same clipping, Adam and averages. Both take turns in one process, some steps
each. Time is the processor's, so that other jobs are not counted; a ratio is the median over rounds. sCM is past its
tangent warm-up; reflow is taken twice, with new pairs in every step and with pairs that are there already. The teacher
is the quickstart's network with weights at random: what they are costs no time.

    python benchmarks/distillation_speed.py [--steps 6] [--rounds 15] [--only consistency ...] [--check]

--check times nothing: it gives loop and laboratory the same weights and random numbers, and fails unless losses and
gradients agree.

Memory: bytes held by weights, gradients, Adam's moments and averages, and what the graph of a step keeps for the way
back, the most at once, for each image (saved tensors but for parameters, each storage once). On digits of a real step;
of the papers' ImageNet recipes what is held, counted on the meta device.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusion_lab  # noqa: F401  (first: it cures torchvision)

# isort: split

import lightning.pytorch as pl
import torch
from common import ROOT, median_ratio, report
from distillation_loops import (
    Consistency,
    ContinuousConsistency,
    Guided,
    Loop,
    Progressive,
    Reflow,
    Settings,
    Shortcut,
)
from distillation_loops_players import EM, DistributionMatching, MomentMatching
from distillation_memory import THIRD, Graph, counted, measured, memory_row, size
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_lab.app.assemble import Parts, assemble
from diffusion_lab.app.build import plain
from diffusion_lab.app.teacher import complete, plan
from diffusion_lab.rng import StepRNG

NEVER = 1_000_000_000


@dataclass(frozen=True)
class Method:
    """A method and its peer.

    Attributes:
        experiment: Folder of conf/experiment.
        loop: The peer.
        told: What the peer is told of the method.
        words: More words for the run.
    """

    experiment: str
    loop: type[Loop]
    told: Mapping[str, Any] = field(default_factory=dict)
    words: Sequence[str] = ()


def em(k: int, gamma_z: float) -> Method:
    """EM distillation by K of Langevin's steps."""
    told = {"score_steps": 2, "K": k, "gamma_eps": 0.16, "gamma_z": gamma_z}
    return Method("em", EM, told, (f"method.loss.langevin_steps={k}", f"method.loss.gamma_z={gamma_z}"))


METHODS = {
    "progressive": Method("progressive", Progressive, {"steps": 32}),
    "consistency": Method(
        "consistency",
        Consistency,
        {"steps": 4, "teacher_steps": 64, "huber": 1e-4, "x_var": 0.75},
        ("method.teacher_steps.first=64", "method.teacher_steps.last=64", "method.loss.huber=1e-4"),
    ),
    "moment matching": Method("moment_matching", MomentMatching, {"steps": 8}),
    "EM, K = 1, gamma_z = 0": em(1, 0.0),
    "EM, K = 4": em(4, 1.6e-5),
    "distribution matching": Method("distribution_matching", DistributionMatching, {"score_steps": 5}),
    "guided": Method("guided_distillation", Guided),
    "sCM": Method(
        "scm", ContinuousConsistency, {"c": 0.1}, ("method.ramp_images=0", "method.loss.normalise=0.1")
    ),
    "shortcut": Method("shortcut", Shortcut, {"share": 0.5}),
    "reflow, new pairs": Method("reflow", Reflow, {"steps": 16}, ("method.pairs=null",)),
    "reflow, kept pairs": Method("reflow", Reflow, {"steps": 16, "kept": 4}, ("method.pairs=512",)),
}
PAPERS = ("em", "distribution_matching", "moment_matching", "guided_distillation")


# ---- both sides --------------------------------------------------------------------------------------------------


def composed(*words: str) -> Any:
    """Compose a config as `train.py` does."""
    argv = complete(words).argv
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("train", argv)
    plan(cfg)
    return cfg


def configured(method: Method, teacher: Path, folder: Path) -> dict[str, Any]:
    """The config of a run in `folder` without what happens but once in tens of thousands of images."""
    seldom = [f"callbacks.{name}.every_images={NEVER}" for name in ("sample_grid", "checkpoints", "frechet")]
    words = [f"experiment={method.experiment}/digits", f"method.teacher.run={teacher}", f"paths.run={folder}"]
    return plain(composed(*words, "name=benchmark", f"max_images={NEVER}", *seldom, *method.words))


def scatter(networks: Iterable[nn.Module], std: float) -> None:
    """Move networks apart: where they agree most methods have nothing to learn."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (p for network in networks for p in network.parameters()):
            p += std * torch.randn(p.shape, generator=generator)


def exported(folder: Path) -> Path:
    """Write an export of the quickstart's network at random, and return its folder."""
    config = plain(composed("experiment=digits/quickstart", "name=benchmark", f"paths.run={folder}"))
    module = assemble(config).module
    scatter([module.denoiser], std=0.02)
    kept = {key: value for key, value in config.items() if key not in ("launcher", "sweep")}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(kept)))
    weights = {name: tensor.contiguous() for name, tensor in module.denoiser.state_dict().items()}
    save_file(weights, folder / "ema.safetensors")
    return folder


def networks(module: Any) -> dict[str, nn.Module]:
    """The networks of a module that is distilled, as a loop calls them."""
    found = {"student": module.denoiser, "teacher": module.teacher}
    found |= {name: getattr(module, name) for name in THIRD[:2] if hasattr(module, name)}
    return {name: denoiser.network for name, denoiser in found.items()}


def settings(config: Mapping[str, Any], method: Method) -> Settings:
    """The recipe in plain numbers."""
    groups, decay = config["method"].get("groups") or {}, config["lr_schedule"]
    adam = {key: config["optimizer"][key] for key in ("lr", "betas", "eps")}
    parts = {"denoiser": "student", "auxiliary": "auxiliary", "score": "score"}
    linear = method.loop is not Progressive  # whose rate falls from the first step, to nothing
    return Settings(
        adam={name: adam | groups.get(part, {}) for part, name in parts.items()},
        batch=config["batch_size"],
        clip=config["callbacks"]["gradient_norm"]["clip"],
        max_images=config["max_images"],
        warmup=decay["warmup_images"] if linear else 0,
        final=decay["final"] if linear else 0.0,
        half_lives=tuple(profile["half_life_images"] for profile in config["averages"].values()),
        method=method.told,
    )


# ---- time --------------------------------------------------------------------------------------------------------


class Rounds(pl.Callback):
    """Times a run and its peer in turns: some steps of the one, then as many of the other, within the run.

    Args:
        loop: The peer.
        steps: Of a turn, a multiple of the method's own turns.
        rounds: Turns that count; one goes before, in which the memory of the run's steps is measured.
    """

    def __init__(self, loop: Loop, steps: int, rounds: int) -> None:
        self.loop, self.steps, self.rounds = loop, steps, rounds
        self.run: list[float] = []
        self.bare: list[float] = []
        self.began = 0.0
        self.graph = Graph()
        self.gradients = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Look at the graphs of the first turn."""
        if module.step < self.steps:
            self.graph.watch([*module.parameters(), *module.teacher.parameters()])

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        """What is kept is kept now."""
        if module.step < self.steps:
            self.graph.rest()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Look at the gradients of the first turn."""
        if module.step < self.steps:
            found = size(p.grad for p in module.parameters() if p.grad is not None)
            self.gradients = max(self.gradients, found)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The run's turn ends after its last step, with all that came after it but this."""
        if module.step % self.steps:
            return
        middle = time.process_time()
        for _ in range(self.steps):
            self.loop.step()
        end = time.process_time()
        if module.step == self.steps:
            self.memory = measured(module, self.gradients, self.graph)
        else:
            self.run.append(middle - self.began)
            self.bare.append(end - middle)
        trainer.should_stop = len(self.run) == self.rounds
        self.began = time.process_time()


def timed(name: str, teacher: Path, steps: int, rounds: int) -> Rounds:
    """Time a method."""
    method = METHODS[name]
    with tempfile.TemporaryDirectory() as folder:
        config = configured(method, teacher, Path(folder))
        parts: Parts = assemble(config)
        batches = iter(parts.data.loader(start=0))
        loop = method.loop(networks(parts.module), settings(config, method), batches)
        timer = Rounds(loop, steps, rounds)
        parts.trainer.callbacks.append(timer)
        parts.trainer.fit(parts.module, datamodule=parts.data)
    return timer


# ---- the same work -----------------------------------------------------------------------------------------------


def agreement(module: Any, loop: Loop, x0: Tensor, cond: dict[str, Tensor], step: int) -> tuple[float, float]:
    """How far apart, relatively, loss and gradient of a loop are from a module's, given the same random numbers.

    Args:
        module: Its networks are given to the loop as they are; no trainer.
        loop: The peer.
        x0: Clean examples, as many as the module's batch.
        cond: Their labels.
        step: Which step it is, for random numbers and turns.
    """
    peers = {**loop.networks, "student": loop.student, "teacher": loop.teacher}
    for name, network in networks(module).items():
        peers[name].load_state_dict(network.state_dict())
    trainer = SimpleNamespace(global_rank=0, world_size=1, accumulate_grad_batches=1)
    module.trainer, module._micro, module.images_seen = trainer, 1, step * len(x0)
    if not module._learning:
        module.parameters_to_train()
    module.begin_step()
    rng = StepRNG(seed=module.seed, step=step, positions=slice(None), total=len(x0))
    ours = module.distil(x0, cond, rng).total
    learning = [p for name in module.phase.parts for p in module.parts()[name].parameters()]
    given = torch.autograd.grad(ours, learning)
    loop.steps = step
    draws = {"normal": lambda tag: rng.randn(tag, x0.shape[1:]), "uniform": rng.rand, "order": rng.randperm}
    draws["stratified"] = rng.stratified
    theirs = loop.loss(x0, cond, {tag: draws[kind](tag).float() for tag, kind in loop.names().items()})
    found = torch.autograd.grad(theirs, list(loop.networks[loop.turn].parameters()))
    flat, other = (torch.cat([g.flatten() for g in side]) for side in (given, found))
    return abs(theirs.item() / ours.item() - 1.0), float((other - flat).norm() / flat.norm())


def checked(name: str, teacher: Path) -> tuple[float, float]:
    """The largest differences of a method's turns."""
    method = METHODS[name]
    with tempfile.TemporaryDirectory() as folder:
        config = configured(method, teacher, Path(folder))
        parts = assemble(config)
    loop = method.loop(networks(parts.module), settings(config, method))
    scatter([*networks(parts.module).values(), parts.module.loss], std=0.02)
    batch = next(iter(parts.data.loader(start=0)))
    x0, cond = batch["x0"].float() / 127.5 - 1.0, {"label": batch["label"]}
    found = [agreement(parts.module, loop, x0, cond, step) for step in range(len(loop.turns))]
    return max(loss for loss, _ in found), max(gradient for _, gradient in found)


def main(words: Sequence[str] | None = None) -> None:
    """Time or check every method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    rows, memory, ratios = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        teacher = exported(Path(folder))
        for name in options.only:
            if options.check:
                loss, gradient = checked(name, teacher)
                print(f"{name}: loss {loss:.1e}, gradient {gradient:.1e} apart", flush=True)
                assert loss < 1e-4 and gradient < 1e-3, f"{name}: the loop does other work"
                continue
            timer = timed(name, teacher, options.steps, options.rounds)
            ratios[name] = median_ratio(timer.bare, timer.run)
            speeds = [options.steps / statistics.median(seconds) for seconds in (timer.bare, timer.run)]
            each = [bare / run for bare, run in zip(timer.bare, timer.run, strict=True)]
            row = {"method": name, "bare loop, steps/s": speeds[0], "run, steps/s": speeds[1]}
            rows.append({**row, "ratio": ratios[name], "lowest": min(each), "highest": max(each)})
            memory.append(memory_row(f"{name}, digits", "MiB", timer.memory))
            print(rows[-1], memory[-1], flush=True)
    if not options.check:
        for name in (f"{paper}/imagenet64" for paper in PAPERS):
            found = counted(composed(f"experiment={name}", "name=benchmark", "paths.run=."))
            memory.append(memory_row(name, "GiB", found))
        report("distillation_speed", rows, ratios, {"memory": memory})


if __name__ == "__main__":
    main()
