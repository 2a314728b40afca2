"""Bare loops of the methods with a third network: moment matching, EM distillation, distribution matching.

As `distillation_loops.py` has them; two networks learn in turn, each with an optimizer of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from distillation_loops import FIRST, LAST, Loop, angle, ask, column, mean_square, noisy
from torch import Tensor


class MomentMatching(Loop):
    """Salimans et al. 2024, algorithm 2: auxiliary and student in turn."""

    turns = ("auxiliary", "student")
    wanted: ClassVar[dict[str, str]] = {**Loop.wanted, "length": "uniform", "step": "normal"}

    def loss(self, x0: Tensor, cond: dict[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """See `Loop`; weights SNR + 1."""
        u, auxiliary = drawn["noise_level"], self.networks["auxiliary"]
        t, s = angle((u + drawn["length"] / self.settings.method["steps"]).clamp(max=1.0)), angle(u)
        z = noisy(x0, drawn["noise"], t)
        with torch.set_grad_enabled(self.turn == "student"):
            x = ask(self.student, z, t, cond)
        with torch.no_grad():
            r = (s.tan() / t.tan()).square()
            mean = column(r * s.cos() / t.cos()) * z + column((1.0 - r) * s.cos()) * x
            z_s = mean + column(torch.sqrt(1.0 - r) * s.sin()) * drawn["step"]
            g = ask(self.teacher, z_s, s, cond)
        weight = 1.0 / s.sin().square()
        if self.turn == "auxiliary":
            found = ask(auxiliary, z_s, s, cond)
            return (weight * (mean_square(x - found) + mean_square(g - found))).mean()
        with torch.no_grad():
            push = ask(auxiliary, z_s, s, cond) - g
        return (weight * (x * push).mean((1, 2, 3))).mean()


class Generator(Loop):
    """A one-step student asked at log-SNR -6, and the score that follows it; the score's steps in `method`."""

    wanted: ClassVar[dict[str, str]] = {**Loop.wanted, "generator": "normal"}
    FROM = math.atan(math.exp(3.0))

    def begin(self) -> None:
        """See `Loop`."""
        self.turns = ("score",) * self.settings.method["score_steps"] + ("student",)

    def generate(self, z: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """What the student makes of standard normal numbers."""
        return ask(self.student, math.sin(self.FROM) * z, z.new_full((len(z),), self.FROM), cond)

    def follow(self, cond: dict[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """The score's loss, sigmoid weights: p(logsnr) = alpha sigma / 2 (LAST - FIRST)."""
        with torch.no_grad():
            x0 = self.generate(drawn["generator"], cond)
        t, eps = angle(drawn["noise_level"]), drawn["noise"]
        x = noisy(x0, eps, t)
        v = self.networks["score"](x, -2.0 * torch.log(t.tan()), cond)
        error = v - column(t.cos()) * eps + column(t.sin()) * x0
        return ((LAST - FIRST) * t.cos() * t.sin() * mean_square(error)).mean()

    def gap(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The teacher's x0, and that less the score's."""
        real = ask(self.teacher, x, t, cond)
        return real, real - ask(self.networks["score"], x, t, cond)


class DistributionMatching(Generator):
    """Yin et al. 2024, eqs. 7 and 8, by the schedule of DMD2."""

    def loss(self, x0: Tensor, cond: dict[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """See `Loop`."""
        if self.turn == "score":
            return self.follow(cond, drawn)
        made, t = self.generate(drawn["generator"], cond), angle(0.02 + 0.96 * drawn["noise_level"])
        with torch.no_grad():
            real, push = self.gap(noisy(made, drawn["noise"], t), t, cond)
            push = push / (made - real).abs().mean((1, 2, 3), keepdim=True)
        return 0.5 * mean_square(made - (made + push).detach()).mean()


class EM(Generator):
    """Xie et al. 2024, algorithms 1 and 2; K, gamma_eps and gamma_z in `method`."""

    def names(self) -> dict[str, str]:
        """See `Loop`: Langevin's noise in the student's turn."""
        m, more = self.settings.method, {}
        for k in range(m["K"] if self.turn == "student" else 0):
            more[f"langevin_eps_{k}"] = "normal"
            if m["gamma_z"]:
                more[f"langevin_z_{k}"] = "normal"
        return {**self.wanted, **more}

    def loss(self, x0: Tensor, cond: dict[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """See `Loop`."""
        if self.turn == "score":
            return self.follow(cond, drawn)
        m = self.settings.method
        a, b = m["gamma_eps"], m["gamma_z"]
        z, eps, t = drawn["generator"], drawn["noise"], angle(drawn["noise_level"])
        r = column(1.0 / t.tan())
        drift, made = torch.zeros_like(z), None
        for k in range(m["K"]):
            if b or made is None:
                with torch.set_grad_enabled(b > 0):
                    z = z.detach().requires_grad_(b > 0)
                    made = self.generate(z, cond)
            with torch.no_grad():
                _, gap = self.gap(noisy(made, eps, t), t, cond)
                drift = (1 - a) * drift + a * r * gap
                eps = (1 - a) * eps + a * r * gap + math.sqrt(2 * a) * drawn[f"langevin_eps_{k}"]
            if b:
                (pull,) = torch.autograd.grad(made, z, r**2 * gap)
                z = (1 - b) * z.detach() + b * pull + math.sqrt(2 * b) * drawn[f"langevin_z_{k}"]
        made = self.generate(z.detach(), cond)
        return 0.5 * mean_square(drift / r + made.detach() - made).mean()
