"""Grids and samplers that are fitted to a model: fitted once, kept in the run, and plain values from then on.

`grid=align_your_steps` or `sampler=dpm_solver_v3` name objects with a method `fit(denoiser, x0, cond, rng, progress)`.
Before a job is planned they are fitted here, to the run's denoiser under the guidance and modifiers asked for, on
training images, and the job gets what came out instead: the log-SNRs of the grid, the file of the sampler's statistics.
So what is sampled depends on plain values, which the record shows, and a second job finds the first one's fit in
`<run>/fitted/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.app.build import Loaded, data_module, instantiate
from diffusion_lab.app.display import Ticker
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.runs.places import workplace
from diffusion_lab.app.runs.run import digest
from diffusion_lab.app.stored import TARGET, placed
from diffusion_lab.denoisers.bridge import BridgeField
from diffusion_lab.files import replacing, write_atomically
from diffusion_lab.images import to_float
from diffusion_lab.rng import SampleRNG

EXAMPLES = 256
FOLDER = "fitted"


UNGUIDED = {"_target_": "diffusion_lab.guidance.Unguided", "_partial_": True}


def fit_parts(
    generation: Mapping[str, Any], loaded: Loaded, folder: Path, device: str, *, measured: bool = False
) -> dict[str, Any]:
    """Return how samples are made with every part that wants fitting fitted.

    Args:
        generation: Resolved config of the generation; a network that its guidance names is planned.
        loaded: The denoiser to fit to.
        folder: The run, which keeps the results; for an export see `runs/places.py`.
        device: Where to evaluate the denoiser.
        measured: Whether the guidance samples a posterior. Training images have no measurement: parts are then fitted
            to the denoiser without it.
    """
    out, asked = dict(generation), generation["grid"]
    if measured:
        out["guidance"] = UNGUIDED
    for name in ("grid", "sampler"):
        part = instantiate(out[name], name)
        if isinstance(part, Tensor) or not hasattr(part, "fit") or getattr(part, "fitted", False):
            continue
        if isinstance(loaded.denoiser, BridgeField):
            raise UserError(
                f"{name}: {type(part).__name__} is fitted to a denoiser, this run's model is the field of a bridge: "
                "grid=uniform_time with sampler=transport_ode or transport_sde"
            )
        key = digest(
            {
                "part": out[name],
                "guidance": out["guidance"],
                "modifiers": out.get("modifiers"),
                "weights": loaded.sha256,
                "examples": EXAMPLES,
            }
        )
        file = workplace(folder) / FOLDER / f"{name}-{type(part).__name__}-{key[:12]}"
        if name == "grid":
            out[name] = _grid(part, out, loaded, file.with_suffix(".json"), device)
        else:
            out[name] = _sampler(part, out, loaded, file.with_suffix(".safetensors"), device)
    # a guidance may have been told the grid: it gets the one that is used
    out["guidance"] = _with_grid(generation["guidance"], asked, out["grid"])
    return out


def _with_grid(node: Any, asked: Any, fitted: Any) -> Any:
    """Return a node with the grid that was fitted wherever it named the one asked for."""
    if asked is fitted or asked == fitted or not isinstance(node, Mapping):
        return node
    return {
        key: fitted if key == "grid" and inner == asked else _with_grid(inner, asked, fitted)
        for key, inner in node.items()
    }


def _grid(
    part: Any, generation: Mapping[str, Any], loaded: Loaded, file: Path, device: str
) -> dict[str, Any]:
    if not file.is_file():
        levels = _fit(part, "grid", generation, loaded, device).tolist()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"part": generation["grid"], "logsnr": levels[:-1]}) + "\n")
        print(f"grid    fitted and kept in {file}")
    levels = json.loads(file.read_text())["logsnr"]
    return {
        "_target_": "diffusion_lab.samplers.grids.from_logsnrs",
        "logsnrs": levels,
        "origin": describe_part(generation["grid"]),
    }


def _sampler(
    part: Any, generation: Mapping[str, Any], loaded: Loaded, file: Path, device: str
) -> dict[str, Any]:
    if not file.is_file():
        from safetensors.torch import save_file

        tensors = _fit(part, "sampler", generation, loaded, device)
        with replacing(file) as aside:
            save_file({name: value.contiguous() for name, value in tensors.items()}, aside)
        print(f"sampler fitted and kept in {file}")
    return {**generation["sampler"], "statistics": str(file)}


def describe_part(node: Mapping[str, Any]) -> str:
    """Return a node as text: the class and its plain settings, a stored network as the name of its run."""
    if node.get("_target_") == TARGET:
        return f"{Path(node['run']).name}/{node['ema']}"
    name = str(node.get("_target_", "none")).rsplit(".", 1)[-1]
    settings = [f"{k}={v}" for k, v in node.items() if not k.startswith("_") and not isinstance(v, dict)]
    nested = [f"{k}={describe_part(v)}" for k, v in node.items() if isinstance(v, dict)]
    return f"{name}({', '.join([*nested, *settings])})"


def _fit(part: Any, what: str, generation: Mapping[str, Any], loaded: Loaded, device: str) -> Any:
    guidance = instantiate(placed(generation["guidance"], device), "guidance")
    denoiser: Any = guidance(loaded.denoiser.to(device))
    for modifier in instantiate(generation.get("modifiers") or {}, "modifiers").values():
        denoiser = modifier(denoiser)
    images, labels = data_module(loaded.config).train_images()
    # evenly spread over the data set, whose order may be by class
    chosen = torch.linspace(0, len(images) - 1, min(EXAMPLES, len(images))).long()
    x0 = images[chosen]
    x0 = (to_float(x0) if x0.dtype == torch.uint8 else x0.float()).to(device)
    conditional = labels is not None and int(loaded.config.get("num_classes") or 0) > 0
    cond = {"label": labels[chosen].to(device)} if conditional and labels is not None else None
    ticker: Ticker | None = None

    def progress(done: int, total: int) -> None:
        nonlocal ticker
        ticker = ticker or Ticker(f"fitting {type(part).__name__}", total, unit="steps")
        ticker.update(done)

    try:
        with torch.no_grad():
            return part.fit(denoiser, x0, cond, SampleRNG(range(len(x0))), progress)
    finally:
        if ticker is not None:
            ticker.close()
