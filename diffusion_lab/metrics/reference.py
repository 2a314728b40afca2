r"""Statistics of real images, kept under what they were made of.

torch-fidelity keeps its cache under a name that the user chooses, so new weights or other images silently meet old
statistics. Here the key is content: hash of the images (shape, type, bytes), of the labels, of the extractor's
weights, its name and its resize. The file is a safetensors with the key spelt out in its metadata, which is compared
when it is read; a statistic made under another protocol cannot be taken for this one, and a damaged file is made
anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_lab.metrics.features import Classifier, FeatureExtractor
from diffusion_lab.metrics.stats import GaussianStats

FORMAT = "1"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of one set of real images under one extractor.

    Args:
        name: "test", "train", or what the set is.
        sha256: Hash of the images.
        shape: Shape of one image.
        features: Name of the extractor.
        features_sha256: Hash of its weights.
        stats: Of the features.
        accuracy: Share of the images whose class the extractor recognises; None without labels or classifier.
    """

    name: str
    sha256: str
    shape: tuple[int, ...]
    features: str
    features_sha256: str
    stats: GaussianStats
    accuracy: float | None = None

    @property
    def n(self) -> int:
        """Number of images."""
        return self.stats.n


def content_hash(x: Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    flat = x.detach().cpu().contiguous().flatten()
    for part in flat.split(1 << 24):
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def reference_statistics(
    images: Tensor,
    extractor: FeatureExtractor,
    *,
    name: str,
    labels: Tensor | None = None,
    folder: Path | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Reference:
    """Return the statistics of real images, from the cache if they are there.

    Args:
        images: `(N, C, H, W)` uint8.
        extractor: The features, on `device`.
        name: What the set is called in records.
        labels: `(N,)` true classes, for the classifier's accuracy.
        folder: Where statistics are kept; None keeps none.
        batch_size: Images in one pass.
        device: Where the extractor is.
    """
    key = {
        "format": FORMAT,
        "images": content_hash(images),
        "labels": "none" if labels is None else content_hash(labels.to(torch.int64)),
        "features": extractor.name,
        "features_sha256": extractor.sha256,
        "resize": extractor.resize,
    }
    kept = None if folder is None else _read(_path(folder, key), key)
    if kept is None:
        kept = GaussianStats(dim=extractor.dim), None
        correct = 0
        judge = extractor if isinstance(extractor, Classifier) and labels is not None else None
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size].to(device)
            if judge is not None and labels is not None:
                features, logits = judge.features_and_logits(batch)
                correct += int((logits.argmax(dim=1).cpu() == labels[start : start + batch_size].cpu()).sum())
            else:
                features = extractor(batch)
            kept[0].update(features)
        kept = kept[0], (correct / len(images) if judge is not None else None)
        if folder is not None:
            _write(_path(folder, key), key, *kept)
    stats, accuracy = kept
    return Reference(
        name=name,
        sha256=key["images"],
        shape=tuple(images.shape[1:]),
        features=extractor.name,
        features_sha256=extractor.sha256,
        stats=stats,
        accuracy=accuracy,
    )


def _path(folder: Path, key: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(folder) / f"{key['features']}-{digest[:20]}.safetensors"


def _read(path: Path, key: dict[str, str]) -> tuple[GaussianStats, float | None] | None:
    """Return what is kept at `path` if it was made under exactly this key, else None."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
        if json.loads(metadata["made_as"]) != key:
            return None
        stats = GaussianStats()
        stats.load_state_dict(state)
        return stats, json.loads(metadata["accuracy"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _write(path: Path, key: dict[str, str], stats: GaussianStats, accuracy: float | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(
        f".{path.name}.{os.getpid()}"
    )  # two processes may make the same statistics at once
    metadata = {"made_as": json.dumps(key, sort_keys=True), "accuracy": json.dumps(accuracy)}
    save_file(stats.state_dict(), aside, metadata=metadata)
    os.replace(aside, path)
