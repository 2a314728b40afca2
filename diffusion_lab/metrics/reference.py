r"""Summaries of real images, kept under what they were made of.

torch-fidelity keeps its cache under a name that the user chooses, so new weights or other images silently meet old
statistics. Here the key is content: hash of the images (shape, type, bytes), of the labels, of the extractor's
weights, its name and its resize, and the specification of what is kept. The file is a safetensors with the key spelt
out in its metadata, which is compared when it is read; a statistic made under another protocol cannot be taken for this
one, and a damaged file is made anew. One pass over the images makes all that is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_lab.files import replacing
from diffusion_lab.metrics.collect import Collect, Collected, Collector, collect, pieces_of
from diffusion_lab.metrics.features import FeatureExtractor

FORMAT = "3"


def content_hash(x: Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    flat = x.detach().cpu().contiguous().flatten()
    for part in flat.split(1 << 24):
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """The summaries of one set under one extractor, in files.

    Attributes:
        folder: Where they are; None keeps none.
        images: Hash of the images.
        labels: Hash of their labels, "none" without.
        features: Name of the extractor.
        features_sha256: Hash of its weights.
        resize: Its resize.
    """

    folder: Path | None
    images: str
    labels: str
    features: str
    features_sha256: str
    resize: str

    def key(self, what: Collect) -> dict[str, str]:
        """Return what a summary was made of."""
        told = {name: value for name, value in vars(self).items() if name != "folder"}
        if not what.asks:
            told["labels"] = "not asked for"
        return {"format": FORMAT, **told, "kept": repr(what)}

    def read(self, wanted: Sequence[Collect], n: int) -> dict[Collect, Collector]:
        """Return those of the summaries of a set of `n` images that are there, made under exactly this key."""
        found: dict[Collect, Collector] = {}
        for what in wanted if self.folder is not None else ():
            # reading brings the true lengths along; the extractor is not asked for what is known
            collector = what.start(n, dict.fromkeys(what.wants, 0))
            try:
                with safe_open(self._path(what), framework="pt") as file:
                    state = {name: file.get_tensor(name) for name in file.keys()}
                    same = json.loads((file.metadata() or {})["made_as"]) == self.key(what)
                if same:
                    collector.load_state_dict(state)
                    found[what] = collector
            except (OSError, SafetensorError, KeyError, ValueError):
                continue
        return found

    def write(self, kept: Mapping[Collect, Collector]) -> None:
        """Keep summaries."""
        for what, collector in kept.items() if self.folder is not None else ():
            state = {name: value.contiguous() for name, value in collector.state_dict().items()}
            with replacing(self._path(what)) as aside:
                save_file(state, aside, metadata={"made_as": json.dumps(self.key(what), sort_keys=True)})

    def _path(self, what: Collect) -> Path:
        assert self.folder is not None
        digest = hashlib.sha256(json.dumps(self.key(what), sort_keys=True).encode()).hexdigest()
        return self.folder / f"{self.features}-{digest[:20]}.safetensors"


def shelf(folder: Path | None, images: str, labels: Tensor | None, extractor: FeatureExtractor) -> Shelf:
    """Return where summaries of a set are kept.

    Args:
        folder: The folder; None keeps none.
        images: Hash of the images.
        labels: `(N,)` classes, or None.
        extractor: The features.
    """
    return Shelf(
        folder=folder,
        images=images,
        labels="none" if labels is None else content_hash(labels.to(torch.int64)),
        features=extractor.name,
        features_sha256=extractor.sha256,
        resize=extractor.resize,
    )


def collect_kept(
    images: Tensor,
    extractor: FeatureExtractor,
    wanted: Sequence[Collect],
    *,
    name: str,
    labels: Tensor | None = None,
    folder: Path | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Collected:
    """Return what is wanted of a set of images in memory, from the cache where it is there.

    Args:
        images: `(N, C, H, W)` uint8, or points `(N, D)`.
        extractor: The features, on `device`.
        wanted: What to keep of them.
        name: What the set is called.
        labels: `(N,)` classes of the images.
        folder: Where summaries are kept; None keeps none.
        batch_size: Images in one pass.
        device: Where the extractor is.
    """
    sha256 = content_hash(images)
    files = shelf(folder, sha256, labels, extractor)
    kept = files.read(wanted, len(images))
    missing = [what for what in wanted if what not in kept]
    made = collect(
        pieces_of(images, labels, batch_size) if missing else (),
        extractor,
        missing,
        n=len(images),
        shape=images.shape[1:],
        name=name,
        sha256=sha256,
        quantised=images.dtype == torch.uint8,
        device=device,
    )
    files.write(made.kept)
    return Collected(**{**vars(made), "kept": {what: kept.get(what) or made.kept[what] for what in wanted}})
