r"""What samples are measured with, and the measuring: features, measures, real images, protocol.

    Samples (judged)  +  Yardstick (extractor, measures, reference, stand-ins, train split, protocol)  ->  records

The reference is the test split of the run's data set, the train split (as for the customary FID), another set of
images, or a file of statistics. Real images stand in for samples to give the floor: those of the split that is not the
reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffusion_lab.app.build import are_pixels, data_module, instantiate
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.scoring.measuring import Eye, Place, look
from diffusion_lab.data.image_sets import ImageSet, said, some
from diffusion_lab.data.stored_images import split_of
from diffusion_lab.images import QUANTISATION
from diffusion_lab.metrics.collect import UNQUANTISED, Collected, spread
from diffusion_lab.metrics.features import FeatureExtractor, offered
from diffusion_lab.metrics.inception import NAME as INCEPTION
from diffusion_lab.metrics.measures.base import HELD_OUT, REAL, REFERENCE, SAMPLES, TRAIN, Measure, applicable
from diffusion_lab.metrics.protocol import Protocol, Record, Source, standard_protocol
from diffusion_lab.metrics.quality import USUAL, judge
from diffusion_lab.metrics.statistics_file import holds_images, holds_statistics, read_statistics

CACHE = "statistics"
SPLITS = ("test", "train")


@dataclass(frozen=True)
class Samples:
    """Samples that exist.

    Attributes:
        images: The images, or points.
        source: Where they come from.
        where: Their folder, or the file.
        place: Where other processes find them.
    """

    images: ImageSet
    source: Source
    where: Path
    place: Place = field(default_factory=Place)

    @property
    def labels(self) -> Tensor | None:
        """The classes asked for, `(N,)`; None where none was."""
        labels = self.images.labels
        return labels if labels is not None and bool((labels >= 0).any()) else None


@dataclass(frozen=True)
class Yardstick:
    """What samples are measured with.

    Attributes:
        eye: Extractor and measures.
        reference: What samples are compared with: real images, or their statistics.
        there: The real images that there are, by their part in the comparison, with where they are.
        beside: Some real images that lie beside statistics, for the measures that want images; None without.
        protocol: The conditions to fulfil; None for the standard one.
        run: The run whose data these are; None without one.
    """

    eye: Eye
    reference: ImageSet | Collected
    there: Mapping[str, tuple[ImageSet, Place]]
    beside: tuple[ImageSet, Place] | None
    protocol: Protocol | None
    run: Path | None

    @property
    def real(self) -> ImageSet | None:
        """Images of the train split, to be shown beside samples."""
        return self.there[TRAIN][0] if TRAIN in self.there else None

    def standard(self, n: int) -> Protocol:
        """Return the conditions to fulfil where none are named.

        Args:
            n: Number of samples.
        """
        extractor, quantised = self.eye.extractor, True
        if isinstance(self.reference, Collected):
            name, count = self.reference.name, self.reference.n or n
        else:
            name, count, quantised = self.reference.name, len(self.reference), self.reference.quantised
        train_n = len(self.there[TRAIN][0]) if TRAIN in self.there else count
        found = standard_protocol(
            features=extractor.name,
            features_sha256=extractor.sha256,
            resize=extractor.resize,
            quantisation=QUANTISATION if quantised else UNQUANTISED,
            train_n=train_n,
        )
        # without a data set there are no splits to insist on
        return found if self.run is not None else replace(found, reference=name)


def yardstick(
    trained: Mapping[str, Any] | None,
    metrics: Mapping[str, Any],
    device: str,
    *,
    run: Path | None = None,
    measured: Mapping[str, Any] | None = None,
    reference: str | None = None,
    protocol: Mapping[str, Any] | None = None,
    skip_corrupt: bool = False,
    on_skip: Callable[[str], None] | None = None,
) -> Yardstick:
    """Build the extractor, and open the real images.

    Args:
        trained: The run's config; None for two sets against each other.
        metrics: The config of the extractor.
        device: "cpu" or "cuda".
        run: The run's folder, for other processes.
        measured: The config of the measures; None for the usual ones.
        reference: "test", "train", or a path; None for what the protocol asks for.
        protocol: The config of the protocol; None for the standard one.
        skip_corrupt: Whether to leave out pictures of the reference that cannot be read.
        on_skip: Called with the line that names such a picture.

    Raises:
        UserError: If the run was trained on latents, or something does not fit.
    """
    if trained is not None and not are_pixels(trained):
        raise UserError(
            "samples of a run on latents are scored as images: decode them (python -m diffusion_lab.data.decode "
            "<samples>) and name a run on the images: evaluate.py run=<that run> samples=<samples>/decoded"
        )
    extractor: FeatureExtractor = instantiate(metrics, "metrics")
    if isinstance(extractor, nn.Module):
        extractor.to(device)
    asked: Protocol | None = None if protocol is None else instantiate(protocol, "protocol")
    measures: Sequence[Measure] = USUAL
    if measured is not None:
        measures = [one for one in instantiate(measured, "measures").values() if one is not None]
    eye = Eye(extractor=extractor, measures=measures, metrics=metrics, measured=measured or {}, device=device)
    there: dict[str, tuple[ImageSet, Place]] = {}
    if trained is not None:
        data, home = data_module(trained), "" if run is None else str(run)
        for split in SPLITS:
            there[split] = split_of(data, split), Place(run=home, split=split)
    if reference is None:
        reference = (
            asked.reference if asked is not None else "train" if extractor.name == INCEPTION else "test"
        )
    if reference in SPLITS:
        if trained is None:
            raise UserError("reference=<folder or file> is needed where no run= says which data are meant")
        compared: ImageSet | Collected = there[reference][0]
        place = there[reference][1]
    elif holds_statistics(Path(reference)):
        try:
            compared, place = read_statistics(Path(reference), extractor), Place()
        except ValueError as error:
            raise UserError(str(error)) from error
    else:
        # by its path: a folder called train is not the train split
        place = Place(path=str(Path(reference)), skip_corrupt=skip_corrupt, name=f"{Path(reference)}")
        compared = place.open(on_skip)
    beside = None
    if isinstance(compared, Collected) and holds_images(Path(reference)):
        beside = Place(path=str(Path(reference)), name=compared.name)
    parts: dict[str, tuple[ImageSet, Place]] = {}
    if not isinstance(compared, Collected):
        parts[REFERENCE] = compared, place
    if trained is not None:
        parts[REAL] = there["test" if reference == "train" else "train"]
        parts[TRAIN], parts[HELD_OUT] = there["train"], there["test"]
    return Yardstick(
        eye=eye,
        reference=compared,
        there=parts,
        beside=None if beside is None else (beside.open(), beside),
        protocol=asked,
        run=run,
    )


def score(
    samples: Samples,
    yard: Yardstick,
    *,
    devices: int = 1,
    on_hindrance: Callable[[str, str], None] | None = None,
) -> list[Record]:
    """Measure samples.

    Args:
        samples: The samples.
        yard: What they are measured with.
        devices: Processes that share the work.
        on_hindrance: Called with name and reason of a measure that does not apply.

    Returns:
        A record for every number, those of the Fréchet distance first where it is measured.

    Raises:
        UserError: If the samples do not fit the real images, or are too few.
    """
    images, eye = samples.images, yard.eye
    for other, _ in yard.there.values():
        check_shape(images, other)
    n = len(images)
    if n < 2:
        raise UserError(
            f"these samples cannot be scored: a distance needs at least two images, there are {n}"
        )
    sets: dict[str, Any] = {SAMPLES: (images, samples.place), **yard.there}
    if isinstance(yard.reference, Collected):
        sets[REFERENCE] = _with_images(yard, devices)
    if REAL in sets:
        other, place = sets[REAL]
        rows = spread(len(other), len(images))
        sets[REAL] = some(other, rows, REAL), replace(place, spread=len(images))
    measures = applicable(
        eye.measures, eye.extractor, sets, labelled=samples.labels is not None, on_hindrance=on_hindrance
    )
    if not measures:
        raise UserError("none of the measures applies to these samples and features")
    eye = replace(eye, measures=measures)
    cache = cache_folder()
    try:
        found = {
            part: one
            if isinstance(one, Collected)
            else look(one[0], one[1], part, eye, cache=cache, keep=part != SAMPLES, devices=devices)
            for part, one in sets.items()
            if part in (SAMPLES, REFERENCE) or _used(measures, part)
        }
        if images.quantisation:
            found[SAMPLES] = replace(found[SAMPLES], quantisation=images.quantisation)
        return judge(
            found,
            measures=measures,
            protocol=yard.protocol or yard.standard(len(images)),
            source=samples.source,
            on_hindrance=on_hindrance,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"these samples cannot be scored: {error}") from error


def check_shape(images: ImageSet, other: ImageSet) -> None:
    """Refuse samples of another shape than what they are compared with.

    Raises:
        UserError: If they differ.
    """
    if tuple(other.shape) != tuple(images.shape):
        raise UserError(
            f"these samples cannot be scored: they are {said(images.shape)}, {other.name} is {said(other.shape)}; "
            "nothing is resized here, for that changes every number"
        )


def _with_images(yard: Yardstick, devices: int) -> Collected:
    """Return the statistics of a reference, with what measures want of the images that lie beside them."""
    assert isinstance(yard.reference, Collected)
    if yard.beside is None:
        return yard.reference
    can = offered(yard.eye.extractor)
    lacking = [
        measure
        for measure in yard.eye.measures
        for what in measure.must.get(REFERENCE, ())
        if what not in yard.reference.kept and set(what.wants) <= set(can)
    ]
    if not lacking:
        return yard.reference
    eye = replace(yard.eye, measures=lacking)
    seen = look(*yard.beside, REFERENCE, eye, cache=cache_folder(), keep=True, devices=devices)
    return replace(yard.reference, shape=seen.shape, kept={**seen.kept, **yard.reference.kept})


def _used(measures: Sequence[Measure], part: str) -> bool:
    return any(part in needs for measure in measures for needs in (measure.must, measure.may))


def cache_folder() -> Path:
    """Where summaries of real images are kept; they are keyed by content, so any place will do."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "diffusion_lab" / CACHE
