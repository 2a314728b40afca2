"""Stored networks inside a guidance: another run, an average, or a noisy classifier, named on the command line.

    guidance:
      weak: {run: <folder or null>, ema: <name or null>}        -> the denoiser of that run; null is the run itself
      classifier: {run: <folder>, ema: <name or null>}          -> the classifier of that run

stand anywhere below `guidance`. When a job is planned, such a node becomes plain values: the absolute folder, the name
of the weights, their hash, so that what is sampled depends on what the job says and on nothing else. When the guidance
is built, they are read, and refused if that run went on meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_lab.app.build import Loaded, load_classifier, load_denoiser
from diffusion_lab.app.errors import UserError

WEAK, CLASSIFIER = "weak", "classifier"
KEYS = {"run", "ema"}
TARGET = "diffusion_lab.app.stored.stored"


def is_stored(key: str, node: Any) -> bool:
    """Whether a node, found under `key`, asks for a stored network."""
    return key in (WEAK, CLASSIFIER) and isinstance(node, Mapping) and bool(node) and set(node) <= KEYS


def find(node: Any, prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the full key and the node of every stored network below `node`, as typed: not planned yet."""
    if isinstance(node, Mapping):
        for key, inner in node.items():
            full = f"{prefix}.{key}"
            if is_stored(str(key), inner):
                yield full, inner
            else:
                yield from find(inner, full)
    elif isinstance(node, list | tuple):
        for index, inner in enumerate(node):
            yield from find(inner, f"{prefix}.{index}")


def planned(node: Any, loaded: Loaded, folder: Path, prefix: str = "guidance") -> Any:
    """Return a guidance's config with every stored network told in plain values.

    Args:
        node: The resolved config.
        loaded: The denoiser to be guided.
        folder: Its run.
        prefix: The full key of `node`, for messages.

    Raises:
        UserError: If a network or its weights are missing, or do not fit the run.
    """
    if isinstance(node, Mapping):
        return {
            key: _plan(str(key), inner, loaded, folder, f"{prefix}.{key}")
            if is_stored(str(key), inner)
            else planned(inner, loaded, folder, f"{prefix}.{key}")
            for key, inner in node.items()
        }
    if isinstance(node, list | tuple):
        return [planned(inner, loaded, folder, f"{prefix}.{index}") for index, inner in enumerate(node)]
    return node


def _plan(key: str, node: Mapping[str, Any], loaded: Loaded, folder: Path, where: str) -> dict[str, Any]:
    run, ema = node.get("run"), node.get("ema")
    if run is None and key == CLASSIFIER:
        raise UserError(
            f"{where}.run=<folder> is needed: a run of experiment=digits/noisy_classifier or its like"
        )
    place = folder if run is None else Path(run).resolve()
    try:
        found: Any = (load_classifier if key == CLASSIFIER else load_denoiser)(place, ema)
    except UserError as error:
        # what load says begins with the word that the main run has for it
        text = str(error)
        raise UserError(
            f"{where}.{text}" if text.startswith(("run=", "ema=")) else f"{where}: {text}"
        ) from error
    if key == WEAK and found.sha256 == loaded.sha256:
        raise UserError(
            f"{where}: the weak model is the model itself; name a worse one by {where}.run=<folder> or "
            f"{where}.ema=<average>"
        )
    _compare(found.config, loaded.config, key, where, place)
    return {
        "_target_": TARGET,
        "kind": key,
        "run": str(place),
        "ema": found.ema,
        "sha256": found.sha256,
    }


def _compare(found: Mapping[str, Any], main: Mapping[str, Any], kind: str, where: str, place: Path) -> None:
    """A network of another run must be of the same data, and a classifier of the same process."""
    for key in ("shape", "num_classes"):
        theirs, ours = found.get(key), main.get(key)
        # a denoiser without labels may stand beside one with them, for it ignores them
        if theirs != ours and not (key == "num_classes" and kind == WEAK and not theirs):
            raise UserError(
                f"{where}.run={place}: its {key} is {theirs}, that of the run to sample is {ours}"
            )
    theirs, ours = _interpolant(found), _interpolant(main)
    if kind == CLASSIFIER and theirs != ours:
        names = [str(node.get("_target_")).rsplit(".", 1)[-1] for node in (theirs, ours)]
        raise UserError(
            f"{where}.run={place}: its process is {names[0]}, that of the run to sample is {names[1]}"
        )


def _interpolant(config: Mapping[str, Any]) -> Mapping[str, Any]:
    method = config.get("method") or {}
    part = method.get("denoiser") or method.get("classifier") or {}
    return part.get("interpolant") or config.get("interpolant") or {}


def placed(node: Any, device: torch.device | str) -> Any:
    """Return a planned config whose stored networks will be built on `device`."""
    if isinstance(node, Mapping):
        if node.get("_target_") == TARGET:
            return {**node, "device": str(device)}
        return {key: placed(inner, device) for key, inner in node.items()}
    return [placed(inner, device) for inner in node] if isinstance(node, list | tuple) else node


def replaced(node: Any, blanks: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return a planned config with other nodes in the place of stored networks.

    Args:
        node: The config.
        blanks: The node to put there, by kind: "weak" or "classifier".
    """
    if isinstance(node, Mapping):
        if node.get("_target_") == TARGET:
            return dict(blanks[node["kind"]])
        return {key: replaced(inner, blanks) for key, inner in node.items()}
    return [replaced(inner, blanks) for inner in node] if isinstance(node, list | tuple) else node


def stored(kind: str, run: str, ema: str, sha256: str, device: str = "cpu") -> nn.Module:
    """Read a stored network; what the node of a planned config builds.

    Args:
        kind: "weak" for a denoiser, "classifier".
        run: Its folder.
        ema: Which weights.
        sha256: Their hash when the job was planned.
        device: Where it goes.

    Raises:
        UserError: If the run has other weights by now.
    """
    found: Any = (load_classifier if kind == CLASSIFIER else load_denoiser)(Path(run), ema)
    if found.sha256 != sha256:
        raise UserError(f"{run} has other weights than when this job began: it was trained further meanwhile")
    module: nn.Module = found.classifier if kind == CLASSIFIER else found.denoiser
    return module.to(device)
