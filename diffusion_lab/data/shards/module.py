"""Your own shards as a data set: WebDataset tar files on this machine, read by index.

Everything that holds for data in memory holds for them: global shuffle, exact resume in the middle of an epoch, any
number of processes and workers. How is in `reader.py`; which files are taken is in `paths.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusion_lab.data.base import DataModule
from diffusion_lab.data.loader import Source
from diffusion_lab.data.pictures import Preparation, Resize
from diffusion_lab.data.shards.manifest import read_classes, read_manifest
from diffusion_lab.data.shards.paths import local_only
from diffusion_lab.data.shards.reader import open_shards


class Shards(DataModule):
    """Samples in tar files below a folder.

    Args:
        root: The folder.
        train: Brace pattern of the training shards, relative to `root`; None for train-*.tar, or every *.tar.
        test: The same for testing; None for test-*.tar or val-*.tar, or every tenth sample where there are none.
        shape: Shape of one example; `(1 or 3, size, size)` for pictures.
        num_classes: Number of classes; 0 to read no labels.
        image: Extension of the member that is the example (png, jpg, webp, npy); "auto" finds it.
        label: Extension of the label: "cls", "txt" or "json:<key>".
        box: (left, top, right, bottom) cut out of each picture first; None for all of it.
        resize: "adm", "bilinear", "bicubic" or "lanczos".
        max_corrupt: Share of the samples that may be unreadable.
        index_cache: Folder for indices where `root` cannot be written; None for the user's cache.
        batch_size: See `DataModule`.
        seed: See `DataModule`.
        num_workers: See `DataModule`.
        flip: See `DataModule`.

    Raises:
        DataError: If `root` is a URL or a command.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        root: str,
        train: str | None = None,
        test: str | None = None,
        shape: Sequence[int],
        num_classes: int,
        image: str = "auto",
        label: str = "cls",
        box: Sequence[int] | None = None,
        resize: Resize = "adm",
        max_corrupt: float = 0.01,
        index_cache: str | None = None,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers, flip=flip)
        if not 0.0 <= max_corrupt <= 1.0:
            raise ValueError(f"max_corrupt is a share, 0 to 1, got {max_corrupt}")
        local_only(root)
        self.root, self.train, self.test = Path(root), train, test
        self.shape, self.num_classes = tuple(shape), num_classes
        self.image, self.label = image, label
        self.max_corrupt, self.index_cache = max_corrupt, None if index_cache is None else Path(index_cache)
        square = len(self.shape) == 3 and self.shape[0] in (1, 3) and self.shape[1] == self.shape[2]
        self.preparation = (
            Preparation(size=self.shape[1], channels=self.shape[0], box=box, resize=resize)
            if square
            else None
        )

    @property
    def name(self) -> str:  # type: ignore[override]
        """What the manifest calls the data, else the folder's name."""
        told = (read_manifest(self.root) or {}).get("name") if self.root.is_dir() else None
        return str(told or self.root.name or "shards")

    @property
    def class_names(self) -> Sequence[str]:
        """What the manifest calls the classes, else their numbers."""
        names = read_classes(self.root) if self.root.is_dir() else None
        return names if names is not None and len(names) == self.num_classes else super().class_names

    def source(self, split: str) -> Source:
        """See `DataModule.source`."""
        return open_shards(
            self.root,
            split,
            shape=self.shape,
            num_classes=self.num_classes,
            preparation=self.preparation,
            train=self.train,
            test=self.test,
            image=self.image,
            label=self.label,
            max_corrupt=self.max_corrupt,
            cache=self.index_cache,
        )
