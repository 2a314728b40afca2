"""The top level of each config, typed.

Nodes with a `_target_` are checked against the signature they name (`validate.py`); what is left are the scalars a user
types most, and the names of the groups. A new top-level key is declared here, or it is refused: a key that nobody reads
is a misspelt key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from diffusion_lab.app.errors import UserError


def _at_least(least: int) -> dict[str, Callable[[Any], str | None]]:
    def check(value: Any) -> str | None:
        return None if value is None or value >= least else f"must be at least {least}, got {value}"

    return {"check": check}


def _no_slash_at_ends(value: Any) -> str | None:
    bad = value is not None and (value != value.strip("/ ") or ".." in value.split("/"))
    return "must be a plain name such as digits/quickstart" if bad else None


@dataclass(kw_only=True)
class Paths:
    """Folders."""

    runs: str
    data: str
    run: str | None


@dataclass(kw_only=True)
class Train:
    """Keys of `conf/train.yaml`. `Any` marks a group or a node: the group's own file says what is in it."""

    name: str | None = field(metadata={"check": _no_slash_at_ends})
    run_id: str | None = field(metadata={"check": _no_slash_at_ends})
    resume: str | None
    seed: int = field(metadata=_at_least(0))
    batch_size: int = field(metadata=_at_least(1))
    max_images: int = field(metadata=_at_least(1))
    shape: list[int]
    num_classes: int = field(metadata=_at_least(0))
    paths: Paths
    dataset: Any
    model: Any
    interpolant: Any
    schedule: Any
    prediction: Any
    weighting: Any
    method: Any
    optimizer: Any
    lr_schedule: Any
    sampler: Any
    grid: Any
    guidance: Any
    modifiers: Any
    generation: Any
    averages: Any
    callbacks: Any
    logger: Any
    metrics: Any
    trainer: Any
    launcher: Any
    sweep: Any


@dataclass(kw_only=True)
class Sampling:
    """Keys that `conf/sample.yaml` and `conf/evaluate.yaml` share."""

    run: str | None
    out: str | None
    batch_size: int = field(metadata=_at_least(1))
    seed: int = field(metadata=_at_least(0))
    ema: str | None
    labels: list[int] | int | None
    device: str
    devices: int = field(metadata=_at_least(1))
    precision: str
    compile: bool
    shape: list[int] | None
    num_classes: int | None
    paths: Paths
    schedule: Any
    sampler: Any
    grid: Any
    guidance: Any
    modifiers: Any
    generation: Any


@dataclass(kw_only=True)
class Sample(Sampling):
    """Keys of `conf/sample.yaml`."""

    num_samples: int = field(metadata=_at_least(1))
    measurement: Any
    input: str | None
    draws: int = field(metadata=_at_least(1))


@dataclass(kw_only=True)
class Evaluate(Sampling):
    """Keys of `conf/evaluate.yaml`: those of sampling, and what to measure with."""

    num_samples: int | None = field(metadata=_at_least(1))
    samples: str | None
    reference: str | None
    skip_corrupt: bool
    num_images: int | None = field(metadata=_at_least(1))
    metrics: Any
    measures: Any
    protocol: Any


SCHEMAS: dict[str, type] = {"train": Train, "sample": Sample, "evaluate": Evaluate}


def keys(schema: type) -> list[str]:
    """Return the names of the fields of a schema."""
    return [item.name for item in fields(schema)]


def check_values(schema: type, name: str, value: Any) -> None:
    """Run the extra check that a field carries, if any.

    Raises:
        UserError: If the value is out of its range.
    """
    for item in fields(schema):
        check = item.metadata.get("check")
        if item.name == name and check is not None and (trouble := check(value)):
            raise UserError(f"{name}: {trouble}")


def required(schema: type) -> list[str]:
    """Return the names of the fields that a config must have."""
    return [
        item.name for item in fields(schema) if item.default is MISSING and item.default_factory is MISSING
    ]
