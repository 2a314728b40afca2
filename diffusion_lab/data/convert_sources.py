"""What `convert` can read: one list of numbered samples for each split, whatever they lie in.

    a folder of pictures              files as they are, classes by folder; train and test (or val) apart where they are
    a folder of IDX files             MNIST and its kin, as PNG
    CIFAR-10's archive or folder      as PNG
    a .npz, or a folder of <split>.npz     arrays as PNG; JPEG files as they are

A sample is asked for by its number, so a conversion can go on anywhere.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_lab.data.archives import Bundle, find_cifar, is_cifar, read_cifar, read_npz
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.image_folder import ImageFolder
from diffusion_lab.data.mnist import FILES, read_idx
from diffusion_lab.data.pictures import SUFFIXES

Sample = tuple[str, bytes, int | None]
"""Extension, content, label."""

_SPLIT = re.compile(r"(^|[-_.])(train|test|val)([-_.]|$)")


@dataclass(frozen=True)
class SplitSource:
    """The samples of a split.

    Attributes:
        n: How many.
        sample: Returns the k-th.
        fingerprint: A hash of what it was made from, so far as can be had without reading it all.
    """

    n: int
    sample: Callable[[int], Sample]
    fingerprint: str


@dataclass(frozen=True)
class ConvertSource:
    """What a conversion reads.

    Attributes:
        kind: In words.
        name: What records will call the data.
        classes: Class names, or None.
        splits: By name.
    """

    kind: str
    name: str
    classes: Sequence[str] | None
    splits: dict[str, SplitSource]


def open_source(path: Path, labels: bool = True) -> ConvertSource:
    """Find out what lies at a path, and open it.

    Args:
        path: A file or a folder.
        labels: Whether to take labels over; without them the folders of a folder of pictures are no classes.

    Raises:
        DataError: If it is nothing that can be converted; says what can.
    """
    if not path.exists():
        raise DataError(f"there is nothing at {path} to convert")
    found = _open(path, labels)
    return (
        found
        if labels
        else replace(found, classes=None, splits={k: _bare(s) for k, s in found.splits.items()})
    )


def _bare(split: SplitSource) -> SplitSource:
    def sample(k: int) -> Sample:
        extension, content, _ = split.sample(k)
        return extension, content, None

    return replace(split, sample=sample)


def _open(path: Path, labels: bool) -> ConvertSource:
    if path.is_file() and path.suffix == ".npz":
        return _npz({_split_of(path.stem): path}, path.stem)
    if path.is_file() and is_cifar(path):
        return _cifar(path)
    if path.is_dir():
        archives = sorted(p for p in path.glob("*.npz") if _SPLIT.search(p.stem))
        if (cifar := find_cifar(path)) is not None:
            return _cifar(cifar)
        if idx := _idx_files(path):
            return _idx(idx, path.name)
        if archives:
            by_split = {_split_of(p.stem): p for p in archives}
            if len(by_split) < len(archives):
                raise DataError(f"{path} holds several .npz files of one split: name the one to convert")
            return _npz(by_split, path.name)
        return _folder(path, labels)
    raise DataError(
        f"{path}: it can convert a folder of pictures or of IDX files, cifar-10-python.tar.gz, cifar-10-binary.tar.gz "
        "and .npz"
    )


def _split_of(stem: str) -> str:
    found = _SPLIT.search(stem)
    return "train" if found is None or found.group(2) == "train" else "test"


def _hash(*words: object) -> str:
    return hashlib.sha256("\0".join(map(str, words)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _stat(path: Path) -> str:
    return f"{path.name}:{path.stat().st_size}"


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG")
    return file.getvalue()


def _bundled(bundle: Bundle, fingerprint: str) -> SplitSource:
    def sample(k: int) -> Sample:
        label = None if bundle.labels is None else int(bundle.labels[k])
        if bundle.file is not None:
            return "jpg", bundle.file(k), label
        assert bundle.pixels is not None
        return "png", _png(bundle.pixels[k]), label

    return SplitSource(bundle.n, sample, fingerprint)


def _npz(paths: dict[str, Path], name: str) -> ConvertSource:
    bundles = {split: read_npz(path) for split, path in paths.items()}
    jpeg = next(iter(bundles.values())).file is not None
    splits = {split: _bundled(bundle, _hash(_stat(paths[split]))) for split, bundle in bundles.items()}
    classes = next((b.classes for b in bundles.values() if b.classes is not None), None)
    labels = [b.labels for b in bundles.values() if b.labels is not None]
    if classes is None and labels and (last := max(int(some.max()) for some in labels)) < 100_000:
        classes = [str(k) for k in range(last + 1)]
    name = re.sub(r"[-_.]?(train|test|val)$", "", name) or name
    return ConvertSource("npz of JPEG files" if jpeg else "npz of arrays", name, classes, splits)


def _cifar(path: Path) -> ConvertSource:
    bundles = {split: read_cifar(path, split) for split in ("train", "test")}
    splits = {split: _bundled(bundle, _hash("cifar10", bundle.n)) for split, bundle in bundles.items()}
    return ConvertSource("CIFAR-10", "cifar10", bundles["train"].classes, splits)


def _idx_files(root: Path) -> dict[str, tuple[Path, Path]]:
    found = {}
    for split, names in FILES.items():
        pair = [next((p for p in (root / f"{n}.gz", root / n) if p.is_file()), None) for n in names]
        if pair[0] is not None and pair[1] is not None:
            found[split] = (pair[0], pair[1])
    return found


def _idx(files: dict[str, tuple[Path, Path]], name: str) -> ConvertSource:
    splits, classes = {}, 0
    for split, paths in files.items():
        images, labels = (_read_idx(path) for path in paths)
        if images.ndim != 3 or labels.shape != (len(images),):
            raise DataError(f"{paths[0]} and {paths[1]} do not belong together")
        classes = max(classes, int(labels.max()) + 1)
        bundle = Bundle(n=len(images), labels=labels.astype(np.int64), pixels=images)
        splits[split] = _bundled(bundle, _hash(*map(_stat, paths)))
    return ConvertSource("IDX files", name, [str(k) for k in range(classes)], splits)


def _read_idx(path: Path) -> np.ndarray:
    try:
        payload = path.read_bytes()
        return read_idx(gzip.decompress(payload) if path.suffix == ".gz" else payload, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error})") from error


def _folder(root: Path, labels: bool) -> ConvertSource:
    """Pictures below a folder, by the same rules as `dataset=image_folder`; a test split only where it is apart."""
    probe = ImageFolder(root=str(root), shape=(3, 8, 8), num_classes=0, batch_size=1, seed=0)
    train = probe.folder("train")
    apart = train != probe.folder("test")
    names = sorted(p.name for p in train.iterdir() if p.is_dir() and not p.name.startswith("."))
    loose = any(
        p.suffix.lower() in SUFFIXES and not p.name.startswith(".") for p in train.iterdir() if p.is_file()
    )
    labelled = labels and bool(names) and not loose
    splits = {}
    for split in ("train", "test") if apart else ("train",):
        folder = probe.folder(split)
        paths = sorted(p for p in folder.rglob("*") if probe.wanted(p.relative_to(folder)) and p.is_file())
        if not paths:
            raise DataError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
        splits[split] = _files(folder, paths, _labels(folder, paths, names) if labelled else None)
    return ConvertSource("folder of pictures", root.name or "pictures", names if labelled else None, splits)


def _labels(folder: Path, paths: Sequence[Path], names: Sequence[str]) -> list[int]:
    number = {name: k for k, name in enumerate(names)}
    labels = []
    for path in paths:
        name = path.relative_to(folder).parts[0]
        if name not in number or path.parent == folder:
            raise DataError(f"{path} is in none of the class folders that are there for training")
        labels.append(number[name])
    return labels


def _files(folder: Path, paths: Sequence[Path], labels: Sequence[int] | None) -> SplitSource:
    def sample(k: int) -> Sample:
        extension = paths[k].suffix.lower()[1:]
        return extension, paths[k].read_bytes(), None if labels is None else labels[k]

    fingerprint = _hash(len(paths), *(p.relative_to(folder) for p in paths))
    return SplitSource(len(paths), sample, fingerprint)
