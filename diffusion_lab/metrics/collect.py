r"""What one pass over a set of images keeps: bounded summaries, from which every number is computed afterwards.

    uint8 images --extractor--> outputs --collectors--> `Collected` --measures--> numbers

An extractor runs once over a set, whatever is measured. What a measure needs of a set it says as a *specification*,
a frozen dataclass with a method `start`; equal specifications share one *collector*:

    Moments(output)      n, mean and centred second moment in float64     Fréchet distances
    Bank(output, most)   the outputs themselves of at most so many        neighbours and kernels
                         images, spread evenly over the set

No collector grows with n. All of them add up: blocks of one set are merged, and several processes sum what they have;
an image is known by its index i in 0..n-1, so that who saw it does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_lab.images import QUANTISATION, spread
from diffusion_lab.metrics.features import FEATURES, FeatureExtractor, extract
from diffusion_lab.metrics.stats import GaussianStats, Reduce

UNQUANTISED = "none (floats)"

Piece = tuple[Tensor, Tensor, Tensor | None]
"""Indices `(N,)` in the set, images `(N, C, H, W)` uint8 (or points), and labels `(N,)` or None."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What collectors see of a batch.

    Attributes:
        index: `(N,)` int64, the images' numbers in their set.
        outputs: Outputs of the extractor, `(N, d)` each, by name.
        labels: `(N,)` classes asked for, below 0 where none is; None for images without labels.
    """

    index: Tensor
    outputs: Mapping[str, Tensor]
    labels: Tensor | None


class Collector(Protocol):
    """A bounded summary of images seen so far."""

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        ...

    def merge(self, other: Any) -> None:
        """Add what another collector of the same specification has seen, of other images of the same set."""
        ...

    def all_reduce(self, reduce: Reduce) -> Any:
        """Return the summary of all processes together; this one is left as it is."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the summary as CPU tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the summary by that of `state_dict`."""
        ...


class Collect(Protocol):
    """What to keep of a set; hashable, its `repr` is its identity in files."""

    @property
    def wants(self) -> tuple[str, ...]:
        """The outputs of the extractor that it reads."""
        ...

    @property
    def asks(self) -> bool:
        """Whether it reads the labels too."""
        ...

    def start(self, n: int, dims: Mapping[str, int]) -> Collector:
        """Return an empty collector for a set of `n` images with outputs of these lengths."""
        ...


@dataclass(frozen=True)
class Moments:
    """Keep mean and covariance of an output.

    Attributes:
        output: Its name.
    """

    output: str = FEATURES

    asks = False

    @property
    def wants(self) -> tuple[str, ...]:
        """See `Collect`."""
        return (self.output,)

    def start(self, n: int, dims: Mapping[str, int]) -> MomentsCollector:
        """See `Collect`."""
        return MomentsCollector(self.output, GaussianStats(dim=dims[self.output]))


class MomentsCollector:
    """Collector of `Moments`.

    Attributes:
        stats: The moments.
    """

    def __init__(self, output: str, stats: GaussianStats) -> None:
        self.output, self.stats = output, stats

    def update(self, batch: Batch) -> None:
        """See `Collector`."""
        self.stats.update(batch.outputs[self.output])

    def merge(self, other: MomentsCollector) -> None:
        """See `Collector`."""
        self.stats.merge(other.stats)

    def all_reduce(self, reduce: Reduce) -> MomentsCollector:
        """See `Collector`."""
        return MomentsCollector(self.output, self.stats.all_reduce(reduce))

    def state_dict(self) -> dict[str, Tensor]:
        """See `Collector`."""
        return self.stats.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Collector`."""
        self.stats.load_state_dict(state)


@dataclass(frozen=True)
class Bank:
    """Keep an output of at most `most` images, spread evenly over the set, with the images' indices.

    Attributes:
        output: Its name.
        most: How many rows; the customary protocols compare 10,000.
    """

    output: str = FEATURES
    most: int = 10_000

    asks = False

    @property
    def wants(self) -> tuple[str, ...]:
        """See `Collect`."""
        return (self.output,)

    def start(self, n: int, dims: Mapping[str, int]) -> BankCollector:
        """See `Collect`."""
        return BankCollector(self.output, spread(n, self.most), dims[self.output])


class BankCollector:
    """Collector of `Bank`: row r belongs to image `index[r]`, and is there where `seen[r]`."""

    def __init__(self, output: str, index: Tensor, dim: int) -> None:
        self.output, self.index = output, index
        self.seen = torch.zeros(len(index), dtype=torch.bool)
        self.all = torch.zeros(len(index), dim)

    @property
    def rows(self) -> Tensor:
        """The outputs that were seen, `(m, d)` float32 on the CPU, in the order of their images."""
        return self.all if bool(self.seen.all()) else self.all[self.seen]

    def update(self, batch: Batch) -> None:
        """See `Collector`."""
        if not len(self.index):
            return
        index = batch.index.cpu()
        row = torch.searchsorted(self.index, index).clamp(max=len(self.index) - 1)
        kept = self.index[row] == index
        found = batch.outputs[self.output].detach()[kept.to(batch.outputs[self.output].device)]
        self.all[row[kept]] = found.to("cpu", torch.float32)
        self.seen[row[kept]] = True

    def merge(self, other: BankCollector) -> None:
        """See `Collector`."""
        self.all[other.seen] = other.all[other.seen]
        self.seen |= other.seen

    def all_reduce(self, reduce: Reduce) -> BankCollector:
        """See `Collector`. Every row was seen by one process at most; the others hold zeros."""
        together = BankCollector(self.output, self.index, self.all.shape[1])
        together.all = reduce(self.all.double()).float().cpu()
        together.seen = reduce(self.seen.double()).cpu() > 0
        return together

    def state_dict(self) -> dict[str, Tensor]:
        """See `Collector`."""
        return {"index": self.index.clone(), "seen": self.seen.clone(), "rows": self.all[self.seen]}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Collector`."""
        self.index, self.seen = state["index"], state["seen"].to(torch.bool)
        self.all = torch.zeros(len(self.index), state["rows"].shape[1])
        self.all[self.seen] = state["rows"]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A set of images, as an extractor saw it.

    Attributes:
        name: "samples", "test", "train", or what the set is.
        n: Number of images.
        sha256: Hash of the images; "" where it was not taken.
        shape: Shape of one image; () for statistics from elsewhere that do not say.
        features: Name of the extractor.
        features_sha256: Hash of its weights.
        resize: Its resize.
        quantisation: How floats became bytes.
        kept: The summaries by their specifications.
    """

    name: str
    n: int
    sha256: str = ""
    shape: tuple[int, ...]
    features: str
    features_sha256: str
    resize: str
    quantisation: str = QUANTISATION
    kept: Mapping[Collect, Any]

    def moments(self, output: str = FEATURES) -> GaussianStats:
        """Return mean and covariance of an output.

        Raises:
            KeyError: If they were not collected.
        """
        stats: GaussianStats = self.kept[Moments(output)].stats
        return stats

    def all_reduce(self, reduce: Reduce) -> Collected:
        """Return the set as all processes saw it together; each must call this.

        Args:
            reduce: Sums a float64 tensor over the processes.
        """
        kept = {what: collector.all_reduce(reduce) for what, collector in self.kept.items()}
        return Collected(**{**vars(self), "kept": kept})


@torch.no_grad()
def collect(
    pieces: Iterable[Piece],
    extractor: FeatureExtractor,
    wanted: Sequence[Collect],
    *,
    n: int,
    shape: Sequence[int],
    name: str = "samples",
    sha256: str = "",
    quantised: bool = True,
    device: torch.device | str = "cpu",
) -> Collected:
    """Run an extractor once over images, or over a process's share of them.

    Args:
        pieces: The images with their indices, in any order and portions.
        extractor: The features, on `device`.
        wanted: What to keep.
        n: Number of images of the whole set, of all processes.
        shape: Shape of one image.
        name: What the set is called.
        sha256: Hash of its images, if known.
        quantised: Whether the images are bytes; points are not.
        device: Where the extractor is.

    Returns:
        What was kept.

    Raises:
        ValueError: If an image has another shape, or features are not finite.
        TypeError: If bytes are mixed with floats.
    """
    wanted = list(dict.fromkeys(wanted))
    outputs = tuple(dict.fromkeys(output for what in wanted for output in what.wants))
    kept = {what: what.start(n, lengths(extractor, outputs, shape, quantised, device)) for what in wanted}
    for index, images, labels in pieces:
        if tuple(images.shape[1:]) != tuple(shape):
            raise ValueError(f"{name}: images {tuple(images.shape[1:])} among images {tuple(shape)}")
        if quantised != (images.dtype == torch.uint8):
            raise TypeError(
                f"{name}: {images.dtype} where {'bytes' if quantised else 'floats'} were announced"
            )
        if len(images):
            found = extract(extractor, images.to(device), outputs)
            batch = Batch(index=index, outputs=found, labels=labels)
            for collector in kept.values():
                collector.update(batch)
    return Collected(
        name=name,
        n=n,
        sha256=sha256,
        shape=tuple(shape),
        features=extractor.name,
        features_sha256=extractor.sha256,
        resize=extractor.resize,
        quantisation=QUANTISATION if quantised else UNQUANTISED,
        kept=kept,
    )


def lengths(
    extractor: FeatureExtractor,
    outputs: Sequence[str],
    shape: Sequence[int],
    quantised: bool,
    device: torch.device | str,
) -> dict[str, int]:
    """Return the length of each output, asked of one blank image: a process may see none at all."""
    blank = torch.zeros(1, *shape, dtype=torch.uint8 if quantised else torch.float32, device=device)
    return {name: found.shape[1] for name, found in extract(extractor, blank, outputs).items()}


def pieces_of(images: Tensor, labels: Tensor | None, batch_size: int) -> Iterable[Piece]:
    """Yield images `(N, ...)` that are in memory in batches, with their indices.

    Raises:
        ValueError: If images and labels differ in number.
    """
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(images)} images have {len(labels)} labels")
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        yield (
            torch.arange(start, start + len(part)),
            part,
            None if labels is None else labels[start : start + batch_size],
        )
