"""Reading pictures: our shards against webdataset's own pipeline, litdata and a plain folder.

    python benchmarks/data.py [--n 20000] [--batches 60] [--rounds 5] [--workers 0 1 2]

All read the same JPEG files in batches of the same size, shuffled, and decode them by Pillow to uint8 tensors:

    shards         dataset=shards, read by index: shuffled over everything, exactly resumable
    webdataset     WebDataset(resampled) with a buffer of 1000 to shuffle in; it has no resume
    litdata        StreamingDataset; left out where it is not installed (the extra `bench`)
    folder         torchvision's ImageFolder under a DataLoader

Start-up is the time from the paths to the first batch, workers and all; the index is there, as it is from the second
run on ("first run" is what building it adds). Images/s are those of the batches after the first. One round runs
everybody once, in turn; the median round counts.

The pictures are CIFAR-10's JPEG copies in DIFFUSION_LAB_DATA, or, where they are missing, made-up ones of 64 pixels.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from PIL import Image
from torch import Tensor

from diffusion_lab.data import Shards
from diffusion_lab.data.archives import Bundle, read_npz
from diffusion_lab.data.convert import Settings, convert
from diffusion_lab.data.convert_sources import ConvertSource, SplitSource

BATCH = 256
Loader = Callable[[int], Iterator[Any]]


def pictures(n: int) -> tuple[Bundle, int, str]:
    """Return JPEG files, their side and a name."""
    path = Path(os.environ.get("DIFFUSION_LAB_DATA", "data")) / "cifar10-jpeg-train.npz"
    if path.is_file():
        return read_npz(path), 32, "CIFAR-10-JPEG, 32 pixels"
    rng, files = np.random.default_rng(0), []
    for _ in range(n):
        # smooth noise has about as many bytes as a photograph
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((64, 64), Image.Resampling.BICUBIC).save(file, format="JPEG", quality=90)
        files.append(file.getvalue())
    return Bundle(n=n, labels=np.arange(n) % 10, file=files.__getitem__), 64, "made-up pictures, 64 pixels"


def decode(content: bytes) -> Tensor:
    """What the peers decode by: Pillow to uint8 `(3, H, W)`."""
    with Image.open(io.BytesIO(content)) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def label(content: bytes) -> int:
    return int(content)


# ---- contenders ------------------------------------------------------------------------------------------------------


def ours(root: Path, side: int) -> Loader:
    def start(workers: int) -> Iterator[Any]:
        data = Shards(
            root=str(root),
            shape=(3, side, side),
            num_classes=10,
            batch_size=BATCH,
            seed=0,
            num_workers=workers,
        )
        data.setup()
        return iter(data.loader(start=0))

    return start


def webdataset(root: Path) -> Loader:
    import webdataset as wds

    urls = [str(path) for path in sorted(root.glob("train-*.tar"))]

    def start(workers: int) -> Iterator[Any]:
        pipeline = (
            wds.WebDataset(urls, resampled=True, shardshuffle=False)
            .shuffle(1000)
            .to_tuple("jpg", "cls")
            .map_tuple(decode, label)
            .batched(BATCH, partial=False)
        )
        return iter(wds.WebLoader(pipeline, batch_size=None, num_workers=workers))

    return start


def load(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


def folder(root: Path) -> Loader:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    def start(workers: int) -> Iterator[Any]:
        files = ImageFolder(str(root), transform=PILToTensor(), loader=load)
        loader = DataLoader(files, batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True)
        return itertools.chain.from_iterable(itertools.repeat(loader))

    return start


class Packed:
    """What litdata stores of a sample."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def __call__(self, k: int) -> dict[str, Any]:
        assert self.bundle.file is not None and self.bundle.labels is not None
        return {"image": self.bundle.file(k), "label": int(self.bundle.labels[k])}


def litdata(root: Path, bundle: Bundle, n: int) -> Loader | str:
    """Return the contender, or why there is none."""
    try:
        from litdata import StreamingDataLoader, StreamingDataset, optimize
    except ImportError as error:
        return f"not installed ({error})"
    # fork, as everybody's workers here: it would set another way for the whole process
    optimize(
        fn=Packed(bundle),
        inputs=list(range(n)),
        output_dir=str(root),
        chunk_bytes="4MB",
        num_workers=1,
        start_method="fork",
    )

    class Decoded(StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[Tensor, int]:
            sample = super().__getitem__(index)
            return decode(sample["image"]), sample["label"]

    def start(workers: int) -> Iterator[Any]:
        files = Decoded(str(root), shuffle=True, drop_last=True)
        loader = StreamingDataLoader(files, batch_size=BATCH, num_workers=workers)
        return itertools.chain.from_iterable(itertools.repeat(loader))

    return start


# ---- measuring -------------------------------------------------------------------------------------------------------


def once(start: Loader, workers: int, batches: int) -> tuple[float, float]:
    """Return seconds to the first batch, and images a second after it."""
    began = time.perf_counter()
    stream = start(workers)
    check(next(stream))
    first = time.perf_counter()
    for _ in range(batches):
        next(stream)
    ended = time.perf_counter()
    del stream  # ends its workers
    return first - began, batches * BATCH / (ended - first)


def check(batch: Any) -> None:
    x0, labels = (batch["x0"], batch["label"]) if isinstance(batch, dict) else batch
    assert x0.dtype == torch.uint8 and len(x0) == BATCH == len(labels) and x0.shape[1] == 3, x0.shape


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=20_000, help="pictures")
    parser.add_argument("--batches", type=int, default=60, help="batches timed in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    bundle, side, what = pictures(given.n)
    n = min(given.n, bundle.n)
    assert bundle.file is not None and bundle.labels is not None

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        file, labels = bundle.file, bundle.labels
        split = SplitSource(n, lambda k: ("jpg", file(k), int(labels[k])), "benchmark")
        source = ConvertSource("benchmark", "benchmark", None, {"train": split})
        convert(source, root / "shards", Settings(per_shard=max(1, n // 16)))
        for k in range(n):
            path = root / "folder" / str(int(labels[k])) / f"{k:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file(k))
        contenders: dict[str, Loader | str] = {
            "shards": ours(root / "shards", side),
            "webdataset": webdataset(root / "shards"),
            "litdata": litdata(root / "litdata", bundle, n),
            "folder": folder(root / "folder"),
        }
        running = {name: start for name, start in contenders.items() if not isinstance(start, str)}
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for round_ in range(given.rounds + 1):  # the first one warms up
            for workers in given.workers:
                for name, start in running.items():
                    result = once(start, workers, given.batches)
                    if round_:
                        found.setdefault((name, workers), []).append(result)
            print(f"round {round_} of {given.rounds}", flush=True)
        first_run = []
        for _ in range(3):
            for index in (root / "shards").glob("*.npz"):
                index.unlink()
            first_run.append(once(running["shards"], 0, 1)[0])

    rows: list[dict[str, Any]] = []
    for workers in given.workers:
        for name, start in contenders.items():
            row: dict[str, Any] = {"reader": name, "workers": workers}
            if isinstance(start, str):
                rows.append({**row, "note": start})
                continue
            startups, speeds = zip(*found[name, workers], strict=True)
            rows.append(
                {**row, "images/s": statistics.median(speeds), "start-up s": statistics.median(startups)}
            )
    rows.append({"reader": "shards, first run", "workers": 0, "start-up s": statistics.median(first_run)})
    ratios: dict[str, float] = {}
    for workers in given.workers:
        for peer in [name for name in running if name != "shards"]:
            pairs = list(zip(found["shards", workers], found[peer, workers], strict=True))
            ratios[f"images_per_s_{peer}_{workers}_workers"] = statistics.median(
                a[1] / b[1] for a, b in pairs
            )
            ratios[f"start_up_{peer}_{workers}_workers"] = statistics.median(b[0] / a[0] for a, b in pairs)
    print(f"{n:,} pictures ({what}), batches of {BATCH}")
    report("data", rows, ratios)


if __name__ == "__main__":
    main()
