"""Making samples in blocks, so that an image depends on its own index and on nothing else.

A network's last bits depend on how many examples it is given at once (matrix kernels are chosen by shape) and on how
many threads share one product. So the unit of work is fixed: block k holds the samples k B, ..., (k + 1) B - 1,
computed together, on a CPU by one thread; the last block is filled up with the samples that would come next. Hence the
images are the same, bitwise, whatever the batch size, the number of processes and cores, and wherever a job was
interrupted; a larger `batch_size` only means that more blocks are made before they are written.

Finished blocks lie in `<out>/parts/`, written atomically, until the job is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.app.build import Loaded, are_pixels, generation_of, load_denoiser
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.sampling import sources
from diffusion_lab.app.sampling.inputs import FILE, Measured, read_measured
from diffusion_lab.app.sampling.job import Job, read_job, streams
from diffusion_lab.app.stored import placed
from diffusion_lab.files import replacing
from diffusion_lab.images import to_uint8
from diffusion_lab.samplers.generate import Generation
from diffusion_lab.typing import MEASUREMENT


def part_path(folder: Path, indices: range) -> Path:
    """Return the file of a part."""
    return folder / f"{indices.start:09d}-{indices.stop:09d}.npy"


def finished(folder: Path) -> list[range]:
    """Return the parts that are on the disk, in order."""
    found = []
    for path in folder.glob("*-*.npy"):
        first, _, last = path.stem.partition("-")
        if first.isdigit() and last.isdigit():
            found.append(range(int(first), int(last)))
    return sorted(found, key=lambda part: part.start)


def missing(job: Job, folder: Path) -> list[range]:
    """Return what is still to be made, in parts of whole blocks.

    Parts on the disk may have been made with another batch size; what counts is which samples they hold.
    """
    have = {block for part in finished(folder) for block in _blocks(part, job)}
    wanted = [block for block in _blocks(range(job.num_samples), job) if block not in have]
    size, parts, start = max(1, -(-job.batch_size // job.block)), [], 0
    while start < len(wanted):
        stop = start + 1
        while stop < len(wanted) and stop - start < size and wanted[stop] == wanted[stop - 1] + 1:
            stop += 1
        first, last = wanted[start] * job.block, (wanted[stop - 1] + 1) * job.block
        parts.append(range(first, min(last, job.num_samples)))
        start = stop
    return parts


def _blocks(part: range, job: Job) -> list[int]:
    """Indices of the blocks that a part holds in full, as far as the job wants them."""
    first = -(-part.start // job.block)
    last = -(-part.stop // job.block) if part.stop >= job.num_samples else part.stop // job.block
    return list(range(first, last))


def prefill(job: Job, folder: Path, images: np.ndarray) -> None:
    """Take over samples made by an earlier job with the same settings.

    Args:
        job: The new job.
        folder: Its parts.
        images: The first samples of the set, as in samples.npz.
    """
    whole = min(len(images) // job.block * job.block, job.num_samples)
    if len(images) >= job.num_samples:
        whole = job.num_samples
    if whole:
        _save(part_path(folder, range(whole)), images[:whole])


def collect(job: Job, folder: Path) -> np.ndarray:
    """Put the parts together: uint8 `(N, H, W, C)` for images, float32 `(N, *D)` for other data."""
    out: np.ndarray | None = None
    for part in finished(folder):
        piece = np.load(part_path(folder, part), allow_pickle=False)
        if out is None:
            out = np.empty((job.num_samples, *piece.shape[1:]), piece.dtype)
        stop = min(part.stop, job.num_samples)
        out[part.start : stop] = piece[: stop - part.start]
    assert out is not None
    return out


def to_array(samples: Tensor, pixels: bool = True) -> np.ndarray:
    """Return samples as they are stored: images as bytes with channels last, other data as float32.

    Args:
        samples: `(B, *D)`.
        pixels: Whether samples `(B, C, H, W)` are images; latents are not.

    Raises:
        UserError: If a sample is not a number.
    """
    if not bool(samples.isfinite().all()):
        bad = int((~samples.isfinite()).flatten(1).any(dim=1).sum())
        raise UserError(
            f"{bad} of {len(samples)} samples are not finite: the model or these sampling settings diverge"
        )
    if samples.ndim == 4 and pixels:
        return to_uint8(samples).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return samples.float().cpu().numpy()


def work(file: Path, *, rank: int, world: int) -> None:
    """Make every `world`-th missing part of the job in `file`, starting with number `rank`; parts lie beside it."""
    job, folder = read_job(file), file.parent
    loaded = load_denoiser(Path(job.run), job.ema)
    plan = json.loads((folder / "plan.json").read_text())
    parts = [range(first, last) for first, last in plan][rank::world]
    make(job, loaded, parts, folder, local_rank=rank, world=world, on_part=None)


def make(
    job: Job,
    loaded: Loaded,
    parts: Sequence[range],
    folder: Path,
    *,
    local_rank: int = 0,
    world: int = 1,
    on_part: Callable[[range], None] | None = None,
) -> None:
    """Make parts and write them.

    Args:
        job: The job.
        loaded: Its denoiser.
        parts: The samples of each part; whole blocks, but for the very last.
        folder: Where they go.
        local_rank: Which GPU, where there are several.
        world: Processes that share this machine.
        on_part: Called after each part.

    Raises:
        UserError: If the weights are not those the job was planned with, or samples are not finite.
    """
    if loaded.sha256 != job.weights:
        raise UserError(
            f"{job.run} has other weights than when this job began: it was trained further meanwhile"
        )
    device = (
        torch.device("cuda", local_rank % torch.cuda.device_count())
        if job.device == "cuda"
        else torch.device("cpu")
    )
    generation = generation_of({"generation": placed(job.generation, device)})
    denoiser = loaded.denoiser.to(device)
    if job.compile:
        denoiser.network.compile()
    given, data = _measured(job, folder), sources.data_of(job, loaded)
    pixels = are_pixels(loaded.config)

    def block(start: int) -> np.ndarray:
        return to_array(_block(job, generation, denoiser, given, data, device, start), pixels)

    with blocks_at_once(device, world) as pool:
        for part in parts:
            starts = range(part.start, part.stop, job.block)
            whole = np.concatenate(list(pool(block, starts)))[: len(part)]
            _save(part_path(folder, part), whole)
            if on_part is not None:
                on_part(part)


def _measured(job: Job, folder: Path) -> Measured | None:
    """Return the measurements that lie beside the parts; None for a job without inputs."""
    if job.posterior is None:
        return None
    given = read_measured(folder)
    if given is None:
        raise UserError(f"{folder / FILE} is missing or damaged; remove {folder}")
    return given


def _block(
    job: Job,
    generation: Generation,
    denoiser: Any,
    given: Measured | None,
    data: Any,
    device: torch.device,
    start: int,
) -> Tensor:
    indices = range(start, start + job.block)
    labels = job.label_list(indices)
    cond = {name: value.to(device) for name, value in sources.conditions(job, data, indices).items()}
    if labels is not None:
        cond["label"] = torch.tensor(labels, dtype=torch.int64, device=device)
    if given is not None:
        cond[MEASUREMENT] = given.rows(job.owners(indices), device)
    low = torch.autocast(device.type, dtype=torch.bfloat16, enabled=job.precision == "bf16-mixed")
    # both are switches of the thread, and this may be any
    with torch.no_grad(), low:
        return generation(denoiser, seeds=streams(job.seed, indices), cond=cond or None, device=device)


class blocks_at_once:
    """Blocks on a CPU: as many at once as there are cores for this process, each by one thread. On a GPU: in turn."""

    def __init__(self, device: torch.device, world: int) -> None:
        self.device = device
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = max(1, cores // world)

    def __enter__(self) -> Callable[[Callable[[int], np.ndarray], Sequence[int]], Iterator[np.ndarray]]:
        if self.device.type == "cuda":
            self._cudnn = torch.backends.cudnn.flags(benchmark=False, deterministic=True)
            self._cudnn.__enter__()
            return lambda function, items: map(function, items)
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # new threads take over the number set just now
        self._pool = ThreadPoolExecutor(self.workers)
        return lambda function, items: self._pool.map(function, items)

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self._cudnn.__exit__(None, None, None)
            return
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)


def _save(path: Path, array: np.ndarray) -> None:
    with replacing(path) as aside, aside.open("wb") as file:
        np.save(file, array, allow_pickle=False)
