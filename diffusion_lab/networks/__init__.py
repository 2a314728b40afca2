"""Networks: modules `(x, logsnr, cond) -> raw`. They know neither the process nor what their output stands for."""

from diffusion_lab.networks.dit import DiT
from diffusion_lab.networks.edm2 import EDM2
from diffusion_lab.networks.mlp import MLP
from diffusion_lab.networks.mmdit import MMDiT
from diffusion_lab.networks.residual_uvit import ResidualUViT
from diffusion_lab.networks.unet import UNet
from diffusion_lab.networks.uvit import UViT
from diffusion_lab.networks.vdm import VDMUNet

__all__ = ["EDM2", "MLP", "DiT", "MMDiT", "ResidualUViT", "UNet", "UViT", "VDMUNet"]
