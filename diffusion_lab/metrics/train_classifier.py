"""Train the small classifiers whose features score digits and MNIST, and write their weights.

    python -m diffusion_lab.metrics.train_classifier                     # digits; MNIST too where its data are found
    python -m diffusion_lab.metrics.train_classifier mnist --root <folder with the four IDX files>

From scratch with a fixed seed, on the train split only, for a fixed number of steps (the test split stops nothing).
Images are jittered (rotation, scale, shift) and dithered by up to half a level of the data, so that the features do
not hang on the exact 17 levels of the digits. The safetensors metadata records seed, splits with their hashes,
accuracies and versions.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from diffusion_lab.images import to_float
from diffusion_lab.metrics.features import WEIGHTS
from diffusion_lab.metrics.small_cnn import SmallCNN

DIGITS_TEST_EVERY = 5


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Arguments of `SmallCNN`."""

    size: int
    channels: tuple[int, ...]
    dim: int
    classes: int = 10


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one classifier is trained."""

    architecture: Architecture
    steps: int
    batch_size: int
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    rotation: float = math.radians(12)
    stretch: float = 0.1
    shift: float = 0.08
    dither: float


@dataclass(frozen=True, kw_only=True)
class Split:
    """Real images `(N, 1, H, W)` uint8 and labels, in two parts."""

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


RECIPES = {
    "digits": Recipe(
        architecture=Architecture(size=8, channels=(24, 48), dim=32), steps=3000, batch_size=64, dither=1 / 16
    ),
    "mnist": Recipe(
        architecture=Architecture(size=28, channels=(16, 32, 48), dim=64),
        steps=3000,
        batch_size=128,
        dither=1 / 255,
    ),
}


def digits_split() -> Split:
    """Return scikit-learn's digits in the split of `diffusion_lab.data.digits`: every fifth scan is a test image."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(data.target.astype(np.int64))
    test = torch.arange(len(images)) % DIGITS_TEST_EVERY == 0
    return Split(
        name=f"digits: scans 0, {DIGITS_TEST_EVERY}, {2 * DIGITS_TEST_EVERY}, ... test (360), the others train (1437)",
        train=images[~test],
        train_labels=labels[~test],
        test=images[test],
        test_labels=labels[test],
    )


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of bytes: two zero bytes, type 8, the number of axes, each axis as 4 bytes, then data.

    Raises:
        ValueError: If it is not such a file.
    """
    content = gzip.decompress(path.read_bytes())
    axes = content[3] if len(content) > 3 else 0
    shape = np.frombuffer(content[4 : 4 + 4 * axes], dtype=">u4").astype(int)
    if content[:3] != b"\x00\x00\x08" or len(content) != 4 + 4 * axes + int(shape.prod()):
        raise ValueError(f"{path} is not a whole IDX file of bytes")
    return torch.from_numpy(
        np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(*shape).copy()
    )


def mnist_split(root: Path) -> Split:
    """Return MNIST as it was published: 60,000 train, 10,000 test."""
    parts = [read_idx(root / f"{part}-images-idx3-ubyte.gz")[:, None] for part in ("train", "t10k")]
    labels = [read_idx(root / f"{part}-labels-idx1-ubyte.gz").long() for part in ("train", "t10k")]
    name = "mnist: as published, 60000 train, 10000 test"
    return Split(name=name, train=parts[0], train_labels=labels[0], test=parts[1], test_labels=labels[1])


def jitter(x: Tensor, recipe: Recipe, rng: torch.Generator) -> Tensor:
    """Rotate, stretch, shift and dither every image of `(N, 1, H, W)` in [-1, 1] by its own amounts."""
    angle, stretch_y, stretch_x, dy, dx = (2.0 * torch.rand(5, len(x), generator=rng) - 1.0).unbind()
    angle, stretch_y, stretch_x = (
        recipe.rotation * angle,
        1 + recipe.stretch * stretch_y,
        1 + recipe.stretch * stretch_x,
    )
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [
        stretch_x * cos,
        -stretch_y * sin,
        2 * recipe.shift * dx,
        stretch_x * sin,
        stretch_y * cos,
        2 * recipe.shift * dy,
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(x.shape), align_corners=False)
    moved = functional.grid_sample(x + 1.0, grid, align_corners=False) - 1.0  # outside is background, -1
    return (moved + recipe.dither * (2.0 * torch.rand(x.shape, generator=rng) - 1.0)).clamp(-1.0, 1.0)


def train(split: Split, recipe: Recipe, seed: int) -> SmallCNN:
    """Return the trained and standardised classifier; a function of its arguments on one kind of machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for the layers' own initialisation
        network = SmallCNN(**asdict(recipe.architecture))
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=recipe.weight_decay)
    x0 = to_float(split.train)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(recipe.steps):
        if len(order) < recipe.batch_size:
            order = torch.cat([order, torch.randperm(len(x0), generator=rng)])
        rows, order = order[: recipe.batch_size], order[recipe.batch_size :]
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        logits = network(jitter(x0[rows], recipe, rng))[1]
        loss = functional.cross_entropy(logits, split.train_labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.standardise(outputs(network, split.train)[0])
    return network


@torch.no_grad()
def outputs(network: SmallCNN, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and logits of all `images`."""
    parts = [network(to_float(batch)) for batch in images.split(1000)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def accuracy(network: SmallCNN, images: Tensor, labels: Tensor) -> float:
    """Return the share of images recognised."""
    return (outputs(network, images)[1].argmax(dim=1) == labels).double().mean().item()


def digest(images: Tensor) -> str:
    """Return the SHA-256 of the bytes of a stack of images."""
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def write(name: str, split: Split, seed: int, out: Path) -> dict[str, str]:
    """Train the classifier of `name`, write it to `out`, and return the metadata stored with it."""
    recipe = RECIPES[name]
    network = train(split, recipe, seed)
    metadata = {
        "command": f"python -m diffusion_lab.metrics.train_classifier {name} --seed {seed}",
        "architecture": json.dumps(asdict(recipe.architecture)),
        "recipe": json.dumps(asdict(recipe)),
        "seed": str(seed),
        "split": split.name,
        "train_sha256": digest(split.train),
        "test_sha256": digest(split.test),
        "train_accuracy": f"{accuracy(network, split.train, split.train_labels):.6f}",
        "test_accuracy": f"{accuracy(network, split.test, split.test_labels):.6f}",
        "torch": torch.__version__,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    # one entry, because safetensors writes several in an order that changes from run to run, and with it the hash
    save_file(tensors, out, metadata={"training": json.dumps(metadata, sort_keys=True)})
    return metadata


def main() -> None:
    """Read the command line, train, write, report."""
    parser = argparse.ArgumentParser(description="Train the small classifiers that score digits and MNIST.")
    parser.add_argument(
        "name", nargs="?", choices=sorted(RECIPES), help="default: digits, and mnist where its data are"
    )
    parser.add_argument(
        "--root", type=Path, help="folder with MNIST's four IDX files; default: $DIFFUSION_LAB_DATA/mnist"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for <name>_cnn.safetensors")
    arguments = parser.parse_args()
    data = os.environ.get("DIFFUSION_LAB_DATA")
    root = arguments.root or (Path(data) / "mnist" if data else None)
    if arguments.name == "mnist" and root is None:
        parser.error("mnist needs --root, or DIFFUSION_LAB_DATA")
    names = [arguments.name] if arguments.name else ["digits", *(["mnist"] if root is not None else [])]
    for name in names:
        began = time.perf_counter()
        split = digits_split() if name == "digits" or root is None else mnist_split(root)
        path = arguments.out / f"{name}_cnn.safetensors"
        metadata = write(name, split, arguments.seed, path)
        print(
            f"{path}: test accuracy {float(metadata['test_accuracy']):.4f}, train accuracy "
            f"{float(metadata['train_accuracy']):.4f}, {path.stat().st_size / 1e3:.0f} kB, "
            f"{time.perf_counter() - began:.0f} s"
        )


if __name__ == "__main__":
    main()
