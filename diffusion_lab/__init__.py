"""diffusion_lab: a PyTorch Lightning + Hydra laboratory for diffusion-model research.

Importing the package is light on purpose: it pulls in neither torch nor lightning, so that `--help` and shell
completion answer at once. Its one act is to lay a hook for the day something imports torchvision.
"""

from diffusion_lab import _torchvision

_torchvision.install()

__version__ = "0.1.0"
