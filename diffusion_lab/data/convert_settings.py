"""What shards are made with: the settings of `convert`, in what two of them differ, and how to train on the outcome."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion_lab.data.convert_sources import ConvertSource
from diffusion_lab.data.pictures import FORMATS, Preparation
from diffusion_lab.data.shards.decode import UNDECODABLE

LOOKED_AT = 16
"""Pictures whose size is looked at."""
SMALLEST = 8
MODELS = {
    8: "unet_tiny", 28: "unet_mnist", 32: "unet_cifar10", 64: "unet_64", 128: "unet_imagenet128",
    256: "residual_uvit_imagenet256", 512: "residual_uvit_imagenet512",
}  # fmt: skip
"""The network for a side; docs/networks.md has more."""
SMALL, STEP = "uvit_tiny", 4
"""That for all others, and what their sides are multiples of."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How shards are made.

    Attributes:
        per_shard: Samples of a shard.
        shuffle: Whether samples are put in a random order; that of the seed 0.
        preparation: How pictures are prepared; None to take them over as they are.
        labels: Whether labels are taken over, as `open_source` was told.
        workers: Threads; the shards do not depend on them.
    """

    per_shard: int = 10_000
    shuffle: bool = True
    preparation: Preparation | None = None
    labels: bool = True
    workers: int = 1

    def told(self) -> dict[str, Any]:
        """Return what the shards depend on."""
        p = self.preparation
        prepared = (
            None if p is None else [p.size, p.channels, None if p.box is None else list(p.box), p.resize]
        )
        return {
            "per_shard": self.per_shard,
            "shuffle": self.shuffle,
            "prepared": prepared,
            "labels": self.labels,
        }


# ---- going on or not -------------------------------------------------------------------------------------------------


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Tell in what the shards that are there differ from those asked for; None if they do not.

    Args:
        old: What the manifest says of their source.
        new: What it would say now.
    """
    if old.get("kind") != new["kind"]:
        return f"of another source, {old.get('kind')} and not {new['kind']}"
    was, now = old.get("splits") or {}, new["splits"]
    if list(was) != list(now):
        return f"of another source, with the splits {' and '.join(was)} and not {' and '.join(now)}"
    for name, (n, fingerprint) in now.items():
        if was[name][0] != n:
            return f"of another source: its {name} split had {was[name][0]:,} samples, this one has {n:,}"
        if was[name][1] != fingerprint:
            return f"of another source: the files of its {name} split had other names or sizes"
    for key, words in _WORDS.items():
        # a manifest that is older than a key does not say
        if key in old and old[key] != new[key]:
            return f"made {words(old[key])}, and not {words(new[key])}"
    return None


def _prepared_words(prepared: Sequence[Any] | None) -> str:
    if prepared is None:
        return "of pictures as they are"
    size, channels, box, resize = prepared
    words = [f"--size {size}", f"--resize {resize}"]
    words += [f"--box {' '.join(map(str, box))}"] if box else []
    return f"with {' '.join([*words, *(['--grey'] if channels == 1 else [])])}"


_WORDS: dict[str, Callable[[Any], str]] = {
    "per_shard": lambda value: f"with --per-shard {value}",
    "shuffle": lambda value: "in random order" if value else "with --in-order",
    "prepared": _prepared_words,
    "labels": lambda value: "with labels" if value else "with --no-labels",
}


# ---- what to do with them --------------------------------------------------------------------------------------------


def training_command(
    source: ConvertSource, manifest: Mapping[str, Any], out: Path, preparation: Preparation | None
) -> tuple[str, str]:
    """Return the command that trains on shards, ready to be pasted, and what there is to say about it.

    Args:
        source: What was converted.
        manifest: Of the shards.
        out: Their folder.
        preparation: How pictures were prepared; None where they were taken over as they are.
    """
    from diffusion_lab.app.config.choices import override  # only now: it is the application's

    channels, side, note = _shape(source, preparation)
    classes = manifest["classes"]
    words = ["dataset=shards", override("dataset.root", str(out)), f"shape=[{channels},{side},{side}]"]
    words += [f"num_classes={0 if classes is None else len(classes)}", f"model={MODELS.get(side, SMALL)}"]
    return shlex.join(["python", "train.py", *words]), f"    ({note})" if note else ""


def _shape(source: ConvertSource, preparation: Preparation | None) -> tuple[int, int, str]:
    """Return channels and side of the images, and what there is to say about them."""
    if preparation is not None:
        return preparation.channels, *_fitting(preparation.size)
    split, sizes, colour = source.splits["train"], set[tuple[int, int]](), False
    for k in np.unique(np.linspace(0, split.n - 1, LOOKED_AT).astype(np.int64)):
        try:
            with Image.open(io.BytesIO(split.sample(int(k))[1]), formats=FORMATS) as picture:
                sizes.add(picture.size)
                colour |= picture.mode not in ("1", "L", "LA", "I;16")
        except UNDECODABLE:
            continue
    channels = 3 if colour or not sizes else 1
    if len(sizes) == 1 and len(set(next(iter(sizes)))) == 1:
        return channels, *_fitting(next(iter(sizes))[0])
    least = min((min(size) for size in sizes), default=SMALLEST)
    side = max(SMALLEST, 2 ** (least.bit_length() - 1))
    return channels, side, f"any other side too: pictures of several shapes are cropped to {side}x{side}"


def _fitting(side: int) -> tuple[int, str]:
    """Return the next side that a network takes."""
    fits = max(STEP, side - side % STEP)
    return fits, "" if fits == side else f"of {side}x{side}, the side that networks take"
