r"""One pass of an extractor over a set of images: in blocks, by several processes, and taken up where it stopped.

    set -> blocks of `BLOCK` images -> <scratch>/<first>.safetensors (what the collectors have of a block) -> merged

A block is the same whoever makes it and is merged in its place, so one process and several come to the same bits. A
pass of more than one block leaves them in a scratch folder named after images, features and measures until it is
through; the same command takes them up after an interruption. Summaries of real images are kept for good
(`metrics/reference.py`), those of samples are not: they would fill the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_lab.app import launch
from diffusion_lab.app.build import data_module, instantiate
from diffusion_lab.app.config.choices import read_run
from diffusion_lab.app.errors import UserError
from diffusion_lab.data.image_sets import ImageSet, some
from diffusion_lab.data.progress import progress
from diffusion_lab.data.stored_images import identity, open_images, split_of
from diffusion_lab.files import replacing, write_atomically
from diffusion_lab.metrics.collect import Collect, Collected, Piece, collect, spread
from diffusion_lab.metrics.features import FeatureExtractor
from diffusion_lab.metrics.measures.base import Measure, wanted_of
from diffusion_lab.metrics.reference import shelf

BLOCK = 4096
"""Images of one block; small sets are one."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a set of images is, in plain values that another process can open it from.

    Attributes:
        path: A folder or file; "" for a split of a run's data.
        run: The run whose data are meant; "" for a path.
        split: "train" or "test".
        skip_corrupt: Whether pictures that cannot be read are left out.
        first: How many images, from the first; None for all.
        spread: How many images, spread evenly; None for all.
        name: What records call the set; "" for its path or split.
    """

    path: str = ""
    run: str = ""
    split: str = ""
    skip_corrupt: bool = False
    first: int | None = None
    spread: int | None = None
    name: str = ""

    def open(self, on_skip: Callable[[str], None] | None = None) -> ImageSet:
        """Return the set.

        Raises:
            DataError: If it is missing or damaged.
            UserError: If there are not as many images as asked for.
        """
        if self.path:
            images = open_images(Path(self.path), skip_corrupt=self.skip_corrupt, on_skip=on_skip)
        else:
            images = split_of(data_module(read_run(Path(self.run))), self.split)
        if self.first is not None:
            if self.first > len(images):
                raise UserError(f"num_samples={self.first}: there are {len(images)} samples in {images.name}")
            images = some(images, torch.arange(self.first))
        if self.spread is not None:
            images = some(images, spread(len(images), self.spread))
        return images


@dataclass(frozen=True, kw_only=True)
class Eye:
    """What a set is looked at with.

    Attributes:
        extractor: The features, on `device`.
        measures: All measures that apply.
        metrics: Resolved config of the extractor.
        measured: Resolved config of the measures.
        device: "cpu" or "cuda".
        batch_size: Images at a time.
    """

    extractor: FeatureExtractor
    measures: Sequence[Measure]
    metrics: Mapping[str, Any]
    measured: Mapping[str, Any]
    device: str
    batch_size: int = 256


def look(
    images: ImageSet,
    place: Place,
    part: str,
    eye: Eye,
    *,
    cache: Path,
    keep: bool,
    devices: int = 1,
) -> Collected:
    """Return what the measures want of a set.

    Args:
        images: The set.
        place: Where it is, for other processes.
        part: Its part in the comparison, "samples", "reference", "real" or "train".
        eye: What it is looked at with.
        cache: Folder for summaries.
        keep: Whether to keep the summaries there.
        devices: Processes that share the work.
    """
    wanted, name = wanted_of(eye.measures, part), place.name or images.name
    sha256 = identity(images)
    labels = images.labels if any(what.asks for what in wanted) else None
    files = shelf(cache if keep else None, sha256, labels, eye.extractor)
    kept = files.read(wanted, len(images))
    missing = [what for what in wanted if what not in kept]
    told = json.dumps([files.key(what) for what in missing], sort_keys=True)
    scratch = cache / "passes" / hashlib.sha256(told.encode()).hexdigest()[:20]
    made = _pass(images, missing, place, part, eye, scratch, name, devices) if missing else {}
    files.write(made)
    empty = collect(
        (),
        eye.extractor,
        (),
        n=len(images),
        shape=images.shape,
        name=name,
        sha256=sha256,
        quantised=images.quantised,
    )
    return Collected(**{**vars(empty), "kept": {**kept, **made}})


def _pass(
    images: ImageSet,
    wanted: Sequence[Collect],
    place: Place,
    part: str,
    eye: Eye,
    scratch: Path,
    name: str,
    devices: int,
) -> dict[Collect, Any]:
    starts = range(0, len(images), BLOCK)
    several = len(starts) > 1
    done = [start for start in starts if several and (scratch / f"{start:09d}.safetensors").is_file()]
    total = len(images)
    with progress(f"features of {name}", total, unit="images") as tell:
        if several and devices > 1 and len(done) < len(starts) - 1:
            share = min(devices, len(starts) - len(done))
            _in_ranks(place, part, wanted, eye, scratch, share, tell, total)
        whole: dict[Collect, Any] | None = None
        for start in starts:
            file = scratch / f"{start:09d}.safetensors"
            block = _read(file, images, wanted, eye) if several else None
            if block is None:
                rows = range(start, min(start + BLOCK, total))
                block = block_of(images, rows, wanted, eye, tell)
                if several:
                    _write(file, block)
            if whole is None:
                whole = block
            else:
                for what, collector in whole.items():
                    collector.merge(block[what])
    if several:
        shutil.rmtree(scratch, ignore_errors=True)
    assert whole is not None
    return whole


def _count(starts: Sequence[int], n: int) -> int:
    return sum(min(BLOCK, n - start) for start in starts)


def block_of(
    images: ImageSet,
    rows: range,
    wanted: Sequence[Collect],
    eye: Eye,
    tell: Callable[[int], None] | None = None,
) -> dict[Collect, Any]:
    """Collect one block; `tell` is told up to which image."""
    # a set on the disk may have to be read for its labels
    labels = images.labels if any(what.asks for what in wanted) else None

    def pieces() -> Any:
        for index in torch.arange(rows.start, rows.stop).split(eye.batch_size):
            found: Piece = index, images.read(index), None if labels is None else labels[index]
            yield found
            if tell is not None:
                tell(int(index[-1]) + 1)

    seen = collect(
        pieces(),
        eye.extractor,
        wanted,
        n=len(images),
        shape=images.shape,
        name=images.name,
        quantised=images.quantised,
        device=eye.device,
    )
    return dict(seen.kept)


# ---- several processes -----------------------------------------------------------------------------------


def _in_ranks(
    place: Place,
    part: str,
    wanted: Sequence[Collect],
    eye: Eye,
    scratch: Path,
    devices: int,
    tell: Callable[[int], None],
    n: int,
) -> None:
    job = {
        "place": asdict(place),
        "part": part,
        "wanted": [repr(what) for what in wanted],
        "metrics": eye.metrics,
        "measured": eye.measured,
        "device": eye.device,
        "batch_size": eye.batch_size,
    }
    write_atomically(scratch / "job.json", json.dumps(job))

    def watch() -> None:
        there = [int(file.stem) for file in scratch.glob("[0-9]*.safetensors")]
        tell(_count(there, n))

    ended = launch.launch(
        ["features", str(scratch / "job.json")], world=devices, logs=scratch / "logs", watch=watch
    )
    watch()
    if ended.signal is not None:
        print("interrupted; the same command goes on from here", flush=True)
        raise SystemExit(128 + ended.signal)


def work(file: Path, *, rank: int, world: int) -> None:
    """Make every `world`-th block that is missing, starting with number `rank`."""
    job, scratch = json.loads(file.read_text()), file.parent
    place = Place(**job["place"])
    images = place.open()
    device = job["device"] if job["device"] == "cpu" else f"cuda:{rank % torch.cuda.device_count()}"
    extractor = instantiate(job["metrics"], "metrics")
    if isinstance(extractor, nn.Module):
        extractor.to(device)
    measures = [one for one in instantiate(job["measured"], "measures").values() if one is not None]
    wanted = [what for what in wanted_of(measures, job["part"]) if repr(what) in job["wanted"]]
    eye = Eye(
        extractor=extractor,
        measures=measures,
        metrics=job["metrics"],
        measured=job["measured"],
        device=device,
        batch_size=job["batch_size"],
    )
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    for start in list(range(0, len(images), BLOCK))[rank::world]:
        path = scratch / f"{start:09d}.safetensors"
        if not path.is_file():
            _write(path, block_of(images, range(start, min(start + BLOCK, len(images))), wanted, eye))


def _write(file: Path, block: Mapping[Collect, Any]) -> None:
    state: dict[str, Tensor] = {}
    for what, collector in block.items():
        for key, value in collector.state_dict().items():
            state[f"{what!r}/{key}"] = value.contiguous()
    with replacing(file) as aside:
        save_file(state, aside)


def _read(file: Path, images: ImageSet, wanted: Sequence[Collect], eye: Eye) -> dict[Collect, Any] | None:
    """Return the block in a file; None if there is none, or it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}
        block: dict[Collect, Any] = {}
        for what in wanted:
            head = f"{what!r}/"
            block[what] = what.start(len(images), dict.fromkeys(what.wants, 0))
            block[what].load_state_dict(
                {key.removeprefix(head): value for key, value in state.items() if key.startswith(head)}
            )
        return block
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
