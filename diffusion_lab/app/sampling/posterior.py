r"""Sampling a posterior from the command line: what is asked for, and what comes out beside the samples.

    python sample.py run=<run> guidance=dps measurement=inpaint input=<image, folder or test:8> draws=4

    <out>/posterior.png    a row an input: input | measurement | mean of the draws | draws
    <out>/samples.npz      also: inputs, measurements, input_index (of every sample)
    <out>/record.json      also: the measurement, PSNR of mean and draws, residual

    PSNR = 10 log10(2^2 / mean (x - x0)^2) for pixels in [-1, 1]
    residual = rms(y - A x) / noise over what was measured, near 1 for the truth; without noise the rms itself

Whether a guidance samples a posterior is told by its file: it takes its operator from `${measurement...}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw
from torch import Tensor

from diffusion_lab.app.build import instantiate
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.sampling.fit import describe_part
from diffusion_lab.app.sampling.inputs import Measured
from diffusion_lab.app.sampling.job import Job
from diffusion_lab.images import to_float, to_uint8
from diffusion_lab.measurements import Masking, adjoint

MARK = "${measurement"
SHOWN_INPUTS, SHOWN_DRAWS = 16, 8
# of a cell and of what parts them, in pixels
CELL, GAP, CAPTION = 96, 4, 16


# ---- what is asked for -----------------------------------------------------------------------------------


def takes_measurement(node: Any) -> bool:
    """Whether an unresolved node takes something from `measurement`."""
    if not OmegaConf.is_config(node) or node._is_none() or node._is_missing():
        return False
    return _marked(OmegaConf.to_container(node, resolve=False))


def _marked(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_marked, value.values()))
    if isinstance(value, list):
        return any(map(_marked, value))
    return isinstance(value, str) and value.startswith(MARK)


def guidances(folders: Sequence[Path]) -> list[str]:
    """Return the options of the group `guidance` that sample a posterior, with the part they need for it, if any."""
    found = set()
    for file in _files(folders, "guidance"):
        text = file.read_text(encoding="utf-8")
        if MARK in text:
            found.add(file.stem)
        for group, place in re.findall(r"^\s*-\s*/(\w+)@(\w+)\s*:", text, re.MULTILINE):
            if group != "guidance":
                parts = [part for part in _files(folders, group) if MARK in part.read_text(encoding="utf-8")]
                found |= {f"{file.stem} with {group}@guidance.{place}={part.stem}" for part in parts}
    return sorted(found)


def _files(folders: Sequence[Path], group: str) -> list[Path]:
    return [file for folder in folders for file in sorted((folder / group).glob("*.yaml"))]


def asked(cfg: DictConfig, folders: Sequence[Path]) -> bool:
    """Whether a config of `sample` asks for a posterior.

    Args:
        cfg: The composed config, unresolved.
        folders: The config folders.

    Raises:
        UserError: If it asks for only a part of one.
    """
    given = {str(item).partition("=")[0].lstrip("+") for item in cfg.get("overrides") or []}
    choices = cfg.get("choices") or {}
    option, guidance = choices.get("measurement"), choices.get("guidance")
    has_operator = cfg.measurement is not None and cfg.measurement.get("operator") is not None
    takes = takes_measurement(cfg.guidance)
    example = "e.g. input=test:8, an image or a folder of images"
    if not has_operator:
        if cfg.input is not None:
            raise UserError(f"input={cfg.input}: measurement=<option> is needed{_listed(folders)}")
        if takes:
            raise UserError(
                f"guidance={guidance}: it samples a posterior: measurement=<option> and input= are needed"
                f"{_listed(folders)}"
            )
        if "draws" in given:
            raise UserError(
                f"draws={cfg.draws}: only with measurement= and input=; num_samples= says how many"
            )
        return False
    if cfg.input is None:
        raise UserError(f"measurement={option}: input=<image> is needed, {example}")
    if not takes:
        names = ", ".join(guidances(folders))
        raise UserError(
            f"measurement={option}: guidance={guidance} makes no use of it; guidances that do: {names or 'none yet'}"
        )
    if "num_samples" in given:
        raise UserError(
            f"num_samples={cfg.num_samples}: it is inputs x draws here; draws= says how many an input"
        )
    return True


def _listed(folders: Sequence[Path]) -> str:
    found = {file.stem for file in _files(folders, "measurement")} - {"none"}
    return f"; there are: {', '.join(sorted(found))}" if found else ""


# ---- what comes out --------------------------------------------------------------------------------------


def psnr(x: Tensor, x0: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each `x` `(N, *D)` with pixels in [-1, 1]; inf where equal."""
    return 10.0 * torch.log10(4.0 / (x - x0).double().square().flatten(1).mean(1))


def operator_of(job: Job) -> Any:
    """Build the operator of a job with inputs."""
    assert job.posterior is not None
    return instantiate(job.posterior["measurement"]["operator"], "measurement.operator")


def residuals(job: Job, given: Measured, samples: Tensor) -> Tensor:
    """Return rms(y - A x) of each sample `(N, *D)`, in units of the noise where there is some."""
    assert job.posterior is not None
    operator, noise = operator_of(job), float(job.posterior["measurement"]["noise"])
    error = (operator(samples) - given.rows(job.owners(range(len(samples))), "cpu")).double().square()
    if isinstance(operator, Masking):
        # what is blanked is no part of the measurement
        error = error[:, operator.known(given.x0[:1]).expand_as(given.y[:1])[0] > 0]
    rms = error.flatten(1).mean(1).sqrt()
    return rms / noise if noise > 0.0 else rms


def numbers(job: Job, given: Measured, images: np.ndarray) -> dict[str, Any]:
    """Return what record.json tells about the draws of a posterior.

    Args:
        job: The job.
        given: Its inputs and measurements.
        images: The samples, as in samples.npz.
    """
    assert job.posterior is not None
    samples, draws = from_array(images), job.posterior["draws"]
    by_input = samples.unflatten(0, (-1, draws))
    mean = by_input.mean(1)
    own = given.x0[torch.tensor(job.owners(range(len(samples))))]
    of_mean, of_draws, residual = psnr(mean, given.x0), psnr(samples, own), residuals(job, given, samples)
    return {
        "measurement": describe_part(job.posterior["measurement"]["operator"]),
        "noise": float(job.posterior["measurement"]["noise"]),
        "input": job.posterior["input"],
        "inputs": job.posterior["inputs"],
        "inputs_sha256": job.posterior["sha256"],
        "draws": draws,
        "psnr_of_mean": _rounded(of_mean.mean()),
        "psnr_of_draws": _rounded(of_draws.mean()),
        "residual": _rounded(residual.mean()),
        "by_input": {
            "psnr_of_mean": [_rounded(value) for value in of_mean],
            "psnr_of_draws": [_rounded(value) for value in of_draws.unflatten(0, (-1, draws)).mean(1)],
            "residual": [_rounded(value) for value in residual.unflatten(0, (-1, draws)).mean(1)],
        },
    }


def _rounded(value: Tensor) -> float:
    return round(float(value), 4) if math.isfinite(float(value)) else float(value)


def lines(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the printed table that are about the posterior."""
    per = "times the noise, 1 for the truth" if told["noise"] else "(rms, no noise)"
    return [
        ("measurement", f"{told['measurement']}, noise {told['noise']:g}"),
        ("inputs", f"{told['inputs']:,} from {told['input']}, {told['draws']} draws each"),
        ("PSNR", f"{told['psnr_of_mean']:.2f} dB mean of the draws, {told['psnr_of_draws']:.2f} dB a draw"),
        ("residual", f"{told['residual']:.3g} {per}"),
    ]


def from_array(images: np.ndarray) -> Tensor:
    """Return stored samples as the model sees them: float32 `(N, C, H, W)` in [-1, 1], or `(N, D)`."""
    stored = torch.from_numpy(images)
    return to_float(stored.permute(0, 3, 1, 2).contiguous()) if images.ndim == 4 else stored.float()


def arrays(job: Job, given: Measured) -> dict[str, np.ndarray]:
    """Return what samples.npz also holds: inputs as the samples are stored, measurements as float32, input_index."""
    inputs = given.x0
    stored = to_uint8(inputs).permute(0, 2, 3, 1).contiguous().numpy() if inputs.ndim == 4 else inputs.numpy()
    return {
        "inputs": stored,
        "measurements": given.y.numpy(),
        "input_index": np.asarray(job.owners(range(job.num_samples)), dtype=np.int64),
    }


def pictured(job: Job, given: Measured) -> Tensor:
    """Return the measurements as images `(N, C, H, W)` in about [-1, 1]; nan for those that cannot be shown.

    Measurements that are images are shown as they are, of other linear ones A^T y is, and magnitudes of another size on
    a logarithmic scale from black for none to white for the largest.
    """
    operator, y, x0 = operator_of(job), given.y, given.x0
    if y.ndim == 4 and y.shape[1] in (1, 3):
        if operator.linear or y.shape == x0.shape:
            return y
        level = y.abs().log1p()
        return 2.0 * level / level.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12) - 1.0
    if operator.linear:
        return adjoint(operator, y, x0.shape)
    return torch.full_like(x0, math.nan)


def save_picture(job: Job, given: Measured, images: np.ndarray, path: Path) -> None:
    """Draw inputs, measurements and draws side by side; nothing for data that are no images.

    Args:
        job: The job.
        given: Its inputs and measurements.
        images: The samples, as in samples.npz.
        path: The PNG.
    """
    if images.ndim != 4:
        return
    assert job.posterior is not None
    draws = job.posterior["draws"]
    samples = from_array(images).unflatten(0, (-1, draws))
    seen = pictured(job, given)
    names = ["input", "measurement", "mean", *(f"draw {k + 1}" for k in range(min(draws, SHOWN_DRAWS)))]
    rows = min(len(samples), SHOWN_INPUTS)
    sheet = Image.new("RGB", (len(names) * (CELL + GAP) - GAP, CAPTION + rows * (CELL + GAP) - GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        pen.text((column * (CELL + GAP) + 2, 2), name, fill="black")
    for row in range(rows):
        cells = [given.x0[row], seen[row], samples[row].mean(0), *samples[row, :SHOWN_DRAWS]]
        for column, cell in enumerate(cells):
            sheet.paste(_cell(cell), (column * (CELL + GAP), CAPTION + row * (CELL + GAP)))
    sheet.save(path)


def _cell(image: Tensor) -> Image.Image:
    """Return an image `(C, H, W)` as a square of the sheet; what is not a number is grey."""
    pixels = to_uint8(image.float().nan_to_num(0.0, 0.0, 0.0)).permute(1, 2, 0).numpy()
    colour = pixels if pixels.shape[2] == 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    height, width = colour.shape[:2]
    scale = CELL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # whole pixels where there are few of them, areas where there are many
    how = Image.Resampling.NEAREST if scale >= 1.0 else Image.Resampling.BOX
    square = Image.new("RGB", (CELL, CELL), "white")
    square.paste(Image.fromarray(np.ascontiguousarray(colour)).resize(size, how), (0, 0))
    return square
