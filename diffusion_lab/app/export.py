"""Weights to give away: one safetensors file for each average, and the config that rebuilds the denoiser.

    export/
        ema.safetensors       tensors of the denoiser; metadata: what `facts_of` says
        config.yaml           the run's config without this machine's folders and without what only training needs
        README.md             the model card, see `model_card.py`

`sample.py` and `evaluate.py` take an export like a run. Of a run they also take averages that were never tracked, made
from its snapshots (`posthoc.py`); `export_average` puts such a one among the exported. Weights that a run kept under a
name of their own (`<run>/kept/`, `callbacks/kept_weights.py`) are asked for by it, and exported too. safetensors hold
nothing but tensors and strings, and the config is checked against the allow-list, so an export from a stranger is data.
With `--diffusers` the weights go to a folder for diffusers instead (`export_diffusers.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from diffusion_lab.app import posthoc, record
from diffusion_lab.app.choices import read_run
from diffusion_lab.app.errors import UserError, did_you_mean
from diffusion_lab.app.run import RunFolder, identity
from diffusion_lab.app.teacher import portable
from diffusion_lab.files import replacing, write_atomically
from diffusion_lab.modules.errors import RunError

RAW = "raw"
KEPT = "kept"
PREFIX = "denoiser."
# what only training needs, or only this machine has
DROPPED = ("paths", "callbacks", "logger", "trainer", "resume", "overrides")


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
    return _from_export(folder, files, ema) if is_export else _from_run(folder, ema)


def _choose(ema: str | None, averages: list[str], others: list[str], folder: Path) -> str:
    """Return the name asked for; else the first average, else the raw weights where they are there."""
    if ema is None:
        return next(iter([*averages, *(name for name in others if name == RAW), *others]))
    if ema not in (names := [*averages, *others]):
        tail = did_you_mean(ema, names)
        # how names go tells more than the nearest one: there may be steps_1 to steps_32, but no steps_64
        tail = f"{tail} There are: {', '.join(names)}" if tail.endswith("?") else tail
        raise UserError(f"ema={ema}: {folder} has no such weights{tail}")
    return ema


def kept_weights(folder: Path) -> dict[str, Path]:
    """Return the files of the weights that a run kept under names of their own."""
    return {path.stem: path for path in sorted((folder / KEPT).glob("*.safetensors"))}


def _from_run(folder: Path, ema: str | None) -> Weights:
    from diffusion_lab.app.resume import newest_checkpoint
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
        return _from_file(kept[name], name)
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
    return _from_file(files[name], name)


def _from_file(path: Path, name: str) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            facts = file.metadata() or {}
    except (SafetensorError, OSError, struct.error) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    images = facts.get("images_seen", "0")
    return Weights(name, tensors, int(images) if images.isdigit() else 0, hash_tensors(tensors), path)


def export_run(folder: RunFolder, config: Mapping[str, Any]) -> list[Path]:
    """Write the averages of a run's newest good checkpoint (the raw weights if it has none) to its export folder.

    What the run kept under names of its own goes there too.

    Args:
        folder: The run.
        config: Its resolved config.

    Returns:
        The files with weights.

    Raises:
        UserError: If the run has no usable checkpoint.
    """
    from diffusion_lab.app.model_card import write_card
    from diffusion_lab.app.resume import newest_checkpoint
    from diffusion_lab.modules.checkpoint_io import load_checkpoint

    checkpoint = load_checkpoint(newest_checkpoint(folder.path))
    averages = averages_of(checkpoint) or {RAW: raw_of(checkpoint)}
    files = [
        _export(folder, config, name, tensors, int(checkpoint["images_seen"]))
        for name, tensors in averages.items()
    ]
    for name, path in kept_weights(folder.path).items():
        weights = _from_file(path, name)
        files.append(_export(folder, config, name, weights.tensors, weights.images_seen))
    write_card(folder)
    return files


def export_average(folder: Path, ema: str | None) -> Path:
    """Write one average of a run to its export folder, beside those written when training ended.

    Args:
        folder: The run folder.
        ema: As in `read_weights`: a width that a sweep found best, "posthoc_0.06", any other name, or None.

    Returns:
        The file, `<folder>/export/<ema>.safetensors`; `sample.py run=<folder>/export ema=<ema>` takes it.

    Raises:
        UserError: If the folder is no run, or there are no such weights.
        RunError: If a checkpoint is unsafe.
    """
    from diffusion_lab.app.model_card import write_card

    folder = Path(folder).resolve()
    config, weights = read_run(folder), _from_run(folder, ema)
    path = _export(RunFolder(folder), config, weights.name, weights.tensors, weights.images_seen)
    write_card(RunFolder(folder))
    return path


def export_diffusers(folder: Path, ema: str | None, out: Path, label: str | None = None) -> list[str]:
    """Write the weights of a run or an export as a folder for diffusers. See `export_diffusers.write_diffusers`."""
    from diffusion_lab.app.build import load_denoiser
    from diffusion_lab.app.export_diffusers import write_diffusers

    loaded = load_denoiser(folder.resolve(), ema)
    facts = facts_of(
        RunFolder(folder.resolve()), loaded.config, loaded.ema, loaded.images_seen, loaded.sha256
    )
    return write_diffusers(loaded, out, label=label, facts=facts)


def facts_of(
    folder: RunFolder, config: Mapping[str, Any], name: str, images: int, sha256: str
) -> dict[str, str]:
    """Return what a safetensors file says about its tensors.

    Args:
        folder: The run, or an export.
        config: Its resolved config.
        name: Of the average.
        images: Images behind it.
        sha256: `hash_tensors` of the denoiser.
    """
    kept = {} if folder.record.is_file() else metadata(folder.path / f"{name}.safetensors")
    told = record.last_session(record.read(folder.record)).get("git") or {}
    commit = str(told.get("commit", "unknown")) + (" with changes" if told.get("dirty") else "")
    return {
        "run": f"{config['name']}/{folder.path.name}",
        "images_seen": str(images),
        "average": name,
        "config": str(record.read(folder.record).get("identity") or identity(config)),
        "commit": commit,
        "sha256": sha256,
        **{key: kept[key] for key in ("run", "config", "commit") if key in kept},
        "format": "diffusion_lab 1",
    }


def metadata(path: Path) -> dict[str, str]:
    """Return what a safetensors file says about itself; nothing where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, struct.error):
        return {}


def _export(
    folder: RunFolder, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor], images: int
) -> Path:
    folder.export.mkdir(exist_ok=True)
    write_atomically(folder.export / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(_portable(config))))
    facts = facts_of(folder, config, name, images, hash_tensors(tensors))
    return _save(tensors, folder.export / f"{name}.safetensors", facts)


def _save(tensors: Mapping[str, Tensor], path: Path, facts: dict[str, str]) -> Path:
    from safetensors.torch import save_file

    # tied weights would be refused: each name gets its own copy
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as aside:
        save_file(whole, aside, metadata=facts)
    return path


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in DROPPED}
    root = (kept.get("dataset") or {}).get("root")
    if isinstance(root, str):
        # found again below DIFFUSION_LAB_DATA, wherever that is
        kept["dataset"] = {**kept["dataset"], "root": Path(root).name}
    if "method" in kept:
        kept["method"] = portable(kept["method"])
    return kept


def main() -> int:
    """Export weights: `python -m diffusion_lab.app.export <run> [<ema>] [--diffusers <folder> [--label <class>]]`."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_lab.app.export",
        description="Export one average of a run: to <run>/export, or as a folder for diffusers.",
    )
    parser.add_argument("run", type=Path, help="the run folder; with --diffusers also an export")
    parser.add_argument(
        "ema",
        nargs="?",
        help="the name of an average, raw, or posthoc_<width>[@<images>]; default: the first average",
    )
    parser.add_argument(
        "--diffusers", type=Path, metavar="FOLDER", help="write a diffusers folder here instead"
    )
    parser.add_argument(
        "--label", help="with --diffusers: fix the class (a number, or none), so that no labels are needed"
    )
    words = parser.parse_args()
    try:
        if words.diffusers is None:
            if words.label is not None:
                raise UserError("--label: only with --diffusers")
            print(f"weights  {export_average(words.run, words.ema)}")
        else:
            for line in export_diffusers(words.run, words.ema, words.diffusers, words.label):
                print(line)
            print(f"diffusers  {words.diffusers}")
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
