"""Snapshots of averaged weights: one safetensors file for each average and moment, nothing but tensors and strings.

    <folder>/power_005-0000005632.safetensors      metadata: average, sigma_rel, images_seen, buffers

Written aside, flushed and renamed, so a file is whole or not there. The time is in the name, so that a folder is put
in order without a file being opened.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab.files import replacing
from diffusion_lab.modules.errors import CheckpointNotSaved

NAME = re.compile(r"(.+)-(\d{10,})\.safetensors")
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Snapshot:
    """An average as it was at some moment.

    Attributes:
        path: The file.
        average: Name of the average.
        sigma_rel: Width of its power-function profile.
        images_seen: Images behind it.
        buffers: Names of tensors that are no parameters, and so not averaged.
    """

    path: Path
    average: str
    sigma_rel: float
    images_seen: int
    buffers: frozenset[str]


def snapshot_images(path: Path) -> int | None:
    """Images behind a snapshot, by its name; None for any other file."""
    match = NAME.fullmatch(path.name)
    return int(match.group(2)) if match else None


def save_snapshot(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    average: str,
    sigma_rel: float,
    images_seen: int,
    buffers: Collection[str],
    dtype: str,
) -> Path:
    """Write a snapshot atomically.

    Args:
        folder: Where; made if it is not there.
        state: The average's state dict.
        average: Name of the average.
        sigma_rel: Width of its profile.
        images_seen: Images behind it.
        buffers: Names of the tensors that keep their own type.
        dtype: "float16" or "float32", for all others; a tensor that float16 cannot hold stays float32.

    Raises:
        CheckpointNotSaved: If the disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = folder / f"{average}-{images_seen:010d}.safetensors"
    facts = {
        "format": "diffusion_lab snapshot 1",
        "average": average,
        "sigma_rel": repr(float(sigma_rel)),
        "images_seen": str(images_seen),
        "buffers": json.dumps(sorted(buffers)),
    }
    tensors = {
        name: _stored(value, None if name in buffers else DTYPES[dtype]) for name, value in state.items()
    }
    try:
        with replacing(path, flush=True) as aside:
            save_file(tensors, aside, metadata=facts)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointNotSaved(
            f"snapshot {path} was not saved: {reason}; earlier ones are intact"
        ) from error
    return path


def _stored(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a copy on the CPU in memory of its own, as safetensors ask for: tied weights would be refused."""
    value = value.detach().cpu()
    if dtype is None or not value.is_floating_point():
        return value.clone(memory_format=torch.contiguous_format)
    cast = value.to(dtype)
    if bool(torch.isfinite(cast).all()):
        return cast.clone(memory_format=torch.contiguous_format)
    return value.to(torch.float32).clone(memory_format=torch.contiguous_format)


def list_snapshots(folder: Path) -> tuple[list[Snapshot], list[str]]:
    """Return the snapshots of a folder, oldest first, and a line for each file that is damaged."""
    from safetensors import SafetensorError, safe_open

    found, damaged = [], []
    for path in sorted(folder.glob("*.safetensors")):
        if snapshot_images(path) is None:
            continue
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
            found.append(
                Snapshot(
                    path=path,
                    average=facts["average"],
                    sigma_rel=float(facts["sigma_rel"]),
                    images_seen=int(facts["images_seen"]),
                    buffers=frozenset(json.loads(facts["buffers"])),
                )
            )
        except (SafetensorError, OSError, struct.error, KeyError, ValueError, TypeError) as error:
            damaged.append(f"skipped: snapshot {path} is damaged: {error}")
    return sorted(found, key=lambda item: (item.images_seen, item.average)), damaged


def read_snapshot(snapshot: Snapshot) -> dict[str, Tensor]:
    """Read the tensors of a snapshot."""
    from safetensors.torch import load_file

    return load_file(snapshot.path)
