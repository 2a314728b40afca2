"""Methods of distillation as bare loops: plain PyTorch, written from the papers, the peers of `distillation_speed.py`.

For the variance-preserving process with v-prediction on the cosine schedule clipped at log-SNR +-10, where a noise
level is an angle t: alpha = cos t, sigma = sin t, t even in u; t = 0 is clean. Of diffusion_lab a loop has nothing but
the raw network, called as network(x, logsnr, cond), and the batches.

A loop names its random numbers (`wanted`), draws them from one torch.Generator, and computes a step's loss from them.
Given the numbers that diffusion_lab draws under the same names it must find the same loss and gradient: that is how
`distillation_speed.py --check` and the tests know that both do the same work. No method is left out of that; of reflow
it is asked of a new pair. Methods with a third network are in `distillation_loops_players.py`.

What differs from a paper differs on both sides: means over the data's dimensions, the ½ of a denoising loss, sCM's
tangent in units of one dimension. An average moves after every step, also after another network's, as ours do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

FIRST, LAST = math.atan(math.exp(-5.0)), math.atan(math.exp(5.0))
"""Angles of log-SNR +10 and -10."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a recipe sets, in plain numbers.

    Attributes:
        adam: Options of Adam by learner.
        batch: Images of a step.
        clip: Largest norm of a gradient.
        warmup: Images of the learning rate's warm-up.
        final: Its factor at the end.
        max_images: Where it ends.
        half_lives: Of the averages, in images.
        method: What the method itself is told.
    """

    adam: Mapping[str, Mapping[str, Any]]
    batch: int
    clip: float
    max_images: int
    warmup: int = 0
    final: float = 0.0
    half_lives: tuple[float, ...] = ()
    method: Mapping[str, Any] = field(default_factory=dict)


def angle(u: Tensor) -> Tensor:
    """The noise level of u in [0, 1]."""
    return FIRST + u * (LAST - FIRST)


def column(values: Tensor) -> Tensor:
    """`(B,)` to multiply images."""
    return values[:, None, None, None]


def noisy(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Data with noise at `t`."""
    return column(t.cos()) * x0 + column(t.sin()) * eps


def ask(network: nn.Module, x: Tensor, t: Tensor, cond: Mapping[str, Tensor] | None) -> Tensor:
    """The x0 of a v-prediction network."""
    v = network(x, -2.0 * torch.log(torch.tan(t)), cond)
    return column(t.cos()) * x - column(t.sin()) * v


def ddim(x: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The step from `t` to `s`."""
    return noisy(x0, (x - column(t.cos()) * x0) / column(t.sin()), s)


def undone(x: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x0 for which the step from `x` at `t` leads to `z` at `s`."""
    ratio = column(s.sin() / t.sin())
    return (z - ratio * x) / (column(s.cos()) - ratio * column(t.cos()))


def mean_square(x: Tensor) -> Tensor:
    """Of each example."""
    return x.square().mean((1, 2, 3))


class Loop:
    """What all loops share: batches, turns, optimizers, averages.

    Args:
        networks: "student", "teacher", and a third by its own name; copied.
        settings: See `Settings`.
        batches: `{"x0": bytes, "label"}`, endless.
        seed: Of the loop's random numbers.
    """

    turns: tuple[str, ...] = ("student",)
    wanted: ClassVar[dict[str, str]] = {"noise_level": "stratified", "noise": "normal"}
    """Random numbers of a step by name: "normal" like the images; "uniform" and "stratified" one an example, as is its
    place in an "order"."""

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        settings: Settings,
        batches: Iterator[Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.networks = {name: copy.deepcopy(network).train() for name, network in networks.items()}
        self.teacher = self.networks.pop("teacher").eval().requires_grad_(False)
        self.student = self.networks["student"].requires_grad_(True)
        self.settings, self.batches, self.steps = settings, batches, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.begin()
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), fused=True, **settings.adam[name])
            for name, network in self.networks.items()
        }
        self.averages = [
            (half_life, copy.deepcopy(self.student).requires_grad_(False))
            for half_life in settings.half_lives
        ]

    def begin(self) -> None:
        """Get ready; for what a method has besides."""

    @property
    def turn(self) -> str:
        """Who learns now."""
        return self.turns[self.steps % len(self.turns)]

    def names(self) -> dict[str, str]:
        """`wanted` in this turn."""
        return self.wanted

    def draw(self, x0: Tensor) -> dict[str, Tensor]:
        """Random numbers of a step."""
        return {
            name: torch.randn(x0.shape, generator=self.generator)
            if kind == "normal"
            else torch.randperm(len(x0), generator=self.generator)
            if kind == "order"
            else torch.rand(len(x0), generator=self.generator)
            for name, kind in self.names().items()
        }

    def loss(self, x0: Tensor, cond: dict[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of a batch; the method."""
        raise NotImplementedError

    def step(self) -> None:
        """Train one step."""
        s = self.settings
        batch = next(self.batches)
        x0 = batch["x0"].float() / 127.5 - 1.0
        seen, learner = self.steps * s.batch, self.networks[self.turn]
        optimizer = self.optimizers[self.turn]
        decayed = 1.0 + (s.final - 1.0) * max(0, seen - s.warmup) / (s.max_images - s.warmup)
        for group in optimizer.param_groups:
            group["lr"] = s.adam[self.turn]["lr"] * min(1.0, (seen + 1) / (s.warmup + 1)) * decayed
        optimizer.zero_grad(set_to_none=True)
        self.loss(x0, {"label": batch["label"]}, self.draw(x0)).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), s.clip)
        optimizer.step()
        self.steps += 1
        with torch.no_grad():
            for half_life, average in self.averages:
                decay = 0.5 ** (s.batch / min(half_life, 0.05 * self.steps * s.batch))
                for mine, live in zip(average.parameters(), self.student.parameters(), strict=True):
                    mine.lerp_(live, 1.0 - decay)


class Progressive(Loop):
    """Salimans & Ho 2022, algorithm 2: the first halving, steps of the student in `method["steps"]`."""

    def loss(self, x0: Tensor, cond: dict[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """See `Loop`; weights max(SNR, 1)."""
        n = self.settings.method["steps"]
        i = torch.ceil(drawn["noise_level"] * n).clamp(min=1)
        t, middle = angle(i / n), angle((i - 0.5) / n)
        end = torch.where(i == 1, 0.0, angle((i - 1) / n))
        z = noisy(x0, drawn["noise"], t)
        with torch.no_grad():
            half = ddim(z, ask(self.teacher, z, t, cond), t, middle)
            whole = ddim(half, ask(self.teacher, half, middle, cond), middle, end)
            target = undone(z, whole, t, end)
        weight = (1.0 / t.tan().square()).clamp(min=1.0)
        return 0.5 * (weight * mean_square(ask(self.student, z, t, cond) - target)).mean()


class Consistency(Loop):
    """Heek et al. 2024, algorithms 1 and 3, its teacher's steps in `method["teacher_steps"]`."""

    def loss(self, x0: Tensor, cond: dict[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """See `Loop`; weights SNR + 1."""
        m = self.settings.method
        total, e = m["teacher_steps"], m["huber"]
        length = total // m["steps"]
        i = torch.ceil(drawn["noise_level"] * total).clamp(min=1)
        first = torch.floor((i - 1) / length) * length
        t = angle(i / total)
        s, end = (torch.where(k == 0, 0.0, angle(k / total)) for k in (i - 1, first))
        z = noisy(x0, drawn["noise"], t)
        with torch.no_grad():
            answer = ask(self.teacher, z, t, cond)
            eps = (z - column(t.cos()) * answer) / column(t.sin())
            # aDDIM: the noise is lengthened by the variance that the teacher's answer lacks; not at the clean end
            missing = m["x_var"] * mean_square(answer - x0) * (s > 0)
            slope = s.cos() - t.cos() * s.sin() / t.sin()
            size = torch.sqrt(s.sin().square() + slope.square() * missing / mean_square(eps))
            z_s = column(s.cos()) * answer + column(size) * eps
            own = ask(self.student, z_s, s.clamp(min=FIRST), cond)
            there = torch.where(column(i - 1 == first), z_s, ddim(z_s, own, s, end))
            target = undone(z, there, t, end)
        distance = mean_square(ask(self.student, z, t, cond) - target)
        return ((torch.sqrt(distance + e**2) - e) / t.sin().square()).mean()


class Guided(Loop):
    """Meng et al. 2023, algorithm 1: scales drawn from [1, 5], told in units of their standard deviation."""

    wanted: ClassVar[dict[str, str]] = {**Loop.wanted, "guidance_scale": "uniform"}

    def loss(self, x0: Tensor, cond: dict[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """See `Loop`; weights max(SNR, 1)."""
        t, w = angle(drawn["noise_level"]), drawn["guidance_scale"]
        z = noisy(x0, drawn["noise"], t)
        with torch.no_grad():
            given, without = ask(self.teacher, z, t, cond), ask(self.teacher, z, t, None)
            target = without + column(1.0 + 4.0 * w) * (given - without)
        told = {**cond, "guidance_scale": (w - 0.5) * math.sqrt(12.0)}
        weight = (1.0 / t.tan().square()).clamp(min=1.0)
        return 0.5 * (weight * mean_square(ask(self.student, z, t, told) - target)).mean()


class ContinuousConsistency(Loop):
    """Lu & Song 2024, algorithm 1 with sigma_d = 1, past its warm-up; as the recipe, without balance of levels."""

    def loss(self, x0: Tensor, cond: dict[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """See `Loop`; even weights in F."""
        t = angle(drawn["noise_level"])
        logsnr, cos, sin = -2.0 * torch.log(t.tan()), column(t.cos()), column(t.sin())
        x = cos * x0 + sin * drawn["noise"]
        f = self.student(x, logsnr, cond)
        with torch.no_grad():
            slope = self.teacher(x, logsnr, cond)
            directions = (sin * cos * slope, torch.full_like(logsnr, -2.0))
            fixed, change = torch.func.jvp(
                lambda y, level: self.student(y, level, cond), (x, logsnr), directions
            )
            g = -(cos**2) * (fixed - slope) - (sin * cos * x + change)
            length = g.flatten(1).norm(dim=1)
            g = g * column(math.sqrt(g[0].numel()) / (length + self.settings.method["c"]))
        return 0.5 * mean_square(f - fixed - g).mean()


class Shortcut(Loop):
    """Frans et al. 2024, algorithm 1: a share of the examples taught by the student itself, told log2 of its steps."""

    wanted: ClassVar[dict[str, str]] = {**Loop.wanted, "self_consistency": "uniform", "steps": "uniform"}

    def told(self, steps: Tensor) -> Tensor:
        """What the network is told of a number of steps, about unit size for 1, 2, 4 .. 128."""
        return (torch.log2(steps) - 3.5) / math.sqrt(63.0 / 12.0)

    def loss(self, x0: Tensor, cond: dict[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """See `Loop`; weights SNR + 1."""
        own = drawn["self_consistency"] < self.settings.method["share"]
        n = torch.where(own, torch.exp2(torch.floor(drawn["steps"] * 7)), 128.0)
        i = torch.ceil(drawn["noise_level"] * n).clamp(min=1)
        t = angle(i / n)
        z, target, rows = noisy(x0, drawn["noise"], t), x0.clone(), own.nonzero()[:, 0]
        if len(rows):
            with torch.no_grad():
                i_, n_, t_, z_ = i[rows], n[rows], t[rows], z[rows]
                middle = angle((i_ - 0.5) / n_)
                end = torch.where(i_ == 1, 0.0, angle((i_ - 1) / n_))
                some = {"label": cond["label"][rows], "steps": self.told(2 * n_)}
                half = ddim(z_, ask(self.student, z_, t_, some), t_, middle)
                whole = ddim(half, ask(self.student, half, middle, some), middle, end)
                target[rows] = undone(z_, whole, t_, end)
        v = self.student(z, -2.0 * torch.log(t.tan()), {**cond, "steps": self.told(n)})
        return 0.5 * mean_square(v - (column(t.cos()) * z - target) / column(t.sin())).mean()


class Reflow(Loop):
    """Liu et al. 2022, algorithm 1, its ODE by 16 steps of DPM-Solver++(2M); kept pairs with `method["kept"]`."""

    wanted: ClassVar[dict[str, str]] = {"noise_level": "stratified", "pairs": "normal"}

    def begin(self) -> None:
        """See `Loop`."""
        self.pairs: list[Any] = []
        self.kept = int(self.settings.method.get("kept", 0))
        steps = self.settings.method["steps"]
        self.grid = [FIRST + (1.0 - k / steps) * (LAST - FIRST) for k in range(steps)]

    @torch.no_grad()
    def solve(self, eps: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Lu et al. 2022 (DPM-Solver++), algorithm 2; the last step is the answer itself."""
        x, before, h_before = math.sin(self.grid[0]) * eps, None, 0.0
        for k, t in enumerate(self.grid):
            x0 = ask(self.teacher, x, x.new_full((len(x),), t), cond)
            if k + 1 == len(self.grid):
                return x0
            s = self.grid[k + 1]
            h = math.log(math.tan(t)) - math.log(math.tan(s))
            d = x0 if before is None else x0 + h / (2.0 * h_before) * (x0 - before)
            x = math.sin(s) / math.sin(t) * x - math.cos(s) * math.expm1(-h) * d
            before, h_before = x0, h
        raise AssertionError("no steps")

    def loss(self, x0: Tensor, cond: dict[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """See `Loop`; weights SNR + 1."""
        if "pairs" in drawn:
            if self.kept:
                cond = {"label": (10 * drawn["pairs_label"] // len(x0)).long()}
            pair = drawn["pairs"], self.solve(drawn["pairs"], cond), cond
            self.pairs += [pair] if self.kept else []
        else:
            pair = self.pairs[int(torch.randint(self.kept, (), generator=self.generator))]
        eps, made, cond = pair
        t = angle(drawn["noise_level"])
        v = self.student(noisy(made, eps, t), -2.0 * torch.log(t.tan()), cond)
        return 0.5 * mean_square(v - column(t.cos()) * eps + column(t.sin()) * made).mean()

    def names(self) -> dict[str, str]:
        """See `Loop`: labels for a pair that is kept, and no more than levels where there is one."""
        if not self.kept:
            return self.wanted
        new = len(self.pairs) < self.kept
        return {**self.wanted, "pairs_label": "order"} if new else {"noise_level": "stratified"}
