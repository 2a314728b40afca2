r"""What a posterior is sampled for: the input images, and their measurements y = A(x) + noise.

    input=photo.png | input=my_photos/ | input=test | input=test:16

A picture is turned upright, laid on white where it is transparent, and converted to the run's number of channels; one
that has not the run's size is centre-cropped to its shape and resized by areas. `test` are the test images of the run's
own data set, in its own order. Each input is measured once, in float32 on the CPU, with noise that belongs to the seed
and to its place among the inputs; what came out is kept beside the job, so that every process, and the same command on
another day, go on with the same y.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusion_lab.app.build import data_module, instantiate
from diffusion_lab.app.errors import UserError, one_line, similar_folder
from diffusion_lab.data.image_folder import BROKEN, SUFFIXES, eight_bits
from diffusion_lab.files import replacing
from diffusion_lab.images import to_float
from diffusion_lab.measurements import measure
from diffusion_lab.rng import SampleRNG, derive_seed

TEST = "test"
FILE = "inputs.npz"
MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Inputs:
    """The images to measure.

    Attributes:
        images: uint8 `(N, C, H, W)`, or float32 `(N, D)` for data that are no images.
        names: What each is called.
        sha256: Hash of the images.
    """

    images: Tensor
    names: list[str]
    sha256: str

    @property
    def x0(self) -> Tensor:
        """The images as the model sees them, float32, in [-1, 1]."""
        return to_float(self.images) if self.images.dtype == torch.uint8 else self.images.float()


@dataclass(frozen=True)
class Measured:
    """Inputs with their measurements.

    Attributes:
        x0: `(N, *D)` float32.
        y: `(N, *M)` float32.
    """

    x0: Tensor
    y: Tensor

    def write(self, folder: Path) -> None:
        """Keep them beside the parts of a job."""
        with replacing(folder / FILE) as aside, aside.open("wb") as file:
            np.savez(file, x0=self.x0.numpy(), y=self.y.numpy())

    def rows(self, owners: Sequence[int], device: torch.device | str) -> Tensor:
        """Return the measurements of the inputs that samples belong to, `(len(owners), *M)`."""
        return self.y[torch.tensor(list(owners))].to(device)


def read_measured(folder: Path) -> Measured | None:
    """Return what was kept in a folder; None if there is nothing whole."""
    try:
        with np.load(folder / FILE, allow_pickle=False) as stored:
            return Measured(torch.from_numpy(stored["x0"]), torch.from_numpy(stored["y"]))
    except (OSError, ValueError, KeyError, EOFError):
        return None


def read_inputs(text: str, trained: Mapping[str, Any], shape: Sequence[int]) -> Inputs:
    """Read what `input=` names.

    Args:
        text: An image file, a folder of them, `test` or `test:<n>`.
        trained: The config of the run, for its data set.
        shape: Shape of one sample.

    Raises:
        UserError: If there is nothing of that name, a picture cannot be decoded, or the run's data are no images.
    """
    word, mark, count = text.partition(":")
    if word == TEST and (not mark or count.isdigit()):
        images, _ = data_module(trained).test_images()
        number = int(count) if mark else len(images)
        if not 1 <= number <= len(images):
            raise UserError(f"input={text}: there are {len(images)} test images")
        images = images[:number]
        images = images if images.dtype == torch.uint8 else images.float()
        return Inputs(images, [f"{TEST}-{k}" for k in range(number)], _hash(images))
    files = _files(text)
    if len(shape) != 3 or shape[0] not in MODES:
        raise UserError(
            f"input={text}: this run's samples have the shape {list(shape)}, which no image file has; "
            f"input={TEST}:4 takes examples of its own data set"
        )
    images = torch.stack([_picture(file, shape) for file in files])
    return Inputs(images, [file.name for file in files], _hash(images))


def _hash(images: Tensor) -> str:
    total = hashlib.sha256(f"{images.dtype}|{tuple(images.shape)}|".encode())
    total.update(images.contiguous().numpy().tobytes())
    return total.hexdigest()


def _files(text: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        found = sorted(
            p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
        )
        if not found:
            raise UserError(f"input={text}: this folder holds no images ({', '.join(sorted(SUFFIXES))})")
        return found
    if not path.is_file():
        near = similar_folder(path)
        raise UserError(f"input={text}: no such image or folder{near or f'; {TEST}:4 takes 4 test images'}")
    return [path]


def _picture(file: Path, shape: Sequence[int]) -> Tensor:
    """Return a picture as uint8 `(C, H, W)`, and say so where it had to be fitted."""
    channels, height, width = shape
    try:
        with Image.open(file) as opened:
            picture = eight_bits(opened, MODES[channels])
    except BROKEN as error:
        raise UserError(f"input: {file} is not a readable image: {one_line(str(error))}") from error
    if picture.size != (width, height):
        was = f"{picture.width}x{picture.height}"
        picture = ImageOps.fit(picture, (width, height), method=Image.Resampling.BOX)
        print(f"input   {file.name} is {was}: its centre is cropped and resized to {width}x{height}")
    pixels = np.asarray(picture)
    return torch.from_numpy(np.array(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)))


def measured(inputs: Inputs, measurement: Mapping[str, Any], seed: int) -> Measured:
    """Measure the inputs.

    Args:
        inputs: The images.
        measurement: The resolved config: `operator` and `noise`, its standard deviation.
        seed: Seed of the samples; with an input's place it gives the noise.

    Raises:
        UserError: If the operator does not take such images.
    """
    noise = float(measurement["noise"])
    if not 0.0 <= noise < float("inf"):
        raise UserError(f"measurement.noise: must be at least 0, got {measurement['noise']}")
    rng = SampleRNG([derive_seed("measurement", seed, k) % 2**32 for k in range(len(inputs.images))])
    x0 = inputs.x0
    try:
        operator = instantiate(measurement["operator"], "measurement.operator")
        y = measure(operator, x0, noise, rng)
    except (ValueError, RuntimeError) as error:
        name = str(measurement["operator"].get("_target_")).rsplit(".", 1)[-1]
        raise UserError(
            f"measurement: {name} does not take images of shape {list(x0.shape[1:])}: {one_line(str(error))}"
        ) from error
    return Measured(x0, y.detach().float())
