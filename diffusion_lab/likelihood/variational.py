r"""Variational dequantisation: q(u | x) learned, with everything else frozen.

    h = m(x) + exp(r(x)) e,  e ~ N(0, I),      u = w (sigmoid(h) - ½) in (-w/2, w/2),
    log q(u | x) = sum [ -½ e² - ½ log 2 pi - r - log w - log sigmoid(h) - log sigmoid(-h) ],

m and r by a small network of the image. It starts as the same law for every pixel, close to the uniform one (a
standard logistic h would be exactly uniform; the normal of its spread is off by 0.01 nats). It is trained on

    E_q [ log q(u | x) + nll(x + u) ],          nll an upper bound of -log p of the frozen model,

normally the continuous variational bound of the dequantised data (`bound.py`, a density's), which costs one call of
the denoiser with a backward pass; the ODE would cost a hundred. The q that comes of it is then used with any bound: it
is a law on the bin whatever it was trained on. Noise is addressed by (seed, step): the same settings give the same q.

References:
    Ho et al., "Flow++: Improving Flow-Based Generative Models with Variational Dequantization and Architecture Design",
        2019, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.rng import SampleRNG, StepRNG, derive_seed, step_rng
from diffusion_lab.typing import Cond

NLL = Callable[[Tensor, Cond | None, StepRNG], Tensor]
"""`nll(y, cond, rng)`: an estimate of an upper bound of -log p(y) in nats, all dimensions together, `(B,)`."""

# the normal nearest to the logistic law, whose sigmoid is uniform, has about its standard deviation
SPREAD = 1.7


class VariationalDequantisation(nn.Module):
    """A learned `Dequantisation` of images `(C, H, W)`.

    Args:
        gap: w, the distance of neighbouring levels.
        channels: C.
        width: Hidden channels.
        seed: Of the initial weights.

    Raises:
        ValueError: If `gap` is not positive.
    """

    def __init__(self, *, gap: float, channels: int, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        if not 0.0 < gap < math.inf:
            raise ValueError(f"dequantisation needs a distance of levels > 0, got {gap}")
        self.gap = gap
        self.network = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * channels, 1),
        )
        generator = torch.Generator().manual_seed(derive_seed("dequantisation", seed) % 2**32)
        with torch.no_grad():
            for parameter in self.network.parameters():
                fan = parameter[0].numel() if parameter.ndim > 1 else 1
                scale = 1.0 / math.sqrt(fan) if parameter.ndim > 1 else 0.0
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            last = self.network[-1]
            assert isinstance(last, nn.Conv2d) and last.bias is not None
            last.weight.zero_()
            last.bias[channels:] = math.log(SPREAD)

    def noise(self, x0: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(u, log_q)` of the standard normal numbers `e`, with gradients; both in the dtype of `e`."""
        mean, log_std = self.network(x0.to(next(self.parameters()).dtype)).to(e.dtype).chunk(2, dim=1)
        h = mean + torch.exp(log_std) * e
        u = self.gap * (torch.sigmoid(h) - 0.5)
        log_q = -0.5 * e.square() - log_std - (0.5 * math.log(2.0 * math.pi) + math.log(self.gap))
        log_q = log_q - F.logsigmoid(h) - F.logsigmoid(-h)
        return u, log_q.flatten(1).sum(1)

    @torch.no_grad()
    def forward(self, x0: Tensor, rng: SampleRNG) -> tuple[Tensor, Tensor]:
        """See `Dequantisation`."""
        u, log_q = self.noise(x0, rng.randn(x0.shape[1:], dtype=torch.float64, device=x0.device))
        return u.to(x0.dtype), log_q


def fit_dequantisation(
    q: VariationalDequantisation,
    x0: Tensor,
    cond: Cond | None,
    nll: NLL,
    *,
    images: int,
    batch_size: int = 128,
    lr: float = 5e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> VariationalDequantisation:
    """Train q on images for E_q [log q + nll], and return it, frozen.

    Args:
        q: What is trained, in place.
        x0: Images on the levels, `(N, C, H, W)` floats.
        cond: Their conditions, `(N, ...)`, or None.
        nll: What the frozen model makes of dequantised images.
        images: How many images to see; the rate falls linearly to zero over them.
        batch_size: Images a step.
        lr: Adam's rate at the start.
        seed: Of the order of the images and of all noise.
        on_step: Called as `on_step(images_seen, objective per dimension)` after each step.

    Raises:
        ValueError: If there are no images.
    """
    if len(x0) == 0:
        raise ValueError("dequantisation cannot be learned from no images")
    device, dims = x0.device, x0[0].numel()
    optimizer = torch.optim.Adam(q.parameters(), lr=lr, betas=(0.9, 0.99))
    steps = max(1, -(-images // batch_size))
    with torch.enable_grad():
        for step in range(steps):
            chosen = step_rng(seed, step, "dequantisation.rows")
            rows = torch.randint(len(x0), (batch_size,), generator=chosen).to(device)
            rng = StepRNG(seed=seed, step=step, positions=slice(None), total=batch_size)
            given = None if cond is None else {name: value[rows] for name, value in cond.items()}
            e = rng.randn("dequantisation", x0.shape[1:], dtype=x0.dtype).to(device)
            u, log_q = q.noise(x0[rows], e)
            loss = (log_q + nll(x0[rows] + u, given, rng)).mean() / dims
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = lr * (1.0 - step / steps)
            optimizer.step()
            if on_step is not None:
                on_step(min(images, (step + 1) * batch_size), float(loss.detach()))
    return q.eval().requires_grad_(False)
