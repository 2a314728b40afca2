r"""Reference statistics that others publish: an .npz with mean and covariance of Inception features.

    mu (2048,), sigma (2048, 2048)            EDM, pytorch-fid, clean-fid, ADM
    mu_s (2023,), sigma_s (2023, 2023)        ADM's spatial features, for the sFID

Such a file does not say by which network it was made, of how many images, or which. So it is taken only together with
the published Inception network, the one that all of them mean, and its own hash stands in the record as that of the
reference. Pickles (EDM2's .pkl) are refused: reading one runs whatever is in it.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_lab.metrics.collect import Collect, Collected, Moments, MomentsCollector
from diffusion_lab.metrics.features import FEATURES, SPATIAL, FeatureExtractor
from diffusion_lab.metrics.inception import is_published
from diffusion_lab.metrics.stats import GaussianStats

ARRAYS = {FEATURES: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}


def holds_statistics(path: Path) -> bool:
    """Tell whether a file is an .npz with a mean and a covariance."""
    return {"mu", "sigma"} <= _arrays(path)


def holds_images(path: Path) -> bool:
    """Tell whether a file is an .npz with images, as ADM's reference files hold some beside their statistics."""
    return bool({"images", "arr_0"} & _arrays(path))


def _arrays(path: Path) -> set[str]:
    if path.suffix != ".npz" or not path.is_file():
        return set()
    try:
        with np.load(path, allow_pickle=False) as stored:
            return set(stored.files)
    except (ValueError, OSError, AttributeError, zipfile.BadZipFile):
        return set()


def read_statistics(path: Path, extractor: FeatureExtractor) -> Collected:
    """Read the statistics of a reference.

    Args:
        path: The .npz.
        extractor: The features of the samples.

    Returns:
        The reference; its `n` is 0, for the file does not say it.

    Raises:
        ValueError: If the features are not the published Inception's, or the arrays do not fit them.
    """
    if not is_published(extractor.name, extractor.sha256):
        raise ValueError(
            f"{path}: statistics from elsewhere are those of the published Inception network, these samples are seen "
            f"through {extractor.name} {extractor.sha256[:8]}"
        )
    kept: dict[Collect, Any] = {}
    with np.load(path, allow_pickle=False) as stored:
        for output, (mean, cov) in ARRAYS.items():
            if mean in stored.files and cov in stored.files:
                m, c = (torch.from_numpy(np.asarray(stored[key], dtype=np.float64)) for key in (mean, cov))
                if m.ndim != 1 or c.shape != (len(m), len(m)):
                    raise ValueError(f"{path}: {mean} {tuple(m.shape)} and {cov} {tuple(c.shape)} do not fit")
                kept[Moments(output)] = MomentsCollector(output, GaussianStats.of(m, c))
    if extractor.dim is not None and kept[Moments()].stats.dim != extractor.dim:
        raise ValueError(
            f"{path}: its features have {kept[Moments()].stats.dim} dimensions, {extractor.name} has {extractor.dim}"
        )
    return Collected(
        name=path.name,
        n=0,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        shape=(),
        features=extractor.name,
        features_sha256=extractor.sha256,
        resize=extractor.resize,
        kept=kept,
    )
