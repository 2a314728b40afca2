"""Shards that are elsewhere: webdataset's own pipeline, read from the front, over HTTP or out of a command.

    URLs --drawn with replacement--> tar streams --> samples --shuffle buffer--> our decoders --> batches

Every worker of every process draws its own endless sequence of shards, so no process waits for another, however many
there are. What that costs: a sample may come twice before another comes once; how many workers there are changes the
order; and a run that is taken up again does not see what it would have seen. Where the shards fit on a disk,
`dataset=shards` has none of these faults.

webdataset would unpickle members and start commands that a URL names. Its decoder is never called (`decode.py` is), and
`pipe:` is refused unless the user's config allows it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from diffusion_lab.data.errors import DataError
from diffusion_lab.data.loader import Batch, InMemory
from diffusion_lab.data.pictures import Preparation, reason
from diffusion_lab.data.shards.decode import UNDECODABLE, decode_array, decode_label, decode_picture, kind_of
from diffusion_lab.data.shards.index import printable
from diffusion_lab.data.shards.paths import scheme
from diffusion_lab.rng import derive_seed

REMOTE = ("http", "https", "gs", "hf", "ais", "sftp", "ftps", "scp", "htgs")
FEW = 10
"""Faults that are always forgiven, whatever share of the samples they are."""


def check_urls(urls: Sequence[str], allow_pipe: bool) -> None:
    """Refuse what must not or cannot be opened, before anything is.

    Raises:
        DataError: If a URL is a command and commands are not allowed, is of an unknown kind, or names a missing file.
    """
    for url in urls:
        kind = scheme(url)
        if kind == "pipe":
            if os.environ.get("WDS_SECURE", "0") != "0":
                raise DataError(f"{url!r} starts a command, which WDS_SECURE forbids")
            if not allow_pipe:
                raise DataError(f"{url!r} starts a command: if you mean that, set dataset.allow_pipe=true")
        elif kind == "" and (url == "-" or not os.path.isfile(url)):
            raise DataError(f"shard {url} is missing")
        elif kind not in ("", *REMOTE):
            raise DataError(
                f"{url!r}: there is no way to read {kind}: (there are {', '.join(REMOTE)} and pipe)"
            )


class Faults:
    """Counts what could not be read, and decides when it is too much.

    Args:
        limit: Share of the samples.
        in_a_row: Faults without a sample between them.
    """

    def __init__(self, limit: float, in_a_row: int) -> None:
        self.limit, self.in_a_row = limit, in_a_row
        self.samples = self.total = self._row = 0
        self.fresh: list[str] = []

    def sample(self) -> None:
        """Count a good sample."""
        self.samples, self._row = self.samples + 1, 0

    def add(self, line: str) -> None:
        """Count a fault.

        Raises:
            DataError: If they are too many.
        """
        self.total, self._row = self.total + 1, self._row + 1
        self.fresh.append(line)
        if self._row >= self.in_a_row or (not self.samples and self.total > FEW):
            raise DataError(f"the stream gives no samples: {line}")
        if self.total > FEW and self.total > self.limit * (self.samples + self.total):
            raise DataError(
                f"{self.total} of {self.samples + self.total:,} samples of the stream cannot be read, more than "
                f"max_corrupt={self.limit:g} allows: {line}"
            )

    def __call__(self, error: Exception) -> bool:
        """Be webdataset's handler: forgive and go on."""
        if isinstance(error, DataError):
            raise error
        # webdataset appends what it was reading to the arguments
        words = [word for word in error.args if isinstance(word, str)]
        self.add(f"{words[-1]}: {reason(ValueError(words[0]))}" if len(words) > 1 else reason(error))
        return True

    def take(self) -> list[str]:
        """Return the faults since the last time."""
        fresh, self.fresh = self.fresh, []
        return fresh


class Decoder:
    """Makes an example of a sample's bytes.

    Args:
        shape: Shape of one example.
        num_classes: Number of classes; 0 for no labels.
        preparation: How pictures become pixels.
        image: Extension of the example, or "auto".
        label: Extension of the label: "cls", "txt" or "json:<key>".
    """

    def __init__(
        self,
        *,
        shape: Sequence[int],
        num_classes: int,
        preparation: Preparation | None,
        image: str,
        label: str,
    ) -> None:
        self.shape, self.num_classes, self.preparation, self.image = (
            tuple(shape),
            num_classes,
            preparation,
            image,
        )
        self.label, _, key = label.partition(":")
        self.key = key or None

    def __call__(self, sample: Mapping[str, Any]) -> tuple[np.ndarray, int]:
        """Return the example, `shape`, uint8 or float32, and its label (0 where there are none).

        Raises:
            ValueError, OSError, ...: One of `UNDECODABLE`.
        """
        names = [
            n for n in sample if kind_of(n) and (n == self.image or (self.image == "auto" and "." not in n))
        ]
        if not names:
            raise ValueError("it has no picture and no array")
        label = 0
        if self.num_classes:
            if self.label not in sample:
                raise ValueError(f"it has no .{self.label}")
            label = decode_label(sample[self.label], self.key)
            if not 0 <= label < self.num_classes:
                raise ValueError(f"its label is none of 0 to {self.num_classes - 1}")
        content = sample[names[0]]
        if kind_of(names[0]) == "array":
            return decode_array(content, self.shape), label
        if self.preparation is None:
            raise DataError(f"the stream holds pictures, which cannot have the shape {self.shape}")
        pixels = decode_picture(content, self.preparation)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), label


class Stream(IterableDataset[Batch]):
    """Endless batches of one process, or of one of its workers.

    Args:
        urls: Shards.
        decoder: See `Decoder`.
        rows: Examples of a batch.
        seed: What the draws depend on, besides the worker.
        shuffle: Samples held back to be given out in another order.
        flip: Random left-right mirroring.
        max_corrupt: Share of the samples that may be unreadable.
        allow_pipe: Whether URLs may be commands.
    """

    def __init__(
        self,
        urls: Sequence[str],
        decoder: Decoder,
        *,
        rows: int,
        seed: int,
        shuffle: int,
        flip: bool,
        max_corrupt: float,
        allow_pipe: bool,
    ) -> None:
        self.urls, self.decoder, self.rows, self.seed = list(urls), decoder, rows, seed
        self.shuffle, self.flip, self.max_corrupt, self.allow_pipe = shuffle, flip, max_corrupt, allow_pipe

    def __iter__(self) -> Iterator[Batch]:
        from webdataset import DataPipeline, ResampledShards
        from webdataset import shuffle as shuffled

        info = get_worker_info()
        seed = derive_seed("stream", self.seed, 0 if info is None else info.id)
        faults = Faults(self.max_corrupt, in_a_row=2 * len(self.urls) + FEW)
        draw = ResampledShards(self.urls, deterministic=True, worker_seed=lambda: seed)
        stages = [draw, *_read(faults, self.allow_pipe)]
        if self.shuffle > 1:
            stages.append(shuffled(self.shuffle, initial=min(self.shuffle, 100), rng=random.Random(seed)))
        coins = np.random.default_rng(seed)
        examples: list[tuple[np.ndarray, int]] = []
        for example in _decoded(DataPipeline(*stages), self.decoder, faults):
            examples.append(example)
            if len(examples) == self.rows:
                batch = collate(examples, self.decoder.num_classes > 0)
                if self.flip:
                    mirrored = torch.from_numpy(coins.integers(0, 2, self.rows).astype(bool))
                    x0 = batch["x0"]
                    batch["x0"] = torch.where(mirrored.view(-1, *[1] * (x0.ndim - 1)), x0.flip(-1), x0)
                lines = faults.take()
                yield {**batch, "skipped": lines} if lines else batch
                examples = []


def _read(faults: Faults, allow_pipe: bool) -> list[Any]:
    """The stages of webdataset from URLs to samples of bytes."""
    from webdataset import utils
    from webdataset.cache import StreamingOpen
    from webdataset.filters import pipelinefilter
    from webdataset.tariterators import group_by_keys, tar_file_expander

    utils.enforce_security = not allow_pipe  # what WDS_SECURE=1 sets at its import
    expander, grouper = pipelinefilter(tar_file_expander), pipelinefilter(group_by_keys)
    return [StreamingOpen(handler=faults), expander(handler=faults), grouper(handler=faults)]


def _decoded(samples: Any, decoder: Decoder, faults: Faults) -> Iterator[tuple[np.ndarray, int]]:
    for sample in samples:
        try:
            example = decoder(sample)
        except DataError:
            raise
        except UNDECODABLE as error:
            where = os.path.basename(str(sample.get("__url__", "")))
            faults.add(f"{where}: {printable(str(sample.get('__key__')))}: {reason(error)}")
            continue
        faults.sample()
        yield example


def collate(examples: Sequence[tuple[np.ndarray, int]], labelled: bool) -> Batch:
    """Return examples and labels as a batch."""
    x0 = torch.from_numpy(np.stack([array for array, _ in examples]))
    return {"x0": x0, "label": torch.tensor([k for _, k in examples])} if labelled else {"x0": x0}


def read_through(urls: Sequence[str], decoder: Decoder, max_corrupt: float, allow_pipe: bool) -> InMemory:
    """Read shards once, from first to last, into memory.

    Raises:
        DataError: If they hold no samples, or too much cannot be read.
    """
    from webdataset import DataPipeline, SimpleShardList

    faults = Faults(max_corrupt, in_a_row=FEW + len(urls))
    pipeline = DataPipeline(SimpleShardList(list(urls)), *_read(faults, allow_pipe))
    examples = list(_decoded(pipeline, decoder, faults))
    if not examples:
        raise DataError(f"the shards {urls[0]} ... hold no samples")
    batch = collate(examples, decoder.num_classes > 0)
    return InMemory(batch["x0"], batch.get("label"))
