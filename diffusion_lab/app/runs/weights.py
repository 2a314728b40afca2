"""Weights read back: of a run folder's newest good checkpoint, of an older one, of an export, or of what a run kept.

    <run>/checkpoints/          averages and live weights; `<name>@<images>` is an older one
    <run>/snapshots/            averages that nobody tracked, `posthoc_<width>[@<images>]`, see `posthoc.py`
    <run>/kept/                 weights under names of their own, see `callbacks/kept_weights.py`
    <export>/<name>.safetensors    see `../export/`

Nothing is unpickled that could be code: checkpoints are read as tensors and plain values, safetensors hold no more.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from diffusion_lab.app.runs import posthoc
from diffusion_lab.app.config.choices import student_steps
from diffusion_lab.app.errors import UserError, did_you_mean

RAW = "raw"
KEPT = "kept"
PREFIX = "denoiser."


@dataclass(frozen=True)
class Weights:
    """The tensors of one denoiser.

    Attributes:
        name: Name of the average, "raw", or "posthoc_<width>[@<images>]".
        tensors: The denoiser's state dict.
        images_seen: Images behind them.
        sha256: Hash over names, shapes, types and bytes.
        source: The file they came from, or the folder of snapshots.
    """

    name: str
    tensors: dict[str, Tensor]
    images_seen: int
    sha256: str
    source: Path


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors by name, type, shape and value, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def averages_of(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Return the weights of every average of a checkpoint, as state dicts of the denoiser."""
    for key, state in (checkpoint.get("callbacks") or {}).items():
        if key.startswith("EMACallback"):
            return {name: dict(average) for name, average in state.items()}
    return {}


def raw_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the live weights of a checkpoint as a state dict of the denoiser."""
    state = checkpoint["state_dict"]
    return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}


def read_weights(folder: Path, ema: str | None) -> Weights:
    """Read the weights of a run folder (from its newest good checkpoint) or of an export.

    Args:
        folder: The folder.
        ema: Name of an average, "raw", or "posthoc_<width>[@<images>]" (see `posthoc.py`); None takes the first
            average, or the raw weights where there is none. "<name>@<images>" is that of an older checkpoint.

    Raises:
        UserError: If there are no weights, or none of that name, or it cannot be made from the snapshots.
        RunError: If a checkpoint is unsafe.
    """
    files = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    # a run may hold tensors of others; what makes an export is that it has no checkpoints
    is_export = files and not (folder / "checkpoints").is_dir()
    return _from_export(folder, files, ema) if is_export else from_run(folder, ema)


def _choose(ema: str | None, averages: list[str], others: list[str], folder: Path) -> str:
    """Return the name asked for; else the first average, else the raw weights where they are there."""
    if ema is None:
        return next(iter([*averages, *(name for name in others if name == RAW), *others]))
    if ema not in (names := [*averages, *others]):
        tail, known = did_you_mean(ema, names), ", ".join(sorted(names, key=_naturally))
        if student_steps(ema) is not None:  # no number is meant for another
            tail = f"; there are: {known}"
        elif tail.endswith("?"):
            tail = f"{tail} There are: {known}"
        raise UserError(f"ema={ema}: {folder} has no such weights{tail}")
    return ema


def _naturally(name: str) -> list[tuple[str, int]]:
    """Numbers in a name by their size: steps_2 before steps_16."""
    return [(text, int(part or 0)) for text, part in re.findall(r"([^0-9]*)([0-9]*)", name)]


def kept_weights(folder: Path) -> dict[str, Path]:
    """Return the files of the weights that a run kept under names of their own."""
    return {path.stem: path for path in sorted((folder / KEPT).glob("*.safetensors"))}


def from_run(folder: Path, ema: str | None) -> Weights:
    """Read the weights of a run folder. See `read_weights`."""
    from diffusion_lab.app.runs.resume import newest_checkpoint
    from diffusion_lab.modules.checkpoint_io import load_checkpoint

    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: no weights here, neither checkpoints/ nor *.safetensors")
    ema, images = (ema, None) if posthoc.is_one(ema) else _at(ema)
    source = newest_checkpoint(folder) if images is None else _checkpoint_of(folder, images)
    checkpoint = load_checkpoint(source)
    averages = averages_of(checkpoint)
    if ema not in averages and (wanted := posthoc.parse(ema)) is not None:
        tensors, images = posthoc.make(folder, wanted, averages, int(checkpoint["images_seen"]))
        return Weights(wanted.name, tensors, images, hash_tensors(tensors), folder / posthoc.FOLDER)
    kept = kept_weights(folder)
    name = _choose(ema, list(averages), [RAW, *kept], folder)
    if name in kept and name not in averages:
        return from_file(kept[name], name)
    tensors = raw_of(checkpoint) if name == RAW else averages[name]
    return Weights(name, tensors, int(checkpoint["images_seen"]), hash_tensors(tensors), source)


def _at(ema: str | None) -> tuple[str | None, int | None]:
    """Split `<name>@<images>`."""
    name, mark, images = (ema or "").partition("@")
    if not mark:
        return ema, None
    if not images.isdecimal():
        raise UserError(f"ema={ema}: <name>@<images> is meant, e.g. ema@44800")
    return name or None, int(images)


def _checkpoint_of(folder: Path, images: int) -> Path:
    """Return the checkpoint of a run at so many images."""
    from diffusion_lab.modules.checkpoint_io import images_of, list_checkpoints

    found = {images_of(path): path for path in list_checkpoints(folder / "checkpoints")}
    if images not in found:
        there = ", ".join(f"{count:,}" for count in sorted(count for count in found if count is not None))
        raise UserError(
            f"ema=...@{images}: {folder} has no checkpoint at {images:,} images, only at {there or 'none'}; "
            "callbacks.checkpoints.keep says how many are kept"
        )
    return found[images]


def _from_export(folder: Path, files: Mapping[str, Path], ema: str | None) -> Weights:
    order = (OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")) or {}).get("averages") or {}  # type: ignore[union-attr]
    averages = [str(name) for name in order if name in files]
    if ema not in files and posthoc.parse(ema) is not None:
        raise UserError(f"ema={ema}: {folder} is an export, which holds no snapshots; name the run folder")
    if ema not in files and _at(ema)[1] is not None:
        raise UserError(f"ema={ema}: {folder} is an export, which has one moment; name the run folder")
    name = _choose(ema, averages, [name for name in files if name not in averages], folder)
    return from_file(files[name], name)


def from_file(path: Path, name: str) -> Weights:
    """Read one safetensors file, as an export or a run's `kept/` holds them.

    Raises:
        UserError: If it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            facts = file.metadata() or {}
    except (SafetensorError, OSError, struct.error) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    images = facts.get("images_seen", "0")
    return Weights(name, tensors, int(images) if images.isdigit() else 0, hash_tensors(tensors), path)


def metadata(path: Path) -> dict[str, str]:
    """Return what a safetensors file says about itself; nothing where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, struct.error):
        return {}
