r"""How good is a set of images? One pass over their features, and a record for every number.

    samples, reference, real, train --collect--> `Collected` --measures--> readings --protocol--> records

Both values of a pair, of samples and of real images, are measured against the same reference at the same n, because
most numbers depend on n: the printed pair is comparable, and the second is the floor (or the ceiling).

`judge` is for sets that were collected already, in blocks or by several processes; `evaluate_images` does all of it for
tensors in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_lab.images import QUANTISATION
from diffusion_lab.metrics.collect import UNQUANTISED, Collected, spread
from diffusion_lab.metrics.features import FeatureExtractor
from diffusion_lab.metrics.measures.accuracy import Accuracy
from diffusion_lab.metrics.measures.base import (
    HELD_OUT,
    REAL,
    REFERENCE,
    SAMPLES,
    TRAIN,
    Measure,
    Reading,
    Sets,
    applicable,
    wanted_of,
)
from diffusion_lab.metrics.measures.frechet import Frechet
from diffusion_lab.metrics.protocol import Protocol, Record, Source, standard_protocol
from diffusion_lab.metrics.reference import collect_kept

USUAL: tuple[Measure, ...] = (Frechet(), Accuracy())
"""What is measured where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Real:
    """Real images that samples are compared with, in memory.

    Attributes:
        images: `(N, C, H, W)` uint8, or points.
        labels: `(N,)` classes, or None.
        name: "test", "train", or what the set is called.
    """

    images: Tensor
    labels: Tensor | None = None
    name: str


def judge(
    sets: Sets,
    *,
    measures: Sequence[Measure] = USUAL,
    protocol: Protocol | None = None,
    source: Source | None = None,
    on_hindrance: Callable[[str, str], None] | None = None,
) -> list[Record]:
    """Measure samples that were collected, with all that the measures need.

    Args:
        sets: The samples, the reference and what else there is, see `measures/base.py`.
        measures: What to measure.
        protocol: Conditions to fulfil; None takes `standard_protocol`, with n the number of real images.
        source: Where the samples came from.
        on_hindrance: Called with name and reason of a measure that cannot be taken; None raises.

    Returns:
        A record for every reading, in the order of the measures.

    Raises:
        ValueError: If the sets differ in shape or were seen through different extractors, or there are fewer than two
            images.
    """
    samples, reference = sets[SAMPLES], sets[REFERENCE]
    for other in sets.values():
        check_same(other, samples)
    if samples.n < 2:
        raise ValueError(f"a distance needs at least two images, there are {samples.n}")
    if protocol is None:
        protocol = standard_protocol(
            features=samples.features,
            features_sha256=samples.features_sha256,
            resize=samples.resize,
            quantisation=samples.quantisation,
            train_n=sets[REAL].n if REAL in sets else None,
        )
    records = []
    readings: list[Reading] = []
    for measure in measures:
        try:
            readings += measure(sets)
        except ValueError as error:
            # a set that is too small for one measure is no reason to lose the others
            if on_hindrance is None or len(measures) == 1:
                raise
            on_hindrance(measure.name, str(error))
    for reading in readings:
        compared = sets[reading.against] if reading.against else reference
        records.append(
            Record(
                metric=reading.quantity.name,
                short=reading.quantity.short,
                published=reading.quantity.published,
                better=reading.quantity.better,
                percent=reading.quantity.percent,
                value=reading.value,
                spread=reading.spread,
                real=reading.real,
                real_n=reading.real_n,
                protocol=protocol,
                features=samples.features,
                features_sha256=samples.features_sha256,
                resize=samples.resize,
                quantisation=samples.quantisation,
                n=reading.n,
                reference=compared.name,
                reference_sha256=compared.sha256,
                reference_n=compared.n,
                own_reference=bool(reading.against),
                of_n=0 if reading.n == samples.n else samples.n,
                source=source if source is not None else Source(),
            )
        )
    return records


def check_same(other: Collected, samples: Collected) -> None:
    """Raise ValueError unless two sets were seen alike."""
    if (other.features, other.features_sha256) != (samples.features, samples.features_sha256):
        raise ValueError(
            f"statistics of {other.name} were made with {other.features} {other.features_sha256[:8]}, "
            f"not with {samples.features} {samples.features_sha256[:8]}"
        )
    if other.shape and samples.shape and other.shape != samples.shape:
        raise ValueError(
            f"{samples.name} has images {samples.shape}, which cannot be compared with {other.shape} of {other.name}"
        )


def evaluate_images(
    images: Tensor,
    labels: Tensor | None,
    reference: Real,
    extractor: FeatureExtractor,
    protocol: Protocol | None = None,
    *,
    measures: Sequence[Measure] = USUAL,
    train: Real | None = None,
    stand_in: Real | None = None,
    source: Source | None = None,
    cache: Path | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    on_hindrance: Callable[[str, str], None] | None = None,
) -> list[Record]:
    """Judge images that are all in memory.

    Args:
        images: `(N, C, H, W)` uint8.
        labels: `(N,)` classes asked for, or None; below 0 where none was.
        reference: Real images to compare with.
        extractor: The features; moved to `device`.
        protocol: Conditions to fulfil; None takes the standard one, with n the size of the train split.
        measures: What to measure.
        train: All images the model was trained on.
        stand_in: Real images that stand in for samples, as many of them as there are, spread evenly; None takes them
            from `train`, unless that is the reference.
        source: Where the images came from.
        cache: Folder for the summaries of real images.
        batch_size: Images in one pass.
        device: Where to compute.
        on_hindrance: Called with name and reason of a measure that does not apply; such a measure is left out.

    Returns:
        A record for every reading.

    Raises:
        ValueError: As `judge`, or if images and labels differ in number.
    """
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(images)} images have {len(labels)} labels")
    if isinstance(extractor, nn.Module):
        extractor.to(device)
    labels = labels if labels is not None and bool((labels >= 0).any()) else None
    if stand_in is None and train is not None and train.name != reference.name:
        stand_in = train
    there: dict[str, Real] = {SAMPLES: Real(images=images, labels=labels, name=SAMPLES), REFERENCE: reference}
    if stand_in is not None:
        rows = spread(len(stand_in.images), len(images))
        of_rows = None if stand_in.labels is None else stand_in.labels[rows]
        there[REAL] = Real(images=stand_in.images[rows], labels=of_rows, name=REAL)
    if train is not None:
        there[TRAIN] = train
        if reference.name != train.name:
            there[HELD_OUT] = reference
    if protocol is None and stand_in is not None:
        protocol = standard_protocol(
            features=extractor.name,
            features_sha256=extractor.sha256,
            resize=extractor.resize,
            quantisation=QUANTISATION if images.dtype == torch.uint8 else UNQUANTISED,
            train_n=len(stand_in.images),
        )
    measures = applicable(measures, extractor, there, labelled=labels is not None, on_hindrance=on_hindrance)
    sets = {
        part: collect_kept(
            one.images,
            extractor,
            wanted,
            name=one.name,
            labels=one.labels,
            folder=None if part == SAMPLES else cache,
            batch_size=batch_size,
            device=device,
        )
        for part, one in there.items()
        if (wanted := wanted_of(measures, part)) or part in (SAMPLES, REFERENCE)
    }
    return judge(sets, measures=measures, protocol=protocol, source=source, on_hindrance=on_hindrance)
