"""The averages of a run as safetensors, one file each, and the config that rebuilds the denoiser of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from diffusion_lab.app.config.choices import read_run
from diffusion_lab.app.export.model_card import write_card
from diffusion_lab.app.runs import record
from diffusion_lab.app.runs.run import RunFolder, identity
from diffusion_lab.app.runs.weights import (
    RAW,
    averages_of,
    from_file,
    from_run,
    hash_tensors,
    kept_weights,
    metadata,
    raw_of,
)
from diffusion_lab.app.teacher import portable
from diffusion_lab.files import replacing, write_atomically

# what only training needs, or only this machine has
DROPPED = ("paths", "callbacks", "logger", "trainer", "resume", "overrides")


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
    from diffusion_lab.app.runs.resume import newest_checkpoint
    from diffusion_lab.modules.checkpoint_io import load_checkpoint

    checkpoint = load_checkpoint(newest_checkpoint(folder.path))
    averages = averages_of(checkpoint) or {RAW: raw_of(checkpoint)}
    files = [
        _export(folder, config, name, tensors, int(checkpoint["images_seen"]))
        for name, tensors in averages.items()
    ]
    for name, path in kept_weights(folder.path).items():
        weights = from_file(path, name)
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
    folder = Path(folder).resolve()
    config, weights = read_run(folder), from_run(folder, ema)
    path = _export(RunFolder(folder), config, weights.name, weights.tensors, weights.images_seen)
    write_card(RunFolder(folder))
    return path


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
