"""Data sets, read by global position, so that order never depends on processes, workers or interruptions."""

from diffusion_lab.data.base import DataModule, InMemory, Source
from diffusion_lab.data.digits import Digits
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.image_folder import ImageFolder
from diffusion_lab.data.mnist import MNIST
from diffusion_lab.data.order import GlobalBatches, order
from diffusion_lab.data.toy import Toy

__all__ = [
    "MNIST",
    "DataError",
    "DataModule",
    "Digits",
    "GlobalBatches",
    "ImageFolder",
    "InMemory",
    "Source",
    "Toy",
    "order",
]
