r"""The Inception network of the FID: original TensorFlow weights, TensorFlow's resize, through torch-fidelity.

A value may be called FID only if it comes from exactly this network, so the weights file is verified by its SHA-256
(whose start is part of the published file name), which neither torch-fidelity nor torchmetrics do. The bilinear
resize to 299x299 with TensorFlow 1's alignment happens inside the extractor; resizing before it gives another,
incomparable number.

References:
    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017.
    Obukhov et al., "High-fidelity performance metrics for generative models in PyTorch", 2020 (torch-fidelity).
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"
SHA256_PREFIX = "6726825d"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE_NAME}"
NAME = "inception-v3-tf"


def is_published(name: str, sha256: str) -> bool:
    """Tell whether name and hash are those of the network that defines the FID."""
    return name == NAME and sha256.startswith(SHA256_PREFIX)


class Inception(nn.Module):
    """The 2048 pool features of the FID's Inception-v3, float32.

    Args:
        weights_path: The weights file; None looks where torch-fidelity's own download would put it.
        verify: Refuse a file whose hash is not the published one. Values made without are never called FID.

    Raises:
        FileNotFoundError: If there is no such file; the message says which file, its size, its hash and its source.
        ValueError: If the hash is another one, or the file does not hold these weights.
    """

    def __init__(self, *, weights_path: str | Path | None = None, verify: bool = True) -> None:
        super().__init__()
        cache = Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAME
        path = cache if weights_path is None else Path(weights_path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"no Inception weights at {path}: get {FILE_NAME} (95.7 MB, SHA-256 {SHA256_PREFIX}...) from {URL} "
                "and name it as weights_path"
            )
        content = path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        if verify and not self.sha256.startswith(SHA256_PREFIX):
            raise ValueError(
                f"{path} is not the published Inception: its SHA-256 starts with {self.sha256[:8]}, not with "
                f"{SHA256_PREFIX}; verify=False takes it, but then no value is called FID"
            )
        self.name = NAME
        self.dim: int | None = 2048
        self.resize = "TF1 bilinear 299"

        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            # torch-fidelity unpickles whatever it is given; so first make sure that there are only tensors in it
            torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            self.network = FeatureExtractorInceptionV3(NAME, ["2048"], io.BytesIO(content))
        except (pickle.UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{path} does not hold Inception weights: {reason}") from error

    def forward(self, images: Tensor) -> Tensor:
        """Return `(N, 2048)` of uint8 `(N, C, H, W)`, C being 3, or 1 for grey images, which are repeated.

        Raises:
            TypeError: If the images are not uint8.
            ValueError: On another shape.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"{NAME} takes uint8 images, not {images.dtype}")
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"{NAME} takes images (N, 3, H, W) or (N, 1, H, W), not {tuple(images.shape)}")
        with torch.no_grad():
            return self.network(images.expand(-1, 3, -1, -1))[0]
