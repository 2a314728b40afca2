"""What is sampled: all that an image depends on, in plain values that any process can read from a file.

Sample i of a set starts from its own random stream

    stream(seed, i) = (2654435761 seed + i) mod 2^32,

distinct for the samples of one seed, and disjoint for neighbouring seeds (the factor is Knuth's, near 2^32 over the
golden ratio). For seed 0 it is i itself, so the first samples are those of the pictures made during training.

Samples are made in blocks of a fixed size B, a function of the sample's shape and of the kind of device alone;
`parts.py` says why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_lab.app.build import Loaded
from diffusion_lab.app.errors import UserError, did_you_mean
from diffusion_lab.app.sampling.departures import departures
from diffusion_lab.app.sampling.fit import fit_parts
from diffusion_lab.app.stored import planned
from diffusion_lab.files import write_atomically
from diffusion_lab.typing import NO_LABEL

STRIDE = 2654435761
# numbers in one block: enough to keep the device busy, few enough for its memory
NUMBERS = {"cpu": 2**18, "cuda": 2**20}
LARGEST = {"cpu": 64, "cuda": 256}
SMALLEST = 8


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is sampled, in plain values that can be written to a file.

    Attributes:
        run: The run folder or export.
        ema: Which weights; None for the default ones.
        weights: Hash of the weights; the job is refused if the run went on since.
        seed: Seed of the whole set.
        labels: Labels in turn; None for the classes in turn.
        num_samples: How many.
        batch_size: Samples between two writes, rounded up to whole blocks.
        shape: Shape of one sample.
        num_classes: Number of classes; 0 for data without labels.
        device: "cpu" or "cuda".
        precision: "32-true" or "bf16-mixed".
        compile: Whether to compile the network, which changes the last bits of the images.
        generation: Resolved config of how samples are made.
        posterior: What a posterior is sampled for, None where none is: `measurement` (resolved config), `input` (as
            typed), `inputs` (how many), `sha256` (of the images), `draws` (samples an input).
    """

    run: str
    ema: str
    weights: str
    seed: int
    labels: list[int] | None
    num_samples: int
    batch_size: int
    shape: list[int]
    num_classes: int
    device: str
    precision: str
    generation: dict[str, Any]
    posterior: dict[str, Any] | None = None
    compile: bool = False

    @property
    def block(self) -> int:
        """Samples in a block, a power of two."""
        return block_size(self.shape, self.device)

    @property
    def settings(self) -> dict[str, Any]:
        """What the images depend on."""
        kept = asdict(self)
        for key in ("run", "num_samples", "batch_size"):
            kept.pop(key)
        if not self.compile:
            # as in records that are older than this key
            kept.pop("compile")
        if self.posterior is None:
            kept.pop("posterior")
        else:
            # the images count, not the name of their file
            kept["posterior"].pop("input")
        return kept

    def owners(self, indices: Sequence[int]) -> list[int]:
        """The input that each sample belongs to; those that only fill a block up begin again with the first.

        Raises:
            ValueError: If this is no job with inputs.
        """
        if self.posterior is None:
            raise ValueError("this job has no inputs")
        return [i // self.posterior["draws"] % self.posterior["inputs"] for i in indices]

    def label_list(self, indices: Sequence[int]) -> list[int] | None:
        """Labels of the samples with these indices, or None for data without labels.

        Of a posterior's samples the class is unknown unless it is given: labels are one for each input, in turn.
        """
        if self.num_classes == 0:
            return None
        if self.posterior is not None:
            given = self.labels if self.labels is not None else [NO_LABEL]
            return [given[owner % len(given)] for owner in self.owners(indices)]
        turn = self.labels if self.labels is not None else list(range(self.num_classes))
        return [turn[i % len(turn)] for i in indices]

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")


def read_job(path: Path) -> Job:
    """Read a job; infinities are JSON's `Infinity`, as Python writes them."""
    return Job(**json.loads(path.read_text(encoding="utf-8")))


def block_size(shape: Sequence[int], device: str) -> int:
    """Return the samples in a block: a power of two, from the shape of one sample and the kind of device alone."""
    fitting = NUMBERS[device] // max(1, math.prod(shape))
    return 2 ** int(math.log2(min(LARGEST[device], max(SMALLEST, fitting))))


def streams(seed: int, indices: Sequence[int]) -> list[int]:
    """Return the random stream of each sample."""
    return [(STRIDE * seed + i) % 2**32 for i in indices]


def checked_labels(labels: Any, num_classes: int) -> list[int] | None:
    """Return the labels to take in turn, or None for all classes in turn.

    Raises:
        UserError: If the data have no labels, or a label is out of range.
    """
    if labels is None:
        return None
    wanted = [labels] if isinstance(labels, int) else [int(label) for label in labels]
    if num_classes == 0:
        raise UserError(f"labels={labels}: this model was trained without labels")
    if not wanted:
        raise UserError("labels=[]: at least one label is needed")
    for label in wanted:
        if not 0 <= label < num_classes:
            raise UserError(f"labels={labels}: there are the classes 0 to {num_classes - 1}, and no {label}")
    return wanted


def device_of(name: str) -> str:
    """Return "cpu" or "cuda".

    Raises:
        UserError: If the device is unknown or not there.
    """
    if name in ("auto", "gpu", "cuda"):
        if torch.cuda.is_available():
            return "cuda"
        if name == "auto":
            return "cpu"
        raise UserError(f"device={name}: no GPU is available")
    if name != "cpu":
        raise UserError(f"device={name}: no such device{did_you_mean(name, ['auto', 'cpu', 'cuda'])}")
    return "cpu"


def from_config(config: Mapping[str, Any], loaded: Loaded, posterior: Mapping[str, Any] | None = None) -> Job:
    """Make the job that a resolved config of `sample` or `evaluate` asks for.

    Args:
        config: The config.
        loaded: The denoiser.
        posterior: See `Job`.

    Raises:
        UserError: If labels, device or precision make no sense, or a network named in the guidance does not fit.
    """
    if config["precision"] not in ("32-true", "bf16-mixed"):
        raise UserError(f"precision={config['precision']}: 32-true or bf16-mixed")
    num_classes = int(config["num_classes"] or 0)
    device = device_of(config["device"])
    run = Path(config["run"])
    generation = {
        **config["generation"],
        "guidance": planned(config["generation"]["guidance"], loaded, run),
    }
    for line in departures(loaded.config, generation, weights=loaded.ema, images_seen=loaded.images_seen):
        print(f"note: {line}")
    generation = fit_parts(generation, loaded, run, device, measured=posterior is not None)
    return Job(
        run=str(config["run"]),
        ema=loaded.ema,
        weights=loaded.sha256,
        seed=int(config["seed"]),
        labels=checked_labels(config["labels"], num_classes),
        num_samples=int(config["num_samples"]),
        batch_size=int(config["batch_size"]),
        shape=[int(side) for side in config["shape"]],
        num_classes=num_classes,
        device=device,
        precision=config["precision"],
        compile=bool(config["compile"]),
        generation=generation,
        posterior=None if posterior is None else dict(posterior),
    )
