r"""The likelihood of the probability-flow ODE, for any interpolant.

In the coordinates of `samplers/adaptive_rk.py`, angle phi = atan(sigma / alpha) and z = x / sqrt(alpha² + sigma²),

    dz / dphi = f(z, phi) = (cos(phi) z - x0_hat) / sin(phi),      div f = (D cos(phi) - tr(dx0_hat / dz)) / sin(phi),

and along a path d log p / dphi = -div f. From the cleanest angle phi_0 (logsnr_max) to the noisiest phi_1 (logsnr_min)

    log p(z_0) = log p_1(z_1) + ∫ div f dphi,      log p(y) = log p(z_0) + D log cos(phi_0),      y = z_0 / cos(phi_0),

so y, what the density is of, has the unit of the data. Interpolants differ in the length of x alone, which z has not:
the result is one number in all of them.

The trace is exact, by one backward pass a dimension, or Hutchinson's: E_v[v' J v] over probes v of mean 0 and variance
1, drawn once for a solve, so that the ODE's right-hand side is one function. Rademacher probes leave only the
off-diagonal of J to vary. The estimate of log p has no bias; exp of it has.

torchode chooses the steps, for every sample its own. The log-volume is carried per dimension and is a coordinate of
its own in the test of a step: the larger of its error and of the root mean square over the others counts. With `steps`
set, the classical Runge-Kutta method of order 4 takes that many steps, equal in log-SNR, without a test.

Two things are not exact, and both are the model's, not the solver's:

* the prior. p_1 is N(0, I) in z, as in `vlb_terms.prior_kl`, while the ODE's true marginal of data of variance c has
  cos² c + sin². Of Gaussian data that costs (V - 1)² / 4 per dimension, V - 1 = (c - 1) cos²: 3e-10 at logsnr_min = -10
  and c = 0.7, 1e-6 at -5; of single points with data of mean m it costs or gains cos m z, which the mean over data
  takes out to the order of cos². Where the true marginal is known, `log_prior` takes it. (A sampler that starts from
  sigma times noise, V = sin², is off by as little.)
* the start. y is taken for data at logsnr_max, not without noise: clean data of a density as rough as the noise there,
  exp(-logsnr_max / 2), are judged as if they were blurred by it.

A guided denoiser is the model of no diffused data. Its flow still carries p_1 to a law whose density this is: that of
the samples of the guided ODE, not p(x) p(y | x)^w.

References:
    Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021, section 4.3 and
        appendix D.2 (probability-flow likelihood; rtol = atol = 1e-5).
    Grathwohl et al., "FFJORD", 2019, section 3.1 (Hutchinson's estimator, one probe a solve).
    Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.adaptive_rk import METHODS, solve
from diffusion_lab.typing import Cond, DenoiserFn

# calls of a step: the last stage of the methods of order 5 is the first of the next step
CALLS = {"dopri5": 6, "tsit5": 6, "heun": 2}


@dataclass(frozen=True, kw_only=True)
class ODEResult:
    """What the ODE says of a batch.

    Attributes:
        log_density: log p(y), `(B,)` float64, in nats, all dimensions together.
        latent: z_1, `(B, *D)` float64; about standard normal for data like the model's.
        calls: Calls of the denoiser that each sample needed, `(B,)` int64. Each has a backward pass for every probe.
    """

    log_density: Tensor
    latent: Tensor
    calls: Tensor


def standard_normal(z: Tensor) -> Tensor:
    """Return log N(z; 0, I) of `z` `(B, *D)`, `(B,)`: the nominal prior."""
    return (-0.5 * (z.square() + math.log(2.0 * math.pi))).flatten(1).sum(1)


def divergence_of(x0: Tensor, z: Tensor, probes: Tensor) -> Tensor:
    """Return the mean over probes of v' (dx0 / dz) v, `(B,)`.

    Args:
        x0: A function of `z`, graph kept, `(B, *D)`, each sample of its own z alone.
        z: `(B, *D)`.
        probes: v, `(K, B, *D)`.
    """
    total = torch.zeros(len(z), dtype=z.dtype, device=z.device)
    for k, v in enumerate(probes):
        (product,) = torch.autograd.grad(x0, z, v, retain_graph=k + 1 < len(probes))
        total = total + (product * v).flatten(1).sum(1)
    return total / len(probes)


def draw_probes(noise: str, count: int, shape: torch.Size, rng: SampleRNG) -> Tensor:
    """Return probes of every sample, `(count, B, *D)` float64, a function of its own stream."""
    if noise == "gaussian":
        drawn = [rng.randn(shape[1:], dtype=torch.float64) for _ in range(count)]
    else:
        drawn = [2.0 * (rng.rand(shape[1:]) < 0.5).double() - 1.0 for _ in range(count)]
    return torch.stack(drawn)


@dataclass(frozen=True, kw_only=True)
class ODELikelihood:
    """log p(y) by the probability-flow ODE.

    Attributes:
        logsnr_min: Where the ODE ends and the prior is taken.
        logsnr_max: Where it starts: the log-SNR of the data.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step, in units of z and of nats per dimension.
        method: "dopri5" or "tsit5", of order 5, or "heun", of order 2.
        steps: Fixed steps of the Runge-Kutta method of order 4 instead of the tolerances; None: adaptive.
        divergence: "hutchinson" or "exact".
        probes: Hutchinson's probes a solve.
        noise: Their law, "rademacher" or "gaussian".
        max_steps: Attempted steps after which to give up.

    Raises:
        ValueError: If the range is empty or infinite, a tolerance is negative or both are zero, or a word is unknown.
    """

    logsnr_min: float
    logsnr_max: float
    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"
    steps: int | None = None
    divergence: Literal["exact", "hutchinson"] = "hutchinson"
    probes: int = 1
    noise: Literal["rademacher", "gaussian"] = "rademacher"
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        if not -math.inf < self.logsnr_min < self.logsnr_max < math.inf:
            raise ValueError(
                f"an ODE likelihood needs finite logsnr_min < logsnr_max, got {self.logsnr_min}, {self.logsnr_max}"
            )
        if not (self.rtol >= 0.0 and self.atol >= 0.0 and self.rtol + self.atol > 0.0):
            raise ValueError(
                f"an ODE likelihood needs positive tolerances, got rtol={self.rtol}, atol={self.atol}"
            )
        if self.method not in METHODS:
            raise ValueError(f"the ODE likelihood has the methods {', '.join(METHODS)}, not {self.method!r}")
        if self.divergence not in ("exact", "hutchinson") or self.noise not in ("rademacher", "gaussian"):
            raise ValueError(
                f"divergence is exact or hutchinson, noise rademacher or gaussian, got {self.divergence}, {self.noise}"
            )
        if self.probes < 1 or self.max_steps < 1 or (self.steps is not None and self.steps < 1):
            raise ValueError("probes, max_steps and steps must be at least 1")

    @torch.no_grad()
    def __call__(
        self,
        denoiser: DenoiserFn,
        y: Tensor,
        *,
        cond: Cond | None = None,
        rng: SampleRNG | None = None,
        log_prior: Callable[[Tensor], Tensor] | None = None,
    ) -> ODEResult:
        """Return log p(y) of each sample.

        Args:
            denoiser: E[x0 | x]. It is called in the dtype of `y`, all else is float64.
            y: Data with noise of log-SNR `logsnr_max`, in the unit of the data (x / alpha), `(B, *D)`.
            cond: Conditions, or None.
            rng: A stream for each sample, for the probes.
            log_prior: log p_1(z_1) of z_1 `(B, *D)` float64, `(B,)`; None: standard normal.

        Raises:
            ValueError: If probes are to be drawn and there is no `rng`, or one of another size.
            RuntimeError: If the solver gives up, after `max_steps` or because a value is not finite.
        """
        dims = y[0].numel()
        first, last = (math.atan(math.exp(-0.5 * level)) for level in (self.logsnr_max, self.logsnr_min))
        slope = self._slope(denoiser, y, cond, self._probes(y, rng))
        state = torch.cat([math.cos(first) * y.double().flatten(1), y.new_zeros(len(y), 1).double()], dim=1)
        if self.steps is None:
            state, calls = self._adaptive(slope, state, first, last)
        else:
            state, calls = self._fixed(slope, state)
        latent = state[:, :-1].reshape(y.shape)
        prior = (log_prior or standard_normal)(latent)
        log_density = prior + dims * (state[:, -1] + math.log(math.cos(first)))
        return ODEResult(log_density=log_density, latent=latent, calls=calls)

    def _probes(self, y: Tensor, rng: SampleRNG | None) -> Tensor:
        """Return the probes of a solve, `(K, B, *D)`; all unit vectors for the exact divergence."""
        if self.divergence == "exact":
            unit = torch.eye(y[0].numel(), dtype=torch.float64, device=y.device)
            return unit.reshape(-1, 1, *y.shape[1:]).expand(-1, *y.shape)
        if rng is None or len(rng) != len(y):
            raise ValueError("Hutchinson's estimator draws probes: give it rng=SampleRNG(one seed a sample)")
        return draw_probes(self.noise, self.probes, y.shape, rng).to(y.device)

    def _slope(
        self, denoiser: DenoiserFn, y: Tensor, cond: Cond | None, probes: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the right-hand side: angles `(B,)` and states `(B, D + 1)` -> slopes, the last that of the volume."""
        dims = y[0].numel()
        exact = self.divergence == "exact"
        # the mean over probes of v' v, with which v' J v is compared; a sum over unit vectors is the trace
        norms = probes.square().flatten(2).sum(2).mean(0) if not exact else torch.full((len(y),), float(dims))
        norms = norms.to(device=y.device, dtype=torch.float64)

        def slope(phi: Tensor, state: Tensor) -> Tensor:
            cos, sin = torch.cos(phi), torch.sin(phi)
            level = 2.0 * torch.log(cos / sin)
            alpha, sigma = denoiser.interpolant(level)
            scale = broadcast_right(torch.sqrt(alpha**2 + sigma**2), y.double())
            with torch.enable_grad():
                z = state[:, :-1].detach().reshape(y.shape).requires_grad_()
                x0 = denoiser((scale * z).to(y.dtype), level, cond).double()
                trace = divergence_of(x0, z, probes) * (dims if exact else 1.0)
            moved = (cos[:, None] * state[:, :-1] - x0.detach().flatten(1)) / sin[:, None]
            return torch.cat([moved, ((cos * norms - trace) / (dims * sin))[:, None]], dim=1)

        return slope

    def _adaptive(
        self, slope: Callable[[Tensor, Tensor], Tensor], state: Tensor, first: float, last: float
    ) -> tuple[Tensor, Tensor]:
        """Return the state at the angle `last`, and the calls of each sample."""
        start, end = (state.new_full((len(state),), angle) for angle in (first, last))
        state, steps = solve(
            slope,
            state,
            start,
            end,
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
            norm=_larger,
        )
        # two calls choose the first step
        return state, CALLS[self.method] * steps + 2

    def _fixed(self, slope: Callable[[Tensor, Tensor], Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state after `steps` steps of the classical Runge-Kutta method, equal in log-SNR."""
        assert self.steps is not None
        levels = torch.linspace(self.logsnr_max, self.logsnr_min, self.steps + 1, dtype=torch.float64)
        angles = torch.atan(torch.exp(-0.5 * levels)).tolist()
        for k in range(self.steps):
            h, phi = angles[k + 1] - angles[k], state.new_full((len(state),), angles[k])
            k1 = slope(phi, state)
            k2 = slope(phi + 0.5 * h, state + 0.5 * h * k1)
            k3 = slope(phi + 0.5 * h, state + 0.5 * h * k2)
            k4 = slope(phi + h, state + h * k3)
            state = state + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        if not bool(state.isfinite().all()):
            raise RuntimeError("the ODE came to values that are not finite: more steps are needed")
        return state, torch.full((len(state),), 4 * self.steps, dtype=torch.int64, device=state.device)


def _larger(error: Tensor) -> Tensor:
    """Return the larger of a step's error of z (root mean square) and that of the volume per dimension, `(B,)`."""
    return torch.maximum(error[:, :-1].square().mean(1).sqrt(), error[:, -1].abs())
