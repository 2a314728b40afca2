"""The peers of `quality.py`: their networks and their training, each step written as their own trainers do it.

    denoising-diffusion-pytorch     Unet, GaussianDiffusion (v-prediction, sigmoid schedule), ema_pytorch's EMA
    diffusers                       UNet2DModel, DDPMScheduler, its training_utils.EMAModel, as in its example
                                    examples/unconditional_image_generation/train_unconditional.py

Each at the settings of its README or example, and with our batch size, learning rate (with its decay) and average. They
are given the images as one tensor, which spares them what their loaders spend on decoding files. A network is made of
about as many parameters as ours.

What they have learnt is sampled through `Discrete`, which reads their prediction at their own 1,000 noise levels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusion_lab  # noqa: F401  (first: it cures torchvision)

# isort: split

import torch
from torch import Tensor, nn

from diffusion_lab.ema import EMA, Profile
from diffusion_lab.process.interpolants import VariancePreserving
from diffusion_lab.typing import Cond

LEVELS = 1000


class Discrete(nn.Module):
    """A peer's network as a denoiser: E[x0 | x] at the nearest of its discrete noise levels, clipped as they clip.

    Args:
        network: The peer's.
        call: Network, x and t, int64 `(B,)`, to its prediction.
        alphas_cumprod: alpha² at the levels, `(1000,)`.
        kind: "eps" or "v".
    """

    def __init__(
        self,
        network: nn.Module,
        call: Callable[[nn.Module, Tensor, Tensor], Tensor],
        alphas_cumprod: Tensor,
        kind: str,
    ) -> None:
        super().__init__()
        self.interpolant, self.network, self.call, self.kind = VariancePreserving(), network, call, kind
        squared = alphas_cumprod.double()
        self.register_buffer("logsnr", (squared / (1 - squared)).log())

    def forward(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return E[x0 | x] for images `(B, C, H, W)` at the level of `logsnr` `(B,)`."""
        t = (self.logsnr[None] - logsnr.double()[:, None]).abs().argmin(1)
        alpha, sigma = (c.float().view(-1, 1, 1, 1) for c in self.interpolant(self.logsnr[t]))
        out = self.call(self.network, x, t)
        x0 = alpha * x - sigma * out if self.kind == "v" else (x - sigma * out) / alpha
        return x0.clamp(-1.0, 1.0)

    def grid(self, steps: int) -> Tensor:
        """`steps` of their levels, evenly spaced from the noisiest to the finest, and the end: increasing log-SNR."""
        chosen = torch.linspace(LEVELS - 1, 0, steps).round().long()
        return torch.cat([self.logsnr[chosen], torch.full((1,), torch.inf, dtype=torch.float64)])


@dataclass
class Peer:
    """A model of theirs in training.

    Attributes:
        network: What is counted and optimised.
        loss: Images in [-1, 1] `(B, C, H, W)` to a scalar, drawing from the global random state, as theirs do.
        batch_size: Images of a step.
        step: One optimizer step with the loss's gradient there; takes the share of the time budget that is used up.
        averaged: Returns the averaged network.
        discrete: From such a network to a denoiser.
    """

    network: nn.Module
    loss: Callable[[Tensor], Tensor]
    batch_size: int
    step: Callable[[float, int], None]
    averaged: Callable[[], nn.Module]
    discrete: Callable[[nn.Module], Discrete]


@dataclass(frozen=True)
class Settings:
    """What "with our settings" takes over.

    Attributes:
        batch_size: Images of a step.
        optimizer: From parameters to an optimizer.
        rate: Factor of the learning rate from the share of the budget that is used, and the images seen.
        profile: How the average forgets.
        clip: Largest norm of the gradient.
    """

    batch_size: int
    optimizer: Callable[[Any], torch.optim.Optimizer]
    rate: Callable[[float, int], float]
    profile: Profile
    clip: float


def _ours(
    network: nn.Module, settings: Settings
) -> tuple[Callable[[float, int], None], Callable[[], nn.Module]]:
    optimizer = settings.optimizer(network.parameters())
    base = [group["lr"] for group in optimizer.param_groups]
    average = EMA(network, settings.profile)

    def step(share: float, seen: int) -> None:
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * settings.rate(share, seen)
        nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        average.update(network, seen, settings.batch_size)

    return step, lambda: average.module


def lucidrains(width: int, shape: tuple[int, int, int], settings: Settings | None) -> Peer:
    """denoising-diffusion-pytorch; `settings` None for its README's: batch 32 twice, 8e-5, EMA 0.995."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA as TheirEMA

    network = Unet(dim=width, dim_mults=(1, 2, 2), channels=shape[0])
    diffusion = GaussianDiffusion(network, image_size=shape[1:], timesteps=LEVELS)

    def discrete(net: nn.Module) -> Discrete:
        return Discrete(net, lambda net, x, t: net(x, t), diffusion.alphas_cumprod, "v")

    def loss(images: Tensor) -> Tensor:
        return diffusion((images + 1) / 2)  # it normalises from [0, 1] itself

    if settings is not None:
        step, averaged = _ours(network, settings)
        return Peer(network, loss, settings.batch_size, step, averaged, discrete)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    average = TheirEMA(diffusion, beta=0.995, update_every=10)

    def own(share: float, seen: int) -> None:
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    return Peer(network, loss, 64, own, lambda: average.ema_model.model, discrete)


def diffusers(width: int, shape: tuple[int, int, int], settings: Settings | None) -> Peer:
    """diffusers; `settings` None for its example's: batch 16, AdamW 1e-4, warm-up of 500 steps."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    network = UNet2DModel(
        sample_size=shape[1:], in_channels=shape[0], out_channels=shape[0], layers_per_block=1,
        block_out_channels=(width, 2 * width, 2 * width), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    noise = DDPMScheduler(num_train_timesteps=LEVELS, beta_schedule="linear")

    def discrete(net: nn.Module) -> Discrete:
        return Discrete(net, lambda net, x, t: net(x, t).sample, noise.alphas_cumprod, "eps")

    def loss(images: Tensor) -> Tensor:
        eps, t = torch.randn_like(images), torch.randint(0, LEVELS, (len(images),))
        return nn.functional.mse_loss(network(noise.add_noise(images, eps, t), t).sample, eps)

    if settings is not None:
        step, averaged = _ours(network, settings)
        return Peer(network, loss, settings.batch_size, step, averaged, discrete)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)

    def own(share: float, seen: int) -> None:
        # its cosine decay is over 100 epochs, of which the budget holds a few: only the warm-up is felt
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * min(1.0, seen / 16 / 500)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    def shadow() -> nn.Module:
        copied = copy.deepcopy(network)
        average.copy_to(copied.parameters())
        return copied

    return Peer(network, loss, 16, own, shadow, discrete)


PEERS = {"denoising-diffusion-pytorch": lucidrains, "diffusers": diffusers}
