"""Score a run, an export, or samples that exist already: metrics.json, rows of a table, and the report.

    evaluate.py run=<run>                                       samples of the run, made as `sample.py` makes them
    evaluate.py run=<run> samples=<folder, .npz, pictures>      these, against the run's data
    evaluate.py samples=<one set> reference=<another> metrics=<features>                       without a run

The samples are made by the same code as those of `sample.py`; if the run holds just these already they are taken.
Beside each number stands that of as many real images, see `scoring/judging.py`. A value never leaves here without the
protocol it was measured under (see `metrics/protocol.py`). Written are metrics.json and, made from it, metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.table import Table

from diffusion_lab.app.build import load_denoiser, plain
from diffusion_lab.app.config.choices import read_run
from diffusion_lab.app.display import show, shown
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.runs import record
from diffusion_lab.app.runs.places import workplace
from diffusion_lab.app.runs.run import RunFolder
from diffusion_lab.app.sample import default_out, draw, find_done
from diffusion_lab.app.sampling.job import device_of, from_config
from diffusion_lab.app.scoring import scores
from diffusion_lab.app.scoring.evaluate_checks import check_fit, check_paths, check_words
from diffusion_lab.app.scoring.judging import Samples, Yardstick, score, yardstick
from diffusion_lab.app.scoring.measuring import Place
from diffusion_lab.data.image_sets import Held, Mapped, some
from diffusion_lab.data.stored_images import open_images
from diffusion_lab.images import visible
from diffusion_lab.metrics.protocol import ALL_LABELS, UNKNOWN, Record, Source

LIKELIHOOD = "diffusion_lab.likelihood."
"""Where metrics are that judge a model and not its samples."""


@dataclass(frozen=True)
class Scored:
    """What an evaluation came to: the samples' folder or file, and the records in the order of the measures."""

    where: Path
    records: list[Record]


def run(cfg: DictConfig) -> Scored | list[dict[str, Any]]:
    """Score what a composed and checked config asks for.

    Args:
        cfg: The config of `conf/evaluate.yaml`.

    Returns:
        What it came to; the records alone where a model was judged and not its samples.

    Raises:
        UserError: If the run, the samples or the data are missing or do not fit.
    """
    config = plain(cfg)
    folder = None if config["run"] is None else Path(config["run"]).resolve()
    trained = None if folder is None else read_run(folder)
    if str(config["metrics"].get("_target_", "")).startswith(LIKELIHOOD):
        from diffusion_lab.app.scoring import likelihood

        if folder is None or trained is None:
            raise UserError("a likelihood is that of a model: run=<folder> is needed")
        return likelihood.run(config, folder, trained)
    check_words(config)
    check_paths(config)
    yard = yardstick(
        trained,
        config["metrics"],
        device_of(config["device"]),
        run=folder,
        measured=config["measures"],
        reference=config["reference"],
        protocol=config["protocol"],
        skip_corrupt=config["skip_corrupt"],
        on_skip=_skipped,
    )
    if config["num_samples"] is None and config["samples"] is None:
        asked = yard.protocol.n if yard.protocol is not None else len(yard.real or ())
        config["num_samples"] = asked
    if config["samples"] is None:
        check_fit(yard, int(config["num_samples"]), labelled=bool(config["num_classes"]))
    samples = _samples(config, folder, yard)
    records = score(
        samples,
        yard,
        devices=int(config["devices"]),
        on_hindrance=lambda name, reason: print(f"{name} is not measured: {reason}"),
    )
    out = _out(config, folder)
    told = _written(records, config, out, folder, trained, samples.where)
    show(table([told]))
    ways = _by_protocol(records)
    for line, labels in ways:
        alike = len(labels) == len(records) > 1
        about = "all of these" if alike else ", ".join(labels)
        print(f"{about}: not by the protocol {line}")
    typed = config["out"] or config["run"] or str(out)
    print(f"metrics {shown(told['file'], typed)}")
    if config["out"] is None and folder is not None and (out / "checkpoints").is_dir():
        from diffusion_lab.app.export.model_card import write_card
        from diffusion_lab.app.report import write_report

        write_card(RunFolder(out))
        print(f"report  {shown(write_report(RunFolder(out)), typed)}")
    return Scored(samples.where, records)


def _by_protocol(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Return each way of not fulfilling a protocol once, and the labels of the values it concerns."""
    found: dict[str, list[str]] = {}
    for item in records:
        if item.deviations:
            line = f"{item.protocol.name}: {'; '.join(item.deviations)}"
            found.setdefault(line, []).append(item.label)
    return list(found.items())


def _skipped(line: str) -> None:
    print(f"skipped: {line}", flush=True)


def _out(config: Mapping[str, Any], folder: Path | None) -> Path:
    """Return where metrics.json goes: to the run, never into an export, or below runs/evaluations."""
    if config["out"]:
        return Path(config["out"])
    if folder is not None:
        return workplace(folder)
    return Path(config["paths"]["runs"]) / "evaluations" / Path(config["samples"]).stem


def _samples(config: Mapping[str, Any], folder: Path | None, yard: Yardstick) -> Samples:
    """Return the samples that a config names, drawn now where they are not there yet."""
    if config["samples"] is not None:
        first = None if config["num_samples"] is None else int(config["num_samples"])
        path = Path(config["samples"])
        if first is not None and yard.protocol is not None and first == yard.protocol.n:
            # the protocol's number, not one that was typed: fewer are a deviation, not a mistake
            first = min(first, len(open_images(path, skip_corrupt=config["skip_corrupt"])))
        return _given(path, first, config["skip_corrupt"])
    assert folder is not None
    loaded = load_denoiser(folder, config["ema"])
    job = from_config({**config, "run": str(folder)}, loaded)
    earlier, out = find_done(job, folder), default_out(folder, job, loaded)
    if earlier is not None and record.read(earlier / "record.json")["num_samples"] == job.num_samples:
        print(f"scoring the samples in {earlier}")
        return read_samples(earlier)
    command = record.command("evaluate", config.get("overrides") or [])
    draw(job, loaded, out, devices=int(config["devices"]), command=command, earlier=earlier)
    return read_samples(out)


def _given(path: Path, first: int | None, skip_corrupt: bool) -> Samples:
    found = read_samples(path, skip_corrupt=skip_corrupt)
    if first is None:
        return found
    place = Place(path=found.place.path, first=first, skip_corrupt=skip_corrupt)
    if first > len(found.images):
        raise UserError(f"num_samples={first}: there are {len(found.images)} samples in {found.where}")
    return Samples(some(found.images, torch.arange(first)), found.source, found.where, place)


def read_samples(path: Path, *, latents: bool = False, skip_corrupt: bool = False) -> Samples:
    """Open samples that exist.

    Args:
        path: A folder of sample.py or of pictures, or an .npz with `images` and perhaps `labels`.
        latents: Whether latents are taken too, as something to be looked at: to score them would mean nothing.
        skip_corrupt: Whether to leave out pictures that cannot be read.

    Raises:
        DataError: If there are none, or they cannot be read.
    """
    file = path / "samples.npz" if path.is_dir() else path
    told = record.read(file.parent / "record.json") if file.is_file() else {}
    place = Place(path=str(path.resolve()), skip_corrupt=skip_corrupt, name="samples")
    if latents and file.is_file():
        with np.load(file, allow_pickle=False) as stored:
            if stored["images"].ndim == 4 and stored["images"].dtype != np.uint8:
                seen = visible(torch.from_numpy(stored["images"]))
                labels = torch.from_numpy(stored["labels"]).to(torch.int64) if "labels" in stored else None
                return Samples(Held(seen, labels, "samples"), _source(told), path, place)
    images = open_images(path, skip_corrupt=skip_corrupt, on_skip=_skipped)
    if told and isinstance(images, Mapped) and images.array.ndim == 2:
        images.name = "samples"
    return Samples(images, _source(told), path, place)


def _source(told: Mapping[str, Any]) -> Source:
    if "weights" not in told:
        return Source()
    return Source(
        seeds=f"{told['seed']} (samples 0..{told['num_samples'] - 1})",
        ema=str(told["weights"]["ema"]),
        sampler=str(told["sampler"]),
        grid=str(told["grid"]),
        guidance=" + ".join([str(told["guidance"]), *told.get("modifiers", [])]),
        nfe=told["nfe"],
        labels=_labels(told),
    )


def _labels(told: Mapping[str, Any]) -> str:
    """Return which classes were drawn, from the record of samples."""
    settings = told.get("settings") or {}
    count, labels = int(settings.get("num_classes") or 0), settings.get("labels")
    if count == 0:
        return UNKNOWN
    return ALL_LABELS if labels is None or set(labels) == set(range(count)) else str(labels)


def _written(
    records: Sequence[Record],
    config: Mapping[str, Any],
    out: Path,
    folder: Path | None,
    trained: Mapping[str, Any] | None,
    where: Path,
) -> dict[str, Any]:
    """Append this evaluation to metrics.json, in place of an equal earlier one."""
    told = record.read(where / "record.json") if where.is_dir() else {}
    images_seen = (told.get("weights") or {}).get("images_seen")
    own = folder is None or config["samples"] is None or _drawn_by(folder, told, where)
    run = str(where) if trained is None else f"{trained.get('name')}/{trained.get('run_id')}"
    evaluation = scores.evaluation(
        run=run if own else f"{where.resolve().name} (not drawn by this run)",
        own=own,
        images_seen=images_seen,
        samples=str(where),
        config=config,
        records=[
            {**item.to_dict(), "shown": item.shown(), "conditions": item.conditions} for item in records
        ],
    )
    file = scores.append(out, evaluation)
    return {**evaluation, "file": str(file)}


def _drawn_by(folder: Path, told: Mapping[str, Any], where: Path) -> bool:
    """Whether the record beside samples names a run, or its export; a run that was moved has them below it."""
    if "weights" not in told or "run" not in told:
        return False
    run = workplace(folder).resolve()
    named = Path(str(told["run"])).resolve()
    return named in (folder, run, run / "export") or where.resolve().is_relative_to(run / "samples")


def table(evaluations: Sequence[Mapping[str, Any]]) -> Table:
    """Lay evaluations out, a number a row, with that of real images beside it: a floor, or a ceiling."""
    out = Table(box=None, pad_edge=False, header_style="dim")
    out.add_column("run", overflow="fold")
    out.add_column("measure")
    out.add_column("value", justify="right")
    out.add_column("real images", justify="right", style="dim")
    for name in ("weights", "sampler", "NFE"):
        out.add_column(name, justify="right" if name == "NFE" else "left", overflow="fold")
    for evaluation in evaluations:
        source = evaluation["records"][0]["source"]
        nfe = "?" if source["nfe"] is None else str(source["nfe"])
        head = [str(evaluation["run"])]
        tail = [source["ema"], str(source["sampler"]).removesuffix("()"), nfe]
        for item in evaluation["records"]:
            arrow = "↓" if item.get("better", "lower") == "lower" else "↑"
            real = _cell(item, "real")
            if item.get("real_n") not in (None, item["n"]):
                real += f" (n {item['real_n']:,})"
            out.add_row(*head, f"{item['label']} {arrow}", _cell(item, "value"), real, *tail)
            head, tail = [""], ["", "", ""]
    return out


def _cell(item: Mapping[str, Any], key: str) -> str:
    if item.get(key) is None:
        return "-"
    return scores.number(item, key)
