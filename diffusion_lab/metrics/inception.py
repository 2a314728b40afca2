r"""The Inception network of the FID: original TensorFlow weights, TensorFlow's resize, through torch-fidelity.

A value may be called FID only if it comes from exactly this network, so the weights file is verified by its SHA-256
(whose start is part of the published file name), which neither torch-fidelity nor torchmetrics do. The bilinear
resize to 299x299 with TensorFlow 1's alignment happens inside the extractor; resizing before it gives another,
incomparable number.

    features    2048   the last average pool                                            FID, KID, precision and recall
    logits      1008   the scores of classes without their bias, as customary           Inception Score
    spatial     2023   the first 7 channels of the 17x17 map `mixed_6/conv:0`            sFID

all from one pass, which ends where nothing more is asked for. `mixed_6` is torch-fidelity's `Mixed_6d` (`mixed`,
`mixed_1`, ... are 5b, 5c, 5d, 6a, ...). The graph's node `mixed_6/conv` comes after `mixed_6/conv/batchnorm`: it is the
ReLU that ends the 1x1 branch, hence the first channels of the whole block.

Layers, weights and resize are torch-fidelity's. The pass is our own, with the batch norms multiplied into the
convolutions before them and the channels innermost: faster, and a feature moves by less than 1e-6 of the largest.

References:
    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017.
    Nash et al., "Generating Images with Sparse Representations", 2021, section 4 (sFID); evaluator.py of
    guided-diffusion for the node and its 7 channels.
    Obukhov et al., "High-fidelity performance metrics for generative models in PyTorch", 2020 (torch-fidelity).
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"
SHA256_PREFIX = "6726825d"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE_NAME}"
NAME = "inception-v3-tf"
SPATIAL_CHANNELS = 7


def is_published(name: str, sha256: str) -> bool:
    """Tell whether name and hash are those of the network that defines the FID."""
    return name == NAME and sha256.startswith(SHA256_PREFIX)


class Inception(nn.Module):
    """The FID's Inception-v3: pool features, logits and spatial features, float32.

    Args:
        weights_path: The weights file; None looks where torch-fidelity's own download would put it.
        verify: Refuse a file whose hash is not the published one. Values made without are never called FID.

    Raises:
        FileNotFoundError: If there is no such file; the message says which file, its size, its hash and its source.
        ValueError: If the hash is another one, or the file does not hold these weights.
    """

    outputs = ("features", "logits", "spatial")

    def __init__(self, *, weights_path: str | Path | None = None, verify: bool = True) -> None:
        super().__init__()
        cache = Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAME
        path = cache if weights_path is None else Path(weights_path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"no Inception weights at {path}: get {FILE_NAME} (95.7 MB, SHA-256 {SHA256_PREFIX}...) from {URL} "
                "and name it: metrics.weights_path=<file>"
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

        from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

        try:
            # torch-fidelity unpickles whatever it is given; so first make sure that there are only tensors in it
            torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            self.network = FeatureExtractorInceptionV3(NAME, ["2048"], io.BytesIO(content))
        except (pickle.UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{path} does not hold Inception weights: {reason}") from error
        for layer in self.network.modules():
            if isinstance(layer, BasicConv2d):
                # in float64, so that the product is rounded once
                layer.conv = fuse_conv_bn_eval(layer.conv.double(), layer.bn.double()).float()
                layer.bn = nn.Identity()
        self.network.to(memory_format=torch.channels_last)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features `(N, 2048)` of uint8 `(N, C, H, W)`, C being 3, or 1 for grey images, which are repeated.

        Raises:
            TypeError: If the images are not uint8.
            ValueError: On another shape.
        """
        return self.extract(images, ("features",))["features"]

    @torch.no_grad()
    def extract(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        """Return the outputs asked for, `(N, d)` each, from one pass.

        Args:
            images: `(N, C, H, W)` uint8, C being 3, or 1 for grey images, which are repeated.
            outputs: Some of `features`, `logits` and `spatial`.

        Raises:
            TypeError: If the images are not uint8.
            ValueError: On another shape, or another output.
        """
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        if images.dtype != torch.uint8:
            raise TypeError(f"{NAME} takes uint8 images, not {images.dtype}")
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"{NAME} takes images (N, 3, H, W) or (N, 1, H, W), not {tuple(images.shape)}")
        unknown = set(outputs) - set(self.outputs)
        if unknown:
            raise ValueError(f"{NAME} has the outputs {', '.join(self.outputs)}, no {min(unknown)}")
        net, found = self.network, {}
        x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
        x = ((x - 128) / 128).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        x = net.MaxPool_1(net.Conv2d_2b_3x3(net.Conv2d_2a_3x3(net.Conv2d_1a_3x3(x))))
        x = net.MaxPool_2(net.Conv2d_4a_3x3(net.Conv2d_3b_1x1(x)))
        x = net.Mixed_6a(net.Mixed_5d(net.Mixed_5c(net.Mixed_5b(x))))
        x = net.Mixed_6c(net.Mixed_6b(x))
        if set(outputs) == {"spatial"}:
            return {"spatial": spatial(net.Mixed_6d.branch1x1(x))}
        x = net.Mixed_6d(x)
        if "spatial" in outputs:
            found["spatial"] = spatial(x)
        x = net.Mixed_7c(net.Mixed_7b(net.Mixed_7a(net.Mixed_6e(x))))
        features = net.AvgPool(x).flatten(1)
        if "logits" in outputs:
            found["logits"] = features @ net.fc.weight.T
        if "features" in outputs:
            found["features"] = features
        return found


def spatial(maps: Tensor) -> Tensor:
    """Return the first channels of maps `(N, C, H, W)` as `(N, H W 7)`, in the order of published statistics: NHWC."""
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
