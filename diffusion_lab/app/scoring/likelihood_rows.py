"""The rows of a likelihood (`likelihood/meters.py`), image by image: made in blocks, kept, and taken up again.

    <folder>/settings.json                  what every row depends on
    <folder>/dequantisation.safetensors     a learned law of noise inside bins, where there is one
    <folder>/parts/<block>.npy              rows of a finished block, `(block, columns)` float64
    <folder>/images.npz                     index, label, value and rows of every image, for who looks at single ones

A block is made by one thread from images of a fixed number, the last one of the set filled up from its beginning,
every image from its own seed: so its bits do not depend on threads, batch size or interruptions (`sampling/parts.py`
says why).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_lab.app.display import Ticker
from diffusion_lab.app.errors import UserError, one_line
from diffusion_lab.app.sampling.parts import blocks_at_once
from diffusion_lab.files import replacing, write_atomically
from diffusion_lab.images import to_float
from diffusion_lab.likelihood import BitsPerDimODE, Meter
from diffusion_lab.losses.vlb_terms import Levels
from diffusion_lab.metrics.reference import content_hash
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import derive_seed

TAG = "likelihood"
# training images that are held in memory to learn from
LEARNED_FROM = 20_000


@dataclass(frozen=True)
class Job:
    """What rows depend on besides meter and model, and where they lie.

    Attributes:
        where: The folder.
        settings: All that a row depends on, in plain values.
        labels: Whether the model is told the classes.
        seed: The seed of the set.
        device: Where to compute.
        dtype: Of the model.
        batch_size: Images that are asked for at once; it does not change them.
    """

    where: Path
    settings: Mapping[str, Any]
    labels: bool
    seed: int
    device: torch.device
    dtype: torch.dtype
    batch_size: int


class Images:
    """The test images of a run's data set.

    Attributes:
        data: The data module.
        x0: As stored, `(N, *D)`: bytes of images, floats of points and latents.
        labels: `(N,)`, or None where there are none or the model hears none.
        levels: The values of images; None where the data have a density.
        sha256: Hash of them all.
    """

    def __init__(self, data: Any, levels: Levels | None, conditional: bool) -> None:
        self.data, self.levels, self.conditional = data, levels, conditional
        self.x0, labels = data.test_images()
        self.labels = labels if conditional else None
        self.sha256 = content_hash(self.x0)

    def floats(self, indices: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return images as the model sees them."""
        return seen(self.x0[torch.as_tensor(indices)], device, dtype)

    def cond(self, indices: Sequence[int], labels: bool, device: torch.device) -> dict[str, Tensor] | None:
        """Return the conditions of images, or None."""
        if not labels or self.labels is None:
            return None
        return {"label": self.labels[torch.as_tensor(indices)].to(device)}


def seen(x0: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return stored examples as the model sees them; levels are exact in float64, not float32's."""
    if x0.dtype != torch.uint8:
        return x0.to(device, dtype)
    return (x0.double() / 127.5 - 1.0 if dtype == torch.float64 else to_float(x0)).to(device)


def learned_dequantisation(
    settings: BitsPerDimODE, schedule: Schedule, images: Images, denoiser: Any, job: Job
) -> nn.Module:
    """Return the variational dequantisation that settings ask for: read where it was learned, or learned now."""
    assert images.levels is not None
    file = job.where / "dequantisation.safetensors"
    if file.is_file():
        q = settings.unlearned(images.levels, images.data.shape[0], job.seed).to(job.device)
        q.load_state_dict(load_file(file))
        return q.eval().requires_grad_(False)
    source = images.data.source("train")
    # spread over the set, which may be sorted by class
    x0, labels = source.read(np.linspace(0, len(source) - 1, min(len(source), LEARNED_FROM)).astype(np.int64))
    cond = None
    if job.labels and labels is not None and images.conditional:
        cond = {"label": labels.to(job.device)}
    ticker = Ticker("learning to dequantise", settings.dequantisation_images)
    floats = seen(x0, job.device, job.dtype)
    with blocks_at_once(
        job.device, 1
    ):  # which makes it one thread's work: the same bits on any number of cores
        learned = settings.learn(
            denoiser, schedule, images.levels, floats, cond, seed=job.seed, on_step=lambda done, _: ticker.update(done)
        )  # fmt: skip
    ticker.close()
    with replacing(file) as aside:
        save_file({name: value.cpu().contiguous() for name, value in learned.state_dict().items()}, aside)
    return learned


def measured_rows(meter: Meter, denoiser: Any, images: Images, n: int, job: Job) -> Tensor:
    """Return the rows of the first `n` images, `(n, columns)`; what is on the disk is not made again.

    Raises:
        UserError: If the model's likelihood is not finite, or the ODE solver gives up.
    """
    block, total = int(job.settings["block"]), len(images.x0)
    parts = job.where / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    write_atomically(
        job.where / "settings.json", json.dumps(dict(job.settings), indent=2, default=str) + "\n"
    )
    done = finished(parts, block, len(meter.columns))
    wanted = [k for k in range(-(-n // block)) if k not in done]
    if done and wanted:
        print(f"{min(n, len(done) * block):,} of {n:,} images are measured already", flush=True)

    order = shuffled(total)

    def of_block(start: int) -> np.ndarray:
        # the last block of the set is filled up from its beginning
        indices = [order[index % total] for index in range(start, start + block)]
        seeds = [derive_seed(TAG, job.seed, index) % 2**32 for index in range(start, start + block)]
        x0 = images.floats(indices, job.device, job.dtype)
        rows = meter(denoiser, x0, images.cond(indices, job.labels, job.device), seeds)
        return rows.cpu().numpy()

    ticker = Ticker("measuring", n, done=min(n, len(done) * block))
    try:
        with blocks_at_once(job.device, 1) as pool:
            # only so many are asked for at once that an interruption does not wait for the rest
            at_once = max(1, job.batch_size // block)
            for first in range(0, len(wanted), at_once):
                ask = wanted[first : first + at_once]
                for k, rows in zip(ask, pool(of_block, [k * block for k in ask]), strict=True):
                    if not np.isfinite(rows).all():
                        raise UserError(
                            f"images {k * block} to {(k + 1) * block - 1} have no finite likelihood: the model diverges"
                        )
                    _save(parts / f"{k:07d}.npy", rows)
                    done[k] = rows
                    ticker.update(min(n, len(done) * block))
    except RuntimeError as error:
        if "ODE" not in str(error):
            raise
        raise UserError(f"metrics: {one_line(str(error))}") from error
    finally:
        ticker.close()
    return torch.from_numpy(np.concatenate([done[k] for k in range(-(-n // block))])[:n])


def shuffled(total: int) -> list[int]:
    """Return the order in which images are measured, always the same one.

    The first n of it are a random sample of the set, which the first n of a set sorted by class are not.
    """
    found: list[int] = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
    return found


def finished(parts: Path, block: int, columns: int) -> dict[int, np.ndarray]:
    """Return the blocks on the disk, whole ones."""
    found = {}
    for path in sorted(parts.glob("*.npy")):
        if path.stem.isdigit():
            try:
                rows = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError):
                continue
            if rows.shape == (block, columns):
                found[int(path.stem)] = rows
    return found


def _save(path: Path, rows: np.ndarray) -> None:
    with replacing(path) as aside, aside.open("wb") as file:
        np.save(file, rows, allow_pickle=False)


def keep_images(where: Path, meter: Meter, rows: Tensor, images: Images, n: int) -> None:
    """Write what is known of every image to one file."""
    index = np.asarray(shuffled(len(images.x0))[:n])
    labels = np.full(n, -1) if images.labels is None else images.labels.numpy()[index]
    with replacing(where / "images.npz") as aside, aside.open("wb") as file:
        np.savez_compressed(
            file, index=index, label=labels, value=meter.total(rows).numpy(), rows=rows.numpy(),
            columns=np.asarray(meter.columns),
        )  # fmt: skip
