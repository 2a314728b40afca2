"""Shards as a `Source`: any sample is one read at a known place, so order is the loader's business alone.

    k --tables--> shard, offset, size --pread--> bytes --decode--> pixels, label

Hence global shuffle, exact resume, any number of processes and workers; and shards of unlike length cannot make one
process wait for another, because nobody owns a shard.

A sample that cannot be decoded is replaced by the next one that can: a function of k, so the stream stays a function of
seed and position. Each is told in `skipped`, and more than a given share of them is an error, as is every fault of
a shard as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.data.errors import DataError
from diffusion_lab.data.pictures import Preparation, channels_first, reason
from diffusion_lab.data.shards.decode import UNDECODABLE, decode_array, decode_label, decode_picture, kind_of
from diffusion_lab.data.shards.handles import Handles
from diffusion_lab.data.shards.index import ABSENT, ShardIndex, open_index, printable
from diffusion_lab.data.shards.manifest import check_sizes
from diffusion_lab.data.shards.paths import shard_paths

IN_A_ROW = 100
"""Samples that may be unreadable one after the other."""


class Unreadable(Exception):
    """A sample that cannot be decoded."""


class ShardReader:
    """A source of samples in indexed shards.

    Args:
        indices: The shards.
        shape: Shape of one example.
        num_classes: Number of classes; 0 to read no labels.
        preparation: How pictures become pixels; may be None where the examples are arrays.
        image: Extension of the member that is the example; "auto" is the first one in a shard that can be decoded.
        label: Extension of the label: "cls", "txt", or "json:<key>".
        keep: Which samples, counted over all shards, belong to the split; None for all.
        max_corrupt: Share of the samples that may be unreadable.

    Attributes:
        skipped: What the last `read` replaced, a line each.
        corrupt: All unreadable samples met so far.

    Raises:
        DataError: If a sample has no example or no label.
    """

    def __init__(
        self,
        indices: Sequence[ShardIndex],
        *,
        shape: Sequence[int],
        num_classes: int,
        preparation: Preparation | None,
        image: str = "auto",
        label: str = "cls",
        keep: np.ndarray | None = None,
        max_corrupt: float = 0.01,
    ) -> None:
        self.indices, self.shape, self.num_classes = list(indices), tuple(shape), num_classes
        self.preparation, self.max_corrupt = preparation, max_corrupt
        kind, _, key = label.partition(":")
        self._key = key or None if kind == "json" else None
        if kind not in ("cls", "txt", "json") or (kind == "json") != bool(key):
            raise DataError(f"label={label!r}: labels are read from cls, txt or json:<key>")
        tables = [_examples(index, image) for index in indices]
        self._array = bool(tables) and tables[0].array
        if any(table.array != self._array for table in tables):
            raise DataError(
                "some shards hold pictures and some arrays (.npy): say which by image=<extension>"
            )
        if not self._array and preparation is None:
            raise DataError(f"{indices[0].path} holds pictures, which cannot have the shape {self.shape}")
        self._shard = np.concatenate([np.full(len(t.sample), k, np.int32) for k, t in enumerate(tables)])
        self._sample = np.concatenate([t.sample for t in tables])
        self._offset = np.concatenate([t.offset for t in tables])
        self._size = np.concatenate([t.size for t in tables])
        self._label: np.ndarray | None = None
        self._label_at: tuple[np.ndarray, np.ndarray] | None = None
        if num_classes and kind == "cls":
            self._label = np.concatenate(
                [index.label[t.sample] for index, t in zip(indices, tables, strict=True)]
            )
        elif num_classes:
            places = [_members(index, {kind}, t.sample) for index, t in zip(indices, tables, strict=True)]
            self._label_at = (np.concatenate([p[0] for p in places]), np.concatenate([p[1] for p in places]))
        if keep is not None:
            self._keep(keep)
        self._refuse_unlabelled(kind)
        self.skipped: list[str] = []
        self.corrupt: dict[str, None] = {}
        self._files = Handles([index.path for index in indices])

    def _keep(self, keep: np.ndarray) -> None:
        self._shard, self._sample = self._shard[keep], self._sample[keep]
        self._offset, self._size = self._offset[keep], self._size[keep]
        if self._label is not None:
            self._label = self._label[keep]
        if self._label_at is not None:
            self._label_at = (self._label_at[0][keep], self._label_at[1][keep])

    def _refuse_unlabelled(self, kind: str) -> None:
        """Samples without any label are no accident."""
        values = self._label if self._label is not None else self._label_at[1] if self._label_at else None
        bad = np.flatnonzero(values == ABSENT) if values is not None else np.empty(0, int)
        if len(bad):
            raise DataError(
                f"{self.name_of(int(bad[0]))} has no .{kind}, but num_classes={self.num_classes} ({len(bad)} such)"
            )

    def __len__(self) -> int:
        return len(self._offset)

    def name_of(self, k: int) -> str:
        """Return "<shard>: <sample>" for messages."""
        index = self.indices[int(self._shard[k])]
        return f"{index.path.name}: {printable(index.names[int(self._sample[k])])}"

    # ---- reading -----------------------------------------------------------------------------------------------------

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """See `Source`; what cannot be decoded is replaced and told in `skipped`.

        Raises:
            DataError: If a shard cannot be read, or too many samples cannot.
        """
        self.skipped = []
        places = [int(k) for k in indices]
        self._announce(places)
        found = [self._replaced(k) for k in places]
        if self.skipped:
            self.note(self.skipped)
        pixels = (
            np.stack([example for example, _ in found]) if found else np.empty((0, *self.shape), np.uint8)
        )
        x0 = torch.from_numpy(pixels) if self._array or not found else channels_first(pixels)
        return x0, torch.tensor([label for _, label in found]) if self.num_classes else None

    def note(self, lines: Iterable[str]) -> None:
        """Remember unreadable samples, also those that other processes met.

        Raises:
            DataError: If they are more than `max_corrupt` of all.
        """
        self.corrupt.update(dict.fromkeys(lines))
        if len(self.corrupt) > self.max_corrupt * len(self):
            raise DataError(
                f"{len(self.corrupt)} of {len(self):,} samples cannot be read, more than max_corrupt="
                f"{self.max_corrupt:g} allows: {next(iter(self.corrupt))}"
            )

    def _announce(self, places: Sequence[int]) -> None:
        """Let the system fetch the whole batch at once, where it is not in memory yet."""
        advise = getattr(os, "posix_fadvise", None)
        if advise is not None:
            for k in places:
                fd = self._files[int(self._shard[k])]
                advise(fd, int(self._offset[k]), int(self._size[k]), os.POSIX_FADV_WILLNEED)

    def _replaced(self, k: int) -> tuple[np.ndarray, int]:
        for step in range(min(len(self), IN_A_ROW)):
            try:
                return self._example((k + step) % len(self))
            except Unreadable as error:
                self.skipped.append(str(error))
        raise DataError(f"{len(self.skipped)} samples in a row cannot be read, from {self.skipped[0]} on")

    def _example(self, k: int) -> tuple[np.ndarray, int]:
        """Return pixels as decoded and the label."""
        try:
            label = self._label_of(k)
            content = self._bytes(k, int(self._offset[k]), int(self._size[k]))
            if self._array:
                return decode_array(content, self.shape), label
            assert self.preparation is not None
            return decode_picture(content, self.preparation), label
        except DataError:
            raise
        except UNDECODABLE as error:
            raise Unreadable(f"{self.name_of(k)}: {reason(error)}") from error

    def _label_of(self, k: int) -> int:
        if not self.num_classes:
            return 0
        if self._label is not None:
            label = int(self._label[k])
        else:
            assert self._label_at is not None
            at, size = self._label_at
            label = decode_label(self._bytes(k, int(at[k]), int(size[k])), self._key)
        if not 0 <= label < self.num_classes:
            raise ValueError(f"its label is none of 0 to {self.num_classes - 1}")
        return label

    def _bytes(self, k: int, offset: int, size: int) -> bytes:
        shard = int(self._shard[k])
        try:
            content = os.pread(self._files[shard], size, offset)
        except OSError as error:
            raise DataError(f"shard {self._files.paths[shard]} cannot be read: {reason(error)}") from error
        if len(content) != size:
            raise DataError(f"shard {self._files.paths[shard]} was cut short while it was in use")
        return content


class _Table:
    """Where the examples of a shard lie: sample numbers, offsets, sizes; and whether they are arrays."""

    def __init__(self, sample: np.ndarray, offset: np.ndarray, size: np.ndarray, array: bool) -> None:
        self.sample, self.offset, self.size, self.array = sample, offset, size, array


def _members(index: ShardIndex, extensions: set[str], samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return offset and size of the member with one of the extensions of each sample; `ABSENT` where there is none."""
    wanted = [k for k, name in enumerate(index.extensions) if name in extensions]
    offset, size = np.full((2, len(index)), ABSENT, dtype=np.int64)
    # backwards, so that the first of several stays
    chosen = np.flatnonzero(np.isin(index.extension, wanted))[::-1]
    offset[index.sample[chosen]], size[index.sample[chosen]] = index.offset[chosen], index.size[chosen]
    return offset[samples], size[samples]


def _examples(index: ShardIndex, image: str) -> _Table:
    """Choose the member of each sample that is the example; samples without one are none."""
    by_kind: dict[str, set[str]] = {"picture": set(), "array": set()}
    for name in index.extensions:
        kind = kind_of(name)
        # by itself only what is plainly the picture is taken, not a mask beside it (seg.png)
        if kind is not None and (name == image or (image == "auto" and "." not in name)):
            by_kind[kind].add(name)
    kind = "picture" if by_kind["picture"] else "array"
    offset, size = _members(index, by_kind[kind], np.arange(len(index)))
    sample = np.flatnonzero(offset != ABSENT)
    if not len(sample):
        wanted = "a picture or an array (png, jpg, webp, npy)" if image == "auto" else f"a .{image}"
        raise DataError(f"shard {index.path} holds no sample with {wanted}")
    return _Table(sample.astype(np.int32), offset[sample], size[sample], kind == "array")


def open_shards(
    root: Path,
    split: str,
    *,
    shape: Sequence[int],
    num_classes: int,
    preparation: Preparation | None,
    train: str | None = None,
    test: str | None = None,
    image: str = "auto",
    label: str = "cls",
    max_corrupt: float = 0.01,
    cache: Path | None = None,
) -> ShardReader:
    """Index the shards of a folder, where that was not done before, and return a split of them as a source.

    Without shards for testing every tenth sample is.

    Args:
        root: The folder.
        split: "train", "test", or "all": the training shards without anything held back.
        shape: See `ShardReader`.
        num_classes: See `ShardReader`.
        preparation: See `ShardReader`.
        train: Brace pattern of the training shards, relative to `root`; None to look for them.
        test: The same for testing.
        image: See `ShardReader`.
        label: See `ShardReader`.
        max_corrupt: See `ShardReader`.
        cache: See `open_index`.

    Raises:
        DataError: If a shard is missing or damaged; names it.
    """
    tests = shard_paths(root, "test", test)
    paths = tests if split == "test" and tests else shard_paths(root, "train", train)
    check_sizes(root)
    # a shard may be empty where all of its samples were unreadable
    indices = [index for index in _open_all(paths, cache) if len(index)]
    if not indices:
        raise DataError(f"shard {paths[0]} and its like hold no samples")
    options = {"shape": shape, "num_classes": num_classes, "preparation": preparation, "image": image}
    if not tests and split != "all":
        n = sum(len(_examples(index, image).sample) for index in indices)
        keep = np.flatnonzero((np.arange(n) % 10 == 9) == (split == "test"))
        if not len(keep):
            raise DataError(f"{root} holds {n} samples: too few for a {split} split")
        options["keep"] = keep
    return ShardReader(indices, label=label, max_corrupt=max_corrupt, **options)  # type: ignore[arg-type]


def _open_all(paths: Sequence[Path], cache: Path | None) -> list[ShardIndex]:
    """Open the indices one after the other, with progress if many have to be made."""
    from diffusion_lab.data.progress import progress

    with progress("indexing", len(paths), unit="shards") as done:
        indices = []
        for path in paths:
            indices.append(open_index(path, cache))
            done(len(indices))
    return indices
