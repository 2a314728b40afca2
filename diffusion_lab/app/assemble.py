"""All that a training run is made of, built from its resolved config; what does not fit together is refused first.

The initial weights come from torch's global generator, seeded from the run's seed for just that moment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from diffusion_lab.app.build import generation_of, instantiate, seeded
from diffusion_lab.app.config.rules import check_precision
from diffusion_lab.app.errors import UserError, one_line
from diffusion_lab.app.launch import OWN, outer_world, started_by_others
from diffusion_lab.app.sampling.probe import blank_of
from diffusion_lab.app.stored import find
from diffusion_lab.app.teacher import with_teacher
from diffusion_lab.callbacks import StopAtImages
from diffusion_lab.denoisers.bridge import BridgeField
from diffusion_lab.samplers.transport_samplers import check_kinds

FLOAT16 = ("16", "16-mixed")


@dataclass(frozen=True)
class Parts:
    """What a training run is made of."""

    module: pl.LightningModule
    data: pl.LightningDataModule
    trainer: pl.Trainer
    callbacks: list[pl.Callback]
    loggers: list[Any]


def assemble(config: Mapping[str, Any]) -> Parts:
    """Build all that a training run needs.

    Args:
        config: A resolved config of `train`.

    Raises:
        UserError: If the trainer cannot be made of what the machine has.
        DataError: If the data are missing or damaged.
    """
    from diffusion_lab.loggers import hush_lightning

    hush_lightning()
    _refuse_stored(config)
    data = instantiate(config["dataset"], "dataset")
    _compare_shapes(config, data)
    # what is missing or damaged is said now, not after the trainer has started
    data.setup("fit")
    with seeded("init", config["seed"]):
        module = instantiate(with_teacher(config["method"]), "method")
    _compare_kinds(config, module)
    callbacks = [
        node for node in instantiate(config["callbacks"] or {}, "callbacks").values() if node is not None
    ]
    callbacks.append(StopAtImages(max_images=config["max_images"]))
    loggers = [node for node in instantiate(config["logger"] or {}, "logger").values() if node is not None]
    return Parts(module, data, _trainer(config, callbacks, loggers), callbacks, loggers)


def _refuse_stored(config: Mapping[str, Any]) -> None:
    """A guidance that needs another stored network is for `sample.py`, which reads it."""
    method = config.get("method") or {}
    places = {"guidance": config.get("guidance"), "method.guidance": method.get("guidance")}
    for where, _ in (found for prefix, node in places.items() for found in find(node, prefix)):
        raise UserError(f"{where}: a stored network guides samples of sample.py, not those of training")


def _compare_shapes(config: Mapping[str, Any], data: Any) -> None:
    """The config says what the network is built for, the data say what they are."""
    for key in ("shape", "num_classes"):
        found = getattr(data, key, None)
        found = list(found) if isinstance(found, tuple | list) else found
        if found is not None and found != config[key] and not (key == "num_classes" and config[key] == 0):
            raise UserError(
                f"{key}: the config says {config[key]}, the data set {config['dataset']['_target_']} has {found}"
            )


def _compare_kinds(config: Mapping[str, Any], module: Any) -> None:
    """A bridge is sampled in its own way; what cannot be is refused before it is trained."""
    denoiser = getattr(module, "denoiser", None)
    if denoiser is None:
        return
    try:
        check_kinds(denoiser, instantiate(config["sampler"], "sampler"))
        if isinstance(denoiser, BridgeField):
            generation_of(config)(blank_of(denoiser), seeds=[0])
    except ValueError as error:
        raise UserError(f"sampler: {one_line(str(error))}") from error


def _trainer(config: Mapping[str, Any], callbacks: list[pl.Callback], loggers: list[Any]) -> pl.Trainer:
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from diffusion_lab.modules.checkpoint_io import AtomicCheckpointIO

    node = dict(config["trainer"])
    check_precision(node["precision"])
    plugins: list[Any] = [AtomicCheckpointIO()]
    # the environment is named: Lightning guesses wrongly inside a Kubernetes pod, and in a job that is called "bash"
    if OWN in os.environ:
        plugins.append(LightningEnvironment())
    elif started_by_others():
        _, world, local = outer_world()
        node.update(devices=local, num_nodes=world // local)
        if node["strategy"] == "auto":
            node["strategy"] = "ddp"
        plugins.append(TorchElasticEnvironment())
    if str(node["precision"]) in FLOAT16:
        # Lightning would take bfloat16 in its place on a CPU
        plugins.append(MixedPrecision("16-mixed", _kind(node["accelerator"])))
        node["precision"] = None
    make = instantiate({**node, "_partial_": True}, "trainer")
    try:
        return make(
            callbacks=callbacks,
            logger=loggers or False,
            plugins=plugins,
            use_distributed_sampler=False,
            default_root_dir=config["paths"]["run"],
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise UserError(f"trainer: {one_line(str(error))}") from error


def _kind(accelerator: str) -> str:
    """Return the kind of device that Lightning will choose: "cpu" or "cuda"."""
    return "cuda" if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
