r"""Images to latents, once: a data set is encoded by a frozen autoencoder to the files that `latents.py` reads.

    python -m diffusion_lab.data.encode dataset=imagenet256 autoencoder=stabilityai/sd-vae-ft-mse out=latents

    <out>/train-x0.npy, train-label.npy, test-x0.npy, test-label.npy
    <out>/latents.json     whose latents, of what, and their mean and standard deviation a channel

Row k is example k of the data set, in its own order; with `mirror` the training images follow once more, mirrored. A
latent is the mean of the posterior, or with `latent=sample` a draw whose noise belongs to (seed, split, row). Either
way it depends on nothing but the image and the autoencoder, up to the last bits, which depend on the batch.

Work lies beside its final name until a split is whole. Interrupted, the same command goes on from the last batch that
was surely written; other settings are refused. Latents are shifted and scaled when they are read, not here: the numbers
that make each channel of zero mean and unit variance are in latents.json and in the command printed at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion_lab.data.alone import alone
from diffusion_lab.data.autoencoder import Autoencoder
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.loader import Source
from diffusion_lab.data.progress import progress
from diffusion_lab.files import write_atomically
from diffusion_lab.images import to_float
from diffusion_lab.rng import derive_seed

MANIFEST, STATE = "latents.json", ".encode.json"
SPLITS = ("train", "test")
SAVE_EVERY_S = 10.0
CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How latents are made, as far as they depend on it.

    Attributes:
        latent: "mean" of the posterior, or "sample".
        seed: Of the samples' noise.
        mirror: Whether training images come a second time, mirrored left to right.
        dtype: "float16" or "float32", of the files.
    """

    latent: str = "mean"
    seed: int = 0
    mirror: bool = False
    dtype: str = "float16"

    def __post_init__(self) -> None:
        for name, options in (("latent", ("mean", "sample")), ("dtype", ("float16", "float32"))):
            if getattr(self, name) not in options:
                raise DataError(f"{name}={getattr(self, name)}: {' or '.join(options)} is meant")


class _Batches(Dataset[tuple[Tensor, Tensor | None, list[str]]]):
    """Consecutive rows of a source, mirrored from row `n` on; and what the source has replaced among them."""

    def __init__(self, source: Source, starts: range, rows: int) -> None:
        self.source, self.starts, self.rows = source, starts, rows

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None, list[str]]:
        n, first = len(self.source), self.starts[index]
        rows = np.arange(first, min(first + self.starts.step, self.rows))
        x0, label = self.source.read(rows % n)
        mirrored = torch.from_numpy(rows >= n).view(-1, *[1] * (x0.ndim - 1))
        skipped = list(getattr(self.source, "skipped", []))
        return torch.where(mirrored, x0.flip(-1), x0), label, skipped


def encode(
    data: Any,
    autoencoder: Autoencoder,
    out: Path,
    recipe: Recipe,
    *,
    batch_size: int = 32,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Encode both splits of a data set.

    Args:
        data: The data module.
        autoencoder: The autoencoder.
        out: The folder; made if it is not there.
        recipe: How.
        batch_size: Images at a time.
        facts: What else the manifest should say.

    Returns:
        The manifest.

    Raises:
        DataError: If the examples are no images that the autoencoder takes, a latent is not finite, or the folder holds
            something else, or is being written by another process.
    """
    if not getattr(data, "pixels", True):
        raise DataError(f"dataset: {data.name} holds latents already")
    autoencoder.check(tuple(data.shape))
    sources = {split: data.source(split) for split in SPLITS}
    settings = _settings(sources, autoencoder, recipe, data)
    if (out / MANIFEST).is_file():
        # nothing is left to write: the folder may be one that cannot be written
        return _begin(out, settings)
    with alone(out):
        return _encode_all(
            data, sources, autoencoder, out, recipe, settings, batch_size=batch_size, facts=facts or {}
        )


def _encode_all(
    data: Any,
    sources: Mapping[str, Source],
    autoencoder: Autoencoder,
    out: Path,
    recipe: Recipe,
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    state = _begin(out, settings)
    if (out / MANIFEST).is_file():
        return state
    for split in SPLITS:
        if not (out / f"{split}-x0.npy").is_file():
            _encode_split(
                sources[split],
                autoencoder,
                out,
                split,
                recipe,
                state,
                batch_size=batch_size,
                workers=data.num_workers,
            )
    x0 = np.load(out / "train-x0.npy", mmap_mode="r")
    mean, std = moments(x0)
    manifest = {
        **settings,
        **facts,
        "autoencoder": autoencoder.facts,
        "shape": list(x0.shape[1:]),
        "num_classes": int(data.num_classes),
        "mean": mean,
        "std": std,
        # x0 = scale (latent - shift) has zero mean and unit variance in each channel
        "shift": [float(f"{value:.6g}") for value in mean],
        "scale": [float(f"{1.0 / value:.6g}") if value > 0.0 else 1.0 for value in std],
        # what could not be read, by split; the rows hold the examples that stand in for it
        "skipped": {split: lines for split, lines in state["skipped"].items() if lines},
    }
    _write_json(out / MANIFEST, manifest)
    (out / STATE).unlink(missing_ok=True)
    return manifest


def moments(x0: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of `(N, C, H, W)`, in float64."""
    channels = x0.shape[1]
    total, square, count = np.zeros(channels), np.zeros(channels), 0
    for first in range(0, len(x0), CHUNK):
        part = np.asarray(x0[first : first + CHUNK], dtype=np.float64)
        total += part.sum(axis=(0, 2, 3))
        square += (part**2).sum(axis=(0, 2, 3))
        count += part.size // channels
    mean = total / count
    return mean.tolist(), np.sqrt(np.maximum(square / count - mean**2, 0.0)).tolist()


# ---- one folder, one job ---------------------------------------------------------------------------------


def _settings(
    sources: Mapping[str, Source], autoencoder: Autoencoder, recipe: Recipe, data: Any
) -> dict[str, Any]:
    """What the latents depend on. Of the images: their number, and a hash over some of them."""
    seen = hashlib.sha256()
    counts = {}
    for split, source in sources.items():
        counts[split] = len(source)
        x0, label = source.read(np.unique(np.linspace(0, len(source) - 1, 8).astype(np.int64)))
        for tensor in (x0, label):
            if tensor is not None:
                seen.update(tensor.contiguous().numpy().tobytes())
    return {
        "format": "diffusion_lab latents 1",
        "data": {
            "name": data.name,
            "shape": list(data.shape),
            "n": counts,
            "sha256_of_some": seen.hexdigest(),
        },
        "sha256_of_autoencoder": autoencoder.sha256,
        "recipe": {
            "latent": recipe.latent,
            "seed": recipe.seed,
            "mirror": recipe.mirror,
            "dtype": recipe.dtype,
        },
    }


def _begin(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of the job in a folder: rows done by split; a new one where the folder holds none."""
    for name in (MANIFEST, STATE):
        try:
            told = json.loads((out / name).read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise DataError(f"out={out}: {name} there is damaged; remove the folder") from error
        other = next((key for key, value in settings.items() if told.get(key) != value), None)
        if other is not None:
            raise DataError(
                f"out={out}: latents of another {_WORDS.get(other, other)} are there; name another folder, or remove it"
            )
        return {"skipped": {}, **told}
    strange = next(iter(sorted(out.glob("*.npy"))), None)
    if strange is not None:
        raise DataError(f"out={out}: {strange.name} is there, and no {MANIFEST}; name another folder")
    return {**settings, "done": dict.fromkeys(SPLITS, 0), "skipped": {}}


_WORDS = {"data": "data set", "sha256_of_autoencoder": "autoencoder"}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2, default=str) + "\n")


def _encode_split(
    source: Source,
    autoencoder: Autoencoder,
    out: Path,
    split: str,
    recipe: Recipe,
    state: dict[str, Any],
    *,
    batch_size: int,
    workers: int,
) -> None:
    mirrored = recipe.mirror and split == "train"
    rows, done = len(source) * (2 if mirrored else 1), int(state["done"][split])
    first, label = source.read(np.arange(1))
    shape = autoencoder.encode(_floats(first)).shape[1:]
    x0 = _open(out / f".{split}-x0.npy", (rows, *shape), recipe.dtype, new=done == 0)
    # renamed before the latents: a job that ended between the two finds it done
    named = label is None or (done == rows and (out / f"{split}-label.npy").is_file())
    labels = None if named else _open(out / f".{split}-label.npy", (rows,), "int64", new=done == 0)

    def save() -> None:
        # the numbers first: what the state says is done, is on the disk
        for array in (x0, labels):
            if array is not None:
                array.flush()
        state["done"][split], state["skipped"][split] = done, list(skipped)
        _write_json(out / STATE, state)

    # in order, each once: a mirrored image is read twice
    skipped = dict.fromkeys(state["skipped"].get(split, []))
    note = getattr(source, "note", None)
    batches = DataLoader(
        _Batches(source, range(done, rows, batch_size), rows),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),
    )
    saved = time.monotonic()
    try:
        with progress(f"encoding {split}", rows, unit="images") as tell:
            for images, known, lines in batches:
                if lines and note is not None:
                    note(lines)  # each worker counts only its own towards max_corrupt
                end = done + len(images)
                latents = autoencoder.encode(_floats(images), _noise(recipe, split, range(done, end), shape))
                x0[done:end] = latents.numpy().astype(recipe.dtype)
                if not np.isfinite(x0[done:end]).all():
                    raise DataError(
                        f"{split}: latents {done} to {end - 1} hold what {recipe.dtype} cannot: dtype=float32"
                    )
                if labels is not None and known is not None:
                    labels[done:end] = known.numpy()
                done = end
                skipped.update(dict.fromkeys(lines))
                tell(done)
                if time.monotonic() - saved > SAVE_EVERY_S:
                    save()
                    saved = time.monotonic()
    finally:
        save()
    for stem, array in (("label", labels), ("x0", x0)):
        if array is not None:
            os.replace(out / f".{split}-{stem}.npy", out / f"{split}-{stem}.npy")


def _open(path: Path, shape: tuple[int, ...], dtype: str, *, new: bool) -> np.memmap[Any, Any]:
    if not new:
        try:
            found: np.memmap[Any, Any] = np.load(path, mmap_mode="r+", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is missing or damaged; remove {path.parent}") from error
        if found.shape == shape and found.dtype == dtype:
            return found
        raise DataError(
            f"{path} holds {found.shape} {found.dtype}, not {shape} {dtype}; remove {path.parent}"
        )
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _floats(images: Tensor) -> Tensor:
    return to_float(images) if images.dtype == torch.uint8 else images.float()


def _noise(recipe: Recipe, split: str, rows: range, shape: torch.Size) -> Tensor | None:
    if recipe.latent == "mean":
        return None
    keys = [derive_seed("latents", recipe.seed, split, row) for row in rows]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(key)) for key in keys])


if __name__ == "__main__":
    from diffusion_lab.app.latents import encode_command

    raise SystemExit(encode_command())
