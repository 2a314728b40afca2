"""Score a run, an export, or samples that exist already: metrics.json, one row of a table, and the report.

The samples are those of `sample.py`, made by the same code; if the run holds just these already they are taken. The
reference is the test split of the run's data set; beside each distance stands that of as many real training images,
the floor. A value never leaves here without the protocol it was measured under (see `metrics/protocol.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.table import Table

from diffusion_lab.app import record
from diffusion_lab.app.build import data_module, instantiate, load_denoiser, plain
from diffusion_lab.app.choices import read_run
from diffusion_lab.app.display import show
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.job import device_of, from_config
from diffusion_lab.app.run import RunFolder, write_atomically
from diffusion_lab.app.sample import default_out, draw, find_done
from diffusion_lab.metrics.protocol import Record, Source
from diffusion_lab.metrics.quality import evaluate_images

CACHE = "statistics"


def run(cfg: DictConfig) -> list[Record]:
    """Score what a composed and checked config asks for.

    Args:
        cfg: The config of `conf/evaluate.yaml`.

    Returns:
        The records, the Fréchet distance first.

    Raises:
        UserError: If the run, the samples or the data are missing or do not fit.
    """
    config = plain(cfg)
    folder = Path(config["run"]).resolve()
    trained = read_run(folder)
    data = data_module(trained)
    reference, reference_labels = data.test_images()
    real, _ = data.train_images()
    if config["num_samples"] is None:
        config["num_samples"] = len(real)
    images, labels, source, where = _samples(config, folder)
    extractor = instantiate(config["metrics"], "metrics")
    device = device_of(config["device"])
    try:
        records = evaluate_images(
            images,
            labels if labels is not None and bool((labels >= 0).any()) else None,
            reference,
            extractor,
            reference_labels=reference_labels,
            reference_name="test",
            real_images=real,
            source=source,
            cache=_cache_folder(),
            device=device,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"these samples cannot be scored: {error}") from error
    told = _write(records, config, folder, trained, where)
    show(table([told]))
    for item in records:
        if item.deviations:
            print(f"{item.label}: not by the protocol {item.protocol.name}: {'; '.join(item.deviations)}")
    print(f"metrics {told['file']}")
    if config["out"] is None and (folder / "checkpoints").is_dir():
        from diffusion_lab.app.report import write_report

        print(f"report  {write_report(RunFolder(folder))}")
    return records


def _cache_folder() -> Path:
    """Where statistics of real images are kept; they are keyed by content, so any place will do."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "diffusion_lab" / CACHE


def _samples(config: dict[str, Any], folder: Path) -> tuple[torch.Tensor, torch.Tensor | None, Source, Path]:
    """Return images `(N, C, H, W)` uint8 (or points), labels, where they come from, and their folder or file."""
    if config["samples"] is not None:
        return _given(Path(config["samples"]))
    loaded = load_denoiser(folder, config["ema"])
    job = from_config({**config, "run": str(folder)}, loaded)
    earlier, out = find_done(job, folder), default_out(folder, job, loaded)
    if earlier is not None and record.read(earlier / "record.json")["num_samples"] == job.num_samples:
        print(f"scoring the samples in {earlier}")
        return _given(earlier)
    command = record.command("evaluate", config.get("overrides") or [])
    draw(job, loaded, out, devices=int(config["devices"]), command=command, earlier=earlier)
    return _given(out)


def _given(path: Path) -> tuple[torch.Tensor, torch.Tensor | None, Source, Path]:
    """Read samples that exist: a folder of sample.py, or an .npz with `images` and perhaps `labels`."""
    file = path / "samples.npz" if path.is_dir() else path
    if not file.is_file():
        unfinished = " (an unfinished job is there)" if (path / "parts").is_dir() else ""
        raise UserError(f"samples={path}: no samples.npz there{unfinished}")
    try:
        with np.load(file, allow_pickle=False) as stored:
            images = torch.from_numpy(stored["images"])
            labels = torch.from_numpy(stored["labels"]).to(torch.int64) if "labels" in stored else None
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{file}: an .npz with an array `images` is needed: {error}") from error
    if images.ndim == 4:
        if images.dtype != torch.uint8:
            raise UserError(
                f"{file}: images must be uint8, these are {str(images.dtype).removeprefix('torch.')}"
            )
        # channels last, as everybody stores images
        images = images.permute(0, 3, 1, 2).contiguous()
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{file}: {len(images)} images have {len(labels)} labels")
    told = record.read(file.parent / "record.json")
    return images, labels, _source(told), path


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
    )


def _write(
    records: Sequence[Record],
    config: Mapping[str, Any],
    folder: Path,
    trained: Mapping[str, Any],
    where: Path,
) -> dict[str, Any]:
    """Append this evaluation to metrics.json, in place of an equal earlier one."""
    out = Path(config["out"]) if config["out"] else folder
    file = out if out.suffix == ".json" else out / "metrics.json"
    told = record.read(where / "record.json") if where.is_dir() else {}
    evaluation = {
        "created": record.now(),
        "run": f"{trained.get('name')}/{trained.get('run_id')}",
        "images_seen": (told.get("weights") or {}).get("images_seen"),
        "samples": str(where),
        "command": record.command("evaluate", config.get("overrides") or []),
        "records": [
            {**item.to_dict(), "shown": item.shown(), "conditions": item.conditions} for item in records
        ],
        "versions": record.versions(),
        "git": record.git_state(),
    }
    earlier = record.read_evaluations(file)
    key = _what(evaluation)
    kept = [item for item in earlier if _what(item) != key]
    write_atomically(file, json.dumps({"evaluations": [*kept, evaluation]}, indent=2, default=str) + "\n")
    return {**evaluation, "file": str(file)}


def _what(evaluation: Mapping[str, Any]) -> tuple[Any, ...]:
    """What was measured, on what: an evaluation made again replaces its predecessor."""
    measured = [(item.get("label"), item.get("conditions")) for item in evaluation.get("records", [])]
    return evaluation.get("images_seen"), evaluation.get("samples"), str(measured)


def table(evaluations: Sequence[Mapping[str, Any]]) -> Table:
    """Lay evaluations out, one a row: distances with their floor beside them, accuracies with their ceiling."""
    labels = list(
        dict.fromkeys(item["label"] for evaluation in evaluations for item in evaluation["records"])
    )
    out = Table(box=None, pad_edge=False, header_style="dim")
    out.add_column("run", overflow="fold")
    for label in labels:
        out.add_column(label, justify="right")
        out.add_column(
            f"real {'floor' if label[:2] in ('FD', 'FI') else 'test'}", justify="right", style="dim"
        )
    for name in ("weights", "sampler", "NFE"):
        out.add_column(name, justify="right" if name == "NFE" else "left", overflow="fold")
    for evaluation in evaluations:
        by_label = {item["label"]: item for item in evaluation["records"]}
        cells = [str(evaluation["run"])]
        for label in labels:
            item = by_label.get(label)
            cells += [_cell(item, "value"), _cell(item, "real")]
        source = evaluation["records"][0]["source"]
        nfe = "?" if source["nfe"] is None else str(source["nfe"])
        out.add_row(*cells, source["ema"], str(source["sampler"]).removesuffix("()"), nfe)
    return out


def _cell(item: Mapping[str, Any] | None, key: str) -> str:
    if item is None or item.get(key) is None:
        return "-"
    return f"{100 * item[key]:.2f} %" if item["metric"] == "accuracy" else f"{item[key]:.4g}"
