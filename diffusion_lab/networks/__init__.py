"""Networks: modules `(x, logsnr, cond) -> raw`. They know neither the process nor what their output stands for."""

from diffusion_lab.networks.mlp import MLP
from diffusion_lab.networks.unet import UNet

__all__ = ["MLP", "UNet"]
