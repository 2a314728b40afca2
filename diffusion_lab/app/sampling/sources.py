r"""What a run's samples start from: conditions that its data set gives besides labels (`DataModule.conditions`).

A bridge carries sources to data, and a network with `image_channels` is told an image; the data set that trained them
says which belongs to a sample of a given seed and class. Beside the samples then lie

    <out>/samples.npz     also: sources (as the samples are stored), originals where the data set knows them
    <out>/sources.png     a column a sample: source, sample, original
    <out>/record.json     also: PSNR of sources and of samples against the originals

    PSNR = 10 log10(2^2 / mean (x - x0)^2) for pixels in [-1, 1]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.app.build import Loaded, are_pixels, data_module
from diffusion_lab.app.sampling.job import Job, streams
from diffusion_lab.app.sampling.posterior import from_array, psnr
from diffusion_lab.denoisers.bridge import SOURCE, BridgeField, reads_image
from diffusion_lab.images import to_uint8

SHOWN = 16
PICTURE = "sources.png"

Giver = Callable[[Sequence[int], Tensor | None], dict[str, Tensor]]


def data_of(job: Job, loaded: Loaded) -> Any:
    """Return the data module that gives a job's samples their conditions; None for a model that reads none.

    Samples of a posterior are conditioned on their measurement alone.
    """
    reads = isinstance(loaded.denoiser, BridgeField) or reads_image(loaded.denoiser.network)
    return data_module(loaded.config) if reads and job.posterior is None else None


def conditions(job: Job, data: Any, indices: Sequence[int]) -> dict[str, Tensor]:
    """Return what the samples with these indices are conditioned on besides their labels, on the CPU."""
    return {} if data is None else data.conditions(*_who(job, indices))


def _who(job: Job, indices: Sequence[int]) -> tuple[list[int], Tensor | None]:
    labels = job.label_list(indices)
    return streams(job.seed, indices), None if labels is None else torch.tensor(labels, dtype=torch.int64)


def arrays(job: Job, loaded: Loaded) -> dict[str, np.ndarray]:
    """Return `sources` and `originals` of a job's samples, stored as those are; nothing for samples without."""
    data = data_of(job, loaded)
    blocks = [
        range(first, min(first + job.block, job.num_samples))
        for first in range(0, job.num_samples, job.block)
    ]
    given, pixels = [conditions(job, data, block).get(SOURCE) for block in blocks], are_pixels(loaded.config)
    found = {"sources": _stored([block for block in given if block is not None], pixels)}
    if found["sources"] is None:
        return {}
    kept = [data.originals(*_who(job, block)) for block in blocks]
    found["originals"] = _stored([block for block in kept if block is not None], pixels)
    return {name: array for name, array in found.items() if array is not None}


def _stored(blocks: Sequence[Tensor], pixels: bool) -> np.ndarray | None:
    if not blocks:
        return None
    whole = torch.cat(list(blocks)).float()
    return (
        to_uint8(whole).permute(0, 2, 3, 1).contiguous().numpy()
        if pixels and whole.ndim == 4
        else whole.numpy()
    )


def numbers(images: np.ndarray, given: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the mean PSNR of sources and of samples against the originals; nothing where these are no images."""
    same = "originals" in given and given["sources"].shape == given["originals"].shape == images.shape
    if not same or images.dtype != np.uint8:
        return {}
    x0 = from_array(given["originals"])
    # one that equals its original to the byte would make the mean infinite
    most = 10.0 * np.log10(4.0 * 255.0**2)
    kinds = {"psnr_of_sources": given["sources"], "psnr_of_samples": images}
    return {
        name: round(float(psnr(from_array(x), x0).clamp(max=most).mean()), 4) for name, x in kinds.items()
    }


def line(told: Mapping[str, float]) -> tuple[str, str]:
    """Return the row of the printed table."""
    return "PSNR", f"{told['psnr_of_samples']:.2f} dB, of the sources {told['psnr_of_sources']:.2f} dB"


def save_picture(images: np.ndarray, given: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw sources, samples and originals below each other; nothing for data that are no images."""
    if images.dtype != np.uint8:
        return
    from diffusion_lab.app.report.figures import tile

    rows = [given["sources"], images, *([given["originals"]] if "originals" in given else [])]
    rows = [row[:SHOWN] for row in rows if row.shape[1:] == images.shape[1:]]
    tile(np.concatenate(rows), len(rows[0])).save(path)
