"""The run folder: one folder holds all that a run is, and a run is found again by what it trains.

    <paths.runs>/<name>/<run id>/
        config.yaml     the config, resolved, with the options chosen
        record.json     versions, git commit, command, hardware, seeds, start and end of every session
        checkpoints/    metrics.csv    samples/    logs/    report.html
        export/         averaged weights as safetensors, and config.yaml
    <paths.runs>/<name>/latest -> <run id>      the one started or resumed last

The id is the local time. Folders are made with an exclusive mkdir, so jobs that start in the same second get their
own. `latest` is a relative link, renamed into place: at any moment it leads somewhere.

Two runs are the same run if their *identity* agrees: everything in the config that the trajectory of the weights
depends on. Where it writes, how long it goes on, how often it looks, and on how many processes, are not part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from diffusion_lab.app.errors import UserError
from diffusion_lab.claims import claim, owner

LATEST = "latest"

# what no training step depends on
NOT_IDENTITY = frozenset(
    (
        "name run_id resume max_images paths logger choices overrides generation sampler grid guidance modifiers "
        "metrics launcher sweep"
    ).split()
)
# callbacks that only look
WATCHING = frozenset(
    "AccuracyByNoiseLevel Checkpoints EMASnapshots FrechetDuringTraining KeptWeights LossByNoiseLevel Preemption "
    "Progress PruneHopeless SampleGrid Throughput TrainingLog".split()
)
# how fast the data come and from where, not which
NOT_DATA = frozenset({"root", "num_workers", "how_to_get", "index_cache"})
# how fast it is computed and in what memory, at any depth: rounding apart, the same
NOT_ARITHMETIC = frozenset({"compile_network", "channels_last", "fused"})
# the trainer's keys that change the arithmetic
ARITHMETIC = ("precision", "gradient_clip_val", "gradient_clip_algorithm")


@dataclass(frozen=True)
class RunFolder:
    """The places inside a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        """What ran, where, when and how it ended."""
        return self.path / "record.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """The folder of pictures and samples."""
        return self.path / "samples"

    @property
    def metrics_csv(self) -> Path:
        """The logged numbers."""
        return self.path / "metrics.csv"

    @property
    def metrics_json(self) -> Path:
        """The evaluations."""
        return self.path / "metrics.json"

    @property
    def export(self) -> Path:
        """The averaged weights to give away."""
        return self.path / "export"

    @property
    def logs(self) -> Path:
        """What processes other than the first have printed."""
        return self.path / "logs"

    @property
    def report(self) -> Path:
        """The page to read."""
        return self.path / "report.html"


def create(runs: Path, name: str, run_id: str | None = None) -> RunFolder:
    """Make the folder of a new run and point `latest` at it.

    Args:
        runs: The folder of all runs.
        name: Name of the experiment; slashes make folders.
        run_id: The folder's own name; None takes the time, made unique.

    Raises:
        UserError: If `run_id` is taken, or the folder cannot be made.
    """
    parent = runs / name
    stamp = run_id or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 10_000):
            folder = parent / (stamp if attempt == 1 else f"{stamp}-{attempt}")
            try:
                folder.mkdir()
            except FileExistsError:
                if run_id is not None:
                    raise UserError(
                        f"run_id={run_id}: {folder} exists already; resume={folder} goes on with it"
                    ) from None
                continue
            point_latest(folder)
            return RunFolder(folder)
    except OSError as error:
        raise UserError(f"no run folder could be made in {parent}: {error.strerror or error}") from error
    raise UserError(f"no free name for a run in {parent}")


def point_latest(folder: Path) -> None:
    """Make `latest` beside `folder` lead to it, atomically."""
    folder = folder.absolute()
    aside = folder.parent / f".{LATEST}.{secrets.token_hex(8)}"
    aside.symlink_to(folder.name, target_is_directory=True)
    os.replace(aside, folder.parent / LATEST)


def discard(folder: RunFolder, name: str) -> None:
    """Remove a run that never began, and let `latest` lead to the newest one that did.

    Where there is none, the folders that were made for the name go too, if nothing else is in them.
    """
    shutil.rmtree(folder.path, ignore_errors=True)
    others = list_runs(folder.path.parent)
    if others:
        point_latest(others[0].path)
        return
    (folder.path.parent / LATEST).unlink(missing_ok=True)
    # one folder for each part of the name, and that of all runs
    for parent in list(folder.path.absolute().parents)[: name.count("/") + 2]:
        try:
            parent.rmdir()
        except OSError:
            break


def list_runs(parent: Path) -> list[RunFolder]:
    """Return the runs of one experiment, newest first."""
    if not parent.is_dir():
        return []
    found = [p for p in parent.iterdir() if not p.is_symlink() and (p / "config.yaml").is_file()]
    return [RunFolder(p) for p in sorted(found, key=lambda p: (_born(p), p.name), reverse=True)]


def _born(folder: Path) -> float:
    """When a run was first started: by its record, or by its config if the record is missing or broken."""
    try:
        return datetime.fromisoformat(json.loads((folder / "record.json").read_text())["created"]).timestamp()
    except (OSError, ValueError, KeyError, TypeError):
        return (folder / "config.yaml").stat().st_mtime


def identity_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the trajectory of the weights depends on, out of a resolved config."""
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    if isinstance(kept.get("dataset"), Mapping):
        kept["dataset"] = {key: value for key, value in kept["dataset"].items() if key not in NOT_DATA}
    if isinstance((kept.get("method") or {}).get("teacher"), Mapping):
        # who the teacher is, not where its run lies
        teacher = {key: value for key, value in kept["method"]["teacher"].items() if key != "run"}
        kept["method"] = {**kept["method"], "teacher": teacher}
    trainer = kept.get("trainer") or {}
    kept["trainer"] = {key: trainer.get(key) for key in ARITHMETIC}
    kept["callbacks"] = {
        name: {key: value for key, value in node.items() if key not in ("every_images", "dirpath")}
        for name, node in (kept.get("callbacks") or {}).items()
        if isinstance(node, Mapping) and str(node.get("_target_")).rsplit(".", 1)[-1] not in WATCHING
    }
    return {key: _without(value, NOT_ARITHMETIC) for key, value in kept.items()}


def _without(node: Any, keys: frozenset[str]) -> Any:
    if isinstance(node, Mapping):
        return {key: _without(inner, keys) for key, inner in node.items() if key not in keys}
    return [_without(inner, keys) for inner in node] if isinstance(node, list | tuple) else node


def identity(config: Mapping[str, Any]) -> str:
    """Hash `identity_parts` of a resolved config; twelve hexadecimal digits."""
    return digest(identity_parts(config))


def digest(plain: Any) -> str:
    """Hash plain data, whatever the order of its keys; twelve hexadecimal digits."""
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Return the first key in which two configs differ in identity, with both values; None if they agree."""
    return _first_difference(identity_parts(old), identity_parts(new), "")


def _first_difference(old: Any, new: Any, prefix: str) -> str | None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            found = _first_difference(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
            if found is not None:
                return found
        return None
    return None if digest(old) == digest(new) else f"{prefix} (was {old!r}, now {new!r})"


@contextmanager
def claimed(folder: RunFolder) -> Iterator[None]:
    """Hold a run for this process, so that no second one trains into the same folder.

    Raises:
        UserError: If another process holds the run.
    """
    file = folder.path / ".lock"
    with claim(file) as held:
        if not held:
            raise UserError(f"{folder.path} is being trained by another process ({owner(file)})")
        yield
