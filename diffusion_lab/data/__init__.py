"""Data sets, read by global position, so that order never depends on processes, workers or interruptions."""

from diffusion_lab.data.base import DataModule, InMemory, Source
from diffusion_lab.data.cifar10 import CIFAR10, CIFAR10JPEG
from diffusion_lab.data.degraded import Degraded
from diffusion_lab.data.digits import Digits
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.faces import FFHQ, CelebA
from diffusion_lab.data.image_folder import ImageFolder
from diffusion_lab.data.mnist import MNIST
from diffusion_lab.data.order import GlobalBatches, order
from diffusion_lab.data.shards.module import Shards
from diffusion_lab.data.shards.stream_module import ShardStream
from diffusion_lab.data.toy import Toy

__all__ = [
    "CIFAR10",
    "CIFAR10JPEG",
    "FFHQ",
    "MNIST",
    "CelebA",
    "DataError",
    "DataModule",
    "Degraded",
    "Digits",
    "GlobalBatches",
    "ImageFolder",
    "InMemory",
    "ShardStream",
    "Shards",
    "Source",
    "Toy",
    "order",
]
