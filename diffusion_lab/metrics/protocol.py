r"""A number and how it was made, inseparable.

Published Fréchet distances disagree because of the number of images, the feature weights, the resize, rounding, the
reference set, raw against averaged weights. So nothing here returns a bare float:

    Protocol    what must hold for a number to be quoted: features, resize, quantisation, reference, n, averaging
    Source      where the images came from: seeds, average, sampler, grid, guidance, evaluations of the network
    Record      a value, the same value for real images, what was in fact done, and the protocol it answers to

A record prints its deviations from the protocol. Its label is `FD@1437 (digits-cnn)`: distance, number of images,
features. Only the network that defines the FID, under a protocol fulfilled in every point, is labelled `FID`; the
same network with fewer images gives `FID@2000`, and weights that are not the published ones never give FID.

The distance is biased by n, so the real value beside it must be taken at the same n against the same reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from diffusion_lab.images import QUANTISATION
from diffusion_lab.metrics.inception import NAME as INCEPTION
from diffusion_lab.metrics.inception import SHA256_PREFIX, is_published

RAW = "raw"
UNKNOWN = "unknown"
ALL_LABELS = "all in turn"
LARGEST_N = 10_000
REFERENCES = ("train", "test")
"""Splits of a data set, which a protocol may name."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The conditions under which a value may be quoted.

    Args:
        name: Its name.
        features: Name of the feature extractor; "" takes any.
        features_sha256: Start of the hash of its weights; "" takes any.
        resize: How the extractor resizes images; "" takes that of the features.
        quantisation: How floats became bytes.
        reference: Name of the set of real images compared with.
        reference_sha256: Start of the hash of its content; "" takes any.
        n: Number of images judged, at least.
        averaged: Whether samples must come from averaged weights (EMA).
        ema: Name of the average that they must come from; "" takes any.
        seeds: The samples' seeds as `Source` words them; "" takes any.
        sampler: Start of the sampler's description, such as "HeunEDM("; "" takes any.
        guidance: Start of the guidance's description; "" takes any.
        nfe: Evaluations of the network for one sample; None takes any.

    Raises:
        ValueError: If n is below 2.
    """

    name: str
    features: str
    features_sha256: str = ""
    resize: str = "none"
    quantisation: str = QUANTISATION
    reference: str = "test"
    reference_sha256: str = ""
    n: int
    averaged: bool = True
    ema: str = ""
    seeds: str = ""
    sampler: str = ""
    guidance: str = ""
    nfe: int | None = None

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ValueError(f"a protocol needs n >= 2, not {self.n}")


FID50K = Protocol(
    name="fid50k",
    features=INCEPTION,
    features_sha256=SHA256_PREFIX,
    resize="TF1 bilinear 299",
    reference="train",
    n=50_000,
)
"""The customary FID: 50,000 samples against the statistics of the whole training set."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the judged images came from; everything is text for people, but `ema`, which protocols look at.

    Args:
        seeds: Sample seeds, see `describe_seeds`.
        ema: Name of the average whose weights made the samples, or "raw"; "none" for images no network made.
        sampler: The sampler with its settings.
        grid: The noise levels.
        guidance: The guidance with its settings.
        nfe: Evaluations of the network for one sample; None where it is not known.
        labels: The classes drawn: `ALL_LABELS`, or the list of them; "unknown" also where there are no classes.
    """

    seeds: str = UNKNOWN
    ema: str = UNKNOWN
    sampler: str = UNKNOWN
    grid: str = UNKNOWN
    guidance: str = UNKNOWN
    nfe: int | None = None
    labels: str = UNKNOWN

    def __str__(self) -> str:
        nfe = "NFE unknown" if self.nfe is None else f"NFE {self.nfe}"
        labels = "" if self.labels in (UNKNOWN, ALL_LABELS) else f"labels {self.labels}, "
        return (
            f"seeds {self.seeds}, {labels}weights {self.ema}, sampler {self.sampler}, grid {self.grid}, "
            f"guidance {self.guidance}, {nfe}"
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """A value with its protocol, and what was in fact done.

    Args:
        metric: What was measured, such as "frechet" or "accuracy".
        short: What tables call it, such as `FD`.
        published: What it is called in features of the published Inception network, such as `FID`; "" for the same.
        better: "lower" or "higher".
        percent: Whether it is a share, shown in per cent.
        value: The number.
        spread: Its standard deviation over parts or subsets; None where the measure has none.
        real: The same number for real images: the floor of a distance, the ceiling of an accuracy; None if not taken.
        real_n: Number of real images behind `real`.
        protocol: The conditions it should fulfil.
        features: Name of the extractor used.
        features_sha256: Hash of its weights.
        resize: Its resize.
        quantisation: How floats became bytes.
        n: Number of images judged.
        reference: Name of the real images compared with.
        reference_sha256: Hash of their content.
        reference_n: Their number.
        own_reference: Whether the metric itself says what it is compared with, as copies are sought in the training
            set; then the protocol's reference is not asked for.
        of_n: Number of samples in the set, where the metric looks at fewer; 0 for `n`.
        source: Where the judged images came from.
    """

    metric: str
    short: str = "FD"
    published: str = "FID"
    better: str = "lower"
    percent: bool = False
    value: float
    spread: float | None = None
    real: float | None = None
    real_n: int | None = None
    protocol: Protocol
    features: str
    features_sha256: str
    resize: str
    quantisation: str
    n: int
    reference: str
    reference_sha256: str
    reference_n: int
    own_reference: bool = False
    of_n: int = 0
    source: Source = Source()

    @property
    def sample_n(self) -> int:
        """Number of samples in the set; some measures look at fewer of them."""
        return self.of_n or self.n

    @property
    def deviations(self) -> tuple[str, ...]:
        """What was done otherwise than the protocol asks, in words; empty if the value may be quoted."""
        asked, found = self.protocol, []
        if self.sample_n < asked.n:
            found.append(f"n {self.sample_n} instead of {asked.n}")
        # a reference that is pinned by its hash may be called anything
        named = () if self.own_reference or asked.reference_sha256 else ("reference",)
        for what in ("features", "resize", "quantisation", *named):
            if getattr(asked, what) not in ("", getattr(self, what)):
                found.append(f"{what} {getattr(self, what)} instead of {getattr(asked, what)}")
        if not self.features_sha256.startswith(asked.features_sha256):
            found.append(f"feature weights {self.features_sha256[:8]} instead of {asked.features_sha256[:8]}")
        if not self.own_reference and not self.reference_sha256.startswith(asked.reference_sha256):
            found.append(
                f"reference with hash {self.reference_sha256[:8]} instead of {asked.reference_sha256[:8]}"
            )
        if asked.averaged and self.source.ema == RAW:
            found.append("raw weights instead of averaged")
        elif asked.ema and self.source.ema != asked.ema:
            found.append(f"weights {self.source.ema} instead of {asked.ema}")
        if asked.seeds and self.source.seeds != asked.seeds:
            found.append(f"seeds {self.source.seeds} instead of {asked.seeds}")
        for what in ("sampler", "guidance"):
            done, wanted = getattr(self.source, what), getattr(asked, what)
            if not done.startswith(wanted):
                found.append(f"{what} {done} instead of {wanted}")
        if asked.nfe not in (None, self.source.nfe):
            found.append(
                f"NFE {'unknown' if self.source.nfe is None else self.source.nfe} instead of {asked.nfe}"
            )
        if self.source.labels not in (UNKNOWN, ALL_LABELS):
            found.append(f"labels {self.source.labels} instead of all")
        return tuple(found)

    @property
    def label(self) -> str:
        """The only name under which the value may be shown, such as `FD@1437 (digits-cnn)`."""
        if not is_published(self.features, self.features_sha256):
            return f"{self.short}@{self.n} ({self.features})"
        name = self.published or self.short
        # the distance falls with n, so more is another number too; and a handful of real images is no reference
        usual = self.n == FID50K.n and (self.reference_n >= LARGEST_N or self.reference_n == 0)
        known = self.protocol.reference in REFERENCES or self.protocol.reference_sha256
        return name if usual and known and not self.deviations else f"{name}@{self.n}"

    @property
    def conditions(self) -> str:
        """One line: what was done, and how it deviates from the protocol."""
        deviations = "; ".join(self.deviations)
        return (
            f"{self.protocol.name}: n {self.n}, features {self.features} {self.features_sha256[:8]}, "
            f"resize {self.resize}, {self.quantisation}, against {self.reference} (n {self.reference_n}, "
            f"{self.reference_sha256[:8]}), {self.source}"
            + (f" | DEVIATES: {deviations}" if deviations else "")
        )

    def __str__(self) -> str:
        return f"{self.label} = {self.shown()} | {self.conditions}"

    def shown(self) -> str:
        """The value as text, with that of real images beside it where it was taken."""
        show = _percent if self.percent else _number
        value = show(self.value) if self.spread is None else f"{show(self.value)} ± {show(self.spread)}"
        if self.real is None:
            return value
        other = "" if self.real_n in (None, self.n) else f"@{self.real_n}"
        return f"{value} (real{other} {show(self.real)})"

    def differences(self, other: Record) -> tuple[str, ...]:
        """What makes two values incomparable, in words; empty if they may stand in one table.

        The source of the images may differ: that is what one compares.
        """
        same = (
            "metric",
            "features",
            "features_sha256",
            "resize",
            "quantisation",
            "n",
            "reference_sha256",
            "reference_n",
        )
        return tuple(
            f"{name} {getattr(self, name)} against {getattr(other, name)}"
            for name in same
            if getattr(self, name) != getattr(other, name)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON, with `label` and `deviations` for the reader."""
        return {"label": self.label, **asdict(self), "deviations": list(self.deviations)}

    def to_json(self) -> str:
        """Return the record as one JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Rebuild a record from `to_dict`; label and deviations are derived anew, not believed.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        given = {key: value for key, value in data.items() if key not in ("label", "deviations")}
        if (
            given.get("metric") == "accuracy" and "short" not in given
        ):  # written before records said how to show them
            given |= {"short": "accuracy", "published": "", "better": "higher", "percent": True}
        names = {field.name for field in fields(cls)}
        try:
            protocol, source = Protocol(**given.pop("protocol")), Source(**given.pop("source"))
            return cls(protocol=protocol, source=source, **given)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not an evaluation record: {error} (fields: {', '.join(sorted(names))})"
            ) from error


def standard_protocol(
    *,
    features: str,
    features_sha256: str,
    resize: str,
    quantisation: str = QUANTISATION,
    train_n: int | None,
) -> Protocol:
    """Return the house's protocol for an extractor: `FID50K` for Inception, else a comparison at equal n.

    For the others n is the size of the train split (at most 10,000), compared with the test split: then the same number
    of real training images gives the floor.

    Args:
        features: Name of the extractor.
        features_sha256: Hash of its weights.
        resize: Its resize.
        quantisation: How its input was quantised.
        train_n: Size of the train split; None where it is not known (then n is 10,000).
    """
    if features == INCEPTION:
        return FID50K
    n = min(LARGEST_N, train_n or LARGEST_N)
    return Protocol(
        name=f"{features}-{n}",
        features=features,
        features_sha256=features_sha256,
        resize=resize,
        quantisation=quantisation,
        n=n,
    )


def describe_seeds(seeds: Sequence[int]) -> str:
    """Return seeds as text: `0..1436` for a run without gaps, else the first, the last and the number."""
    if not seeds:
        return "none"
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}..{seeds[-1]}"
    return f"{len(seeds)} from {min(seeds)} to {max(seeds)}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"
