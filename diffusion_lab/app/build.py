"""From a resolved config to objects, and from a run folder or an export back to a denoiser.

Objects are built by Hydra's `instantiate` from plain containers, so nothing inside ever sees a config object. A
config read from a folder has passed the allow-list (`config/choices.py`) before it comes here.

A network's first weights come from torch's global generator, seeded for just that moment.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from omegaconf import OmegaConf
from torch import nn

from diffusion_lab.app.config.choices import read_run
from diffusion_lab.app.errors import UserError, one_line
from diffusion_lab.app.runs.weights import read_weights
from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.rng import derive_seed
from diffusion_lab.samplers.generate import Generation


def plain(cfg: Any) -> dict[str, Any]:
    """Return a composed config as resolved plain containers."""
    found = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else copy.deepcopy(cfg)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def instantiate(node: Any, where: str) -> Any:
    """Build one node of a resolved config.

    Args:
        node: Plain containers.
        where: Its key, for messages.

    Raises:
        InstantiationException: Of Hydra, from whatever the constructor raised; the entry points make a line of it.
    """
    return hydra.utils.instantiate(OmegaConf.create({where: node}), _convert_="all")[where]


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seed torch's global generator for one moment, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*key))
        yield


@dataclass(frozen=True)
class Loaded:
    """A denoiser rebuilt from a run folder or an export.

    Attributes:
        denoiser: In evaluation mode, without gradients, on the CPU.
        config: The config it was trained with.
        ema: Which weights these are: the name of an average, or "raw".
        images_seen: Images behind them.
        sha256: Hash of the weights; what tells two checkpoints of a run apart.
        source: The file they came from.
    """

    denoiser: NetworkDenoiser
    config: dict[str, Any]
    ema: str
    images_seen: int
    sha256: str
    source: Path


def load_denoiser(folder: Path, ema: str | None = None) -> Loaded:
    """Rebuild the denoiser of a run folder or an export.

    Args:
        folder: The folder; its config is checked against the allow-list before anything of it is built.
        ema: Name of an average, "raw", or "posthoc_<width>[@<images>]" to make one from snapshots; None takes the
            first average, or the raw weights where there is none.

    Raises:
        UserError: If the folder, the weights or the average asked for are missing, or do not fit the config.
        RunError: If a checkpoint holds code.
    """
    config, module, weights = _load(folder, ema, "denoiser")
    return Loaded(module, config, weights.name, weights.images_seen, weights.sha256, weights.source)


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier of noisy images rebuilt from a run folder or an export; the fields are those of `Loaded`."""

    classifier: nn.Module
    config: dict[str, Any]
    ema: str
    images_seen: int
    sha256: str
    source: Path


def load_classifier(folder: Path, ema: str | None = None) -> LoadedClassifier:
    """Rebuild the classifier that a run of `method=noisy_classifier` trained. See `load_denoiser`."""
    config, module, weights = _load(folder, ema, "classifier")
    return LoadedClassifier(module, config, weights.name, weights.images_seen, weights.sha256, weights.source)


def _load(folder: Path, ema: str | None, kind: str) -> tuple[dict[str, Any], Any, Any]:
    """Return config, network and weights of a run that trained a `kind`: "denoiser" or "classifier"."""
    config = read_run(folder)
    method = config.get("method") or {}
    if kind not in method:
        other = next((name for name in ("denoiser", "classifier") if name in method), None)
        tail = f"; it trained a {other}" if other else ""
        hint = f": guidance=classifier guidance.classifier.run={folder}" if other == "classifier" else ""
        raise UserError(f"run={folder}: this run has no {kind}{tail}{hint}")
    weights = read_weights(folder, ema)
    with seeded("init", 0):
        module = instantiate(method[kind], f"method.{kind}")
    _fill(module, weights.tensors, folder)
    module.eval().requires_grad_(False)
    return config, module, weights


def _fill(denoiser: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    try:
        denoiser.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        first = next((line for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise UserError(f"{folder}: the weights do not fit its config.yaml: {one_line(first)}") from error


def data_module(trained: Mapping[str, Any]) -> Any:
    """Build the data module of a recorded config; a folder that has moved is looked for below DIFFUSION_LAB_DATA."""
    node = dict(trained["dataset"])
    root, elsewhere = node.get("root"), os.environ.get("DIFFUSION_LAB_DATA")
    if isinstance(root, str) and not Path(root).is_dir() and elsewhere:
        node["root"] = str(Path(elsewhere) / Path(root).name)
    if "allow_pipe" in node:
        node["allow_pipe"] = False  # what a stored config names is read, never run
    return instantiate(node, "dataset")


def are_pixels(trained: Mapping[str, Any]) -> bool:
    """Whether examples `(C, H, W)` of a recorded config's data set are images, whose samples are stored as bytes."""
    target = (trained.get("dataset") or {}).get("_target_")
    return target is None or bool(getattr(hydra.utils.get_object(str(target)), "pixels", True))


def generation_of(config: Mapping[str, Any]) -> Generation:
    """Build how samples are made, out of a resolved config of `sample`, `evaluate` or `train`."""
    return instantiate(config["generation"], "generation")


__all__ = [
    "Loaded",
    "LoadedClassifier",
    "are_pixels",
    "data_module",
    "generation_of",
    "instantiate",
    "load_classifier",
    "load_denoiser",
    "plain",
    "seeded",
]
