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
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_lab.metrics.collect import Collect, Collected, Collector, Piece, collect, pieces_of
from diffusion_lab.metrics.features import FeatureExtractor

FORMAT = "2"


def content_hash(x: Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    flat = x.detach().cpu().contiguous().flatten()
    for part in flat.split(1 << 24):
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


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
    on_images: Callable[[int], None] | None = None,
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
        on_images: Called with the number of images after every batch.
    """
    sha256 = content_hash(images)
    key = {
        "format": FORMAT,
        "images": sha256,
        "labels": "none" if labels is None else content_hash(labels.to(torch.int64)),
        "features": extractor.name,
        "features_sha256": extractor.sha256,
        "resize": extractor.resize,
    }
    n, shape, quantised = len(images), images.shape[1:], images.dtype == torch.uint8
    kept: dict[Collect, Collector] = {}
    if folder is not None:
        for what in wanted:
            # reading brings the true lengths along; the extractor is not asked for what is known
            collector = what.start(n, dict.fromkeys(what.wants, 0))
            if _read(folder, {**key, "kept": repr(what)}, collector):
                kept[what] = collector
    missing = [what for what in wanted if what not in kept]
    made = collect(
        _told(pieces_of(images, labels, batch_size), on_images) if missing else (),
        extractor,
        missing,
        n=n,
        shape=shape,
        name=name,
        sha256=sha256,
        quantised=quantised,
        device=device,
    )
    if folder is not None:
        for what, collector in made.kept.items():
            _write(folder, {**key, "kept": repr(what)}, collector)
    return Collected(**{**vars(made), "kept": {what: kept.get(what) or made.kept[what] for what in wanted}})


def _told(pieces: Iterable[Piece], on_images: Callable[[int], None] | None) -> Iterator[Piece]:
    for piece in pieces:
        yield piece
        if on_images is not None:
            on_images(len(piece[0]))


def _path(folder: Path, key: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(folder) / f"{key['features']}-{digest[:20]}.safetensors"


def _read(folder: Path, key: dict[str, str], collector: Collector) -> bool:
    """Fill a collector with what is kept if it was made under exactly this key; say whether it was."""
    try:
        with safe_open(_path(folder, key), framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            if json.loads((file.metadata() or {})["made_as"]) != key:
                return False
        collector.load_state_dict(state)
        return True
    except (OSError, SafetensorError, KeyError, ValueError):
        return False


def _write(folder: Path, key: dict[str, str], collector: Collector) -> None:
    path = _path(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    # two processes may make the same statistics at once
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    state = {name: value.contiguous() for name, value in collector.state_dict().items()}
    save_file(state, aside, metadata={"made_as": json.dumps(key, sort_keys=True)})
    os.replace(aside, path)
