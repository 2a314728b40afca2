"""Bridges between Gaussians, and between mixtures of them, whose velocity and denoiser are closed forms."""

from dataclasses import dataclass

import torch
from problems import D64

from diffusion_lab.process.stochastic_interpolant import LinearPath, StochasticInterpolant, TrigonometricPath

INTERPOLANTS = {
    "linear": StochasticInterpolant(path=LinearPath(), noise=0.7),
    "trigonometric": StochasticInterpolant(path=TrigonometricPath(), noise=0.7),
    "linear_plain": StochasticInterpolant(path=LinearPath(), noise=0.0),
    "trigonometric_plain": StochasticInterpolant(path=TrigonometricPath(), noise=0.0),
}


@dataclass(frozen=True)
class Law:
    """A mixture of 1-D normals."""

    weights: tuple = (1.0,)
    means: tuple = (0.0,)
    stds: tuple = (1.0,)

    def draw(self, n, generator):
        component = torch.multinomial(torch.tensor(self.weights), n, replacement=True, generator=generator)
        noise = torch.randn(n, generator=generator, dtype=D64)
        return (
            torch.tensor(self.means, dtype=D64)[component]
            + torch.tensor(self.stds, dtype=D64)[component] * noise
        )


@dataclass(frozen=True)
class ExactField:
    """Velocity and denoiser of a bridge between two laws, 1-D in each coordinate.

    For jointly normal (x, y), E[y | x] = E y + cov(x, y) / var(x) (x - E x); a mixture weighs the pairs of components.
    """

    interpolant: StochasticInterpolant
    source: Law
    data: Law
    correlation: float = 0.0

    def moments(self, tau):
        """Mean and variance of x and their slopes for each pair of components, `(K,)`; tau is 0-d."""
        (a, b), (da, db) = self.interpolant.path(tau), self.interpolant.path.slopes(tau)
        c = self.interpolant.noise
        rows = []
        for m0, s0 in zip(self.source.means, self.source.stds, strict=True):
            for m1, s1 in zip(self.data.means, self.data.stds, strict=True):
                shared = self.correlation * s0 * s1
                variance = (a * s0) ** 2 + (b * s1) ** 2 + 2 * a * b * shared + c * tau * (1 - tau)
                slope = 2 * (a * da * s0**2 + b * db * s1**2 + (da * b + a * db) * shared) + c * (1 - 2 * tau)
                rows.append(torch.stack([a * m0 + b * m1, variance, da * m0 + db * m1, slope]))
        return torch.stack(rows, 1)

    def weights(self):
        return torch.tensor([p * q for p in self.source.weights for q in self.data.weights], dtype=D64)

    def log_density(self, x, tau):
        mean, variance, _, _ = self.moments(tau)
        each = -0.5 * (x[..., None] - mean) ** 2 / variance - 0.5 * torch.log(2 * torch.pi * variance)
        return torch.logsumexp(each + torch.log(self.weights()), -1)

    def __call__(self, x, tau, cond=None):
        # one time for the whole batch
        tau = tau.reshape(-1)[0].to(D64)
        mean, variance, mean_slope, variance_slope = self.moments(tau)
        off = x[..., None] - mean
        share = torch.softmax(
            -0.5 * off**2 / variance - 0.5 * torch.log(variance) + torch.log(self.weights()), -1
        )
        v = (share * (mean_slope + 0.5 * variance_slope / variance * off)).sum(-1)
        g, _ = self.interpolant.latent(tau)
        return v, (share * g / variance * off).sum(-1)
