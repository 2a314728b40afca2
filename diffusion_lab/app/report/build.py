"""From the files of a run folder to report.html.

Read are config.yaml, record.json, metrics.csv, loss_by_noise_level.csv, metrics.json and the pictures below
samples/; a part whose file is missing is left out, so the report of a young or a damaged run is short, never an
error. The page holds all it shows: no network, no other file.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from diffusion_lab.app.display import clock, newest, read_metrics
from diffusion_lab.app.report import figures, page
from diffusion_lab.app.report.charts import charts
from diffusion_lab.app.runs import record
from diffusion_lab.app.runs.run import RunFolder
from diffusion_lab.app.scoring import scores
from diffusion_lab.files import write_atomically

REAL = "real.png"
REAL_ROWS = 4


def write_report(folder: RunFolder) -> Path:
    """Write the report of a run.

    Args:
        folder: The run.

    Returns:
        The file.
    """
    stored = OmegaConf.to_container(OmegaConf.load(folder.config)) if folder.config.is_file() else {}
    config = {str(key): value for key, value in stored.items()} if isinstance(stored, dict) else {}
    told = record.read(folder.record)
    name, run_id = str(config.get("name", "run")), folder.path.resolve().name
    rows = read_metrics(folder.metrics_csv)
    sections = [
        _metrics(folder),
        _samples(folder, config),
        _training(folder, rows),
        _reproduce(told),
        _details(config, told),
    ]
    status = str(told.get("status", "unknown"))
    text = page.render(
        title=f"{name} {run_id}",
        heading=name,
        status=status,
        kind=status,
        subtitle=_subtitle(config, run_id),
        facts=_facts(config, told, rows),
        sections=sections,
    )
    write_atomically(folder.report, text)
    return folder.report


# ---- the top ---------------------------------------------------------------------------------------------


def _subtitle(config: Mapping[str, Any], run_id: str) -> str:
    choices = config.get("choices") or {}
    named = [
        f"{key} {choices[key]}"
        for key in ("dataset", "model", "interpolant", "schedule", "prediction")
        if choices.get(key)
    ]
    return " · ".join([f"run {run_id}", *named])


def _facts(
    config: Mapping[str, Any], told: Mapping[str, Any], rows: Sequence[Mapping[str, float]]
) -> dict[str, str | None]:
    session = record.last_session(told)
    git = session.get("git") or {}
    commit = (
        f"{git['commit'][:10]}{' + uncommitted changes' if git.get('dirty') else ''}"
        if git.get("commit")
        else "not in git"
    )
    seen = session.get("images_seen") or newest(rows, "images_seen")
    speed = newest(rows, "images_per_s")
    sessions = len(told.get("sessions") or [])
    seconds = record.training_seconds(told)
    return {
        "images seen": f"{int(seen):,} of {config.get('max_images', 0):,}" if seen else None,
        "time": f"{clock(seconds)}{f' in {sessions} sessions' if sessions > 1 else ''}" if seconds else None,
        "speed": f"{speed:,.0f} images/s" if speed else None,
        "parameters": f"{session['parameters']:,}" if session.get("parameters") else None,
        "batch size": str(config.get("batch_size", "")),
        "seed": str(config.get("seed", "")),
        "device": session.get("device") or (session.get("hardware") or {}).get("cpu"),
        "commit": commit,
        "started": str(told.get("created", ""))[:19].replace("T", " "),
    }


# ---- numbers ---------------------------------------------------------------------------------------------


def _metrics(folder: RunFolder) -> str:
    evaluations = record.read_evaluations(folder.metrics_json)
    if not evaluations:
        return ""
    # a trial with few samples must not take the place of a score that may be quoted
    # of samples and of the likelihood, the best of each
    cards = ""
    for judged in (True, False):
        found = scores.best([item for item in evaluations if (item.get("samples") is not None) == judged])
        cards += "".join(map(_number, found["records"])) if found is not None else ""
    numbers = f'<div class="numbers">{cards}</div>' if cards else ""
    lines = "".join(_protocol_line(evaluation) for evaluation in reversed(evaluations))
    return page.section(
        "Scores",
        f"{numbers}"
        '<div class="scroll"><table><thead><tr><th>measure</th><th class="right">value</th>'
        '<th class="right">real data</th><th class="right">NFE</th><th>weights</th><th>sampler</th></tr></thead>'
        f"<tbody>{lines}</tbody></table></div>",
    )


def _number(item: Mapping[str, Any]) -> str:
    beside = ""
    if item.get("real") is not None:
        n = item.get("real_n")
        kind = "for as many real images" if n in (None, item.get("n")) else f"for {n:,} real images"
        beside = f"<small>{html.escape(_value(item, 'real'))} {kind}</small>"
    label, value, deviations = html.escape(item["label"]), _value(item, "value"), _deviations(item)
    warn = f'<small class="warn">deviates: {html.escape(deviations)}</small>' if deviations else ""
    return f'<div class="number"><small>{label}</small><b>{value}</b>{beside}{warn}</div>'


def _deviations(item: Mapping[str, Any]) -> str:
    """Return how a record deviates from its protocol, in words."""
    return str(item.get("conditions", "")).partition(" | DEVIATES: ")[2]


def _value(item: Mapping[str, Any], key: str) -> str:
    if item.get(key) is None:
        return "–"
    return scores.number(item, key)


def _protocol_line(evaluation: Mapping[str, Any]) -> str:
    cells = []
    of = (
        ""
        if evaluation.get("own", True)
        else f'<br><span class="warn">{html.escape(str(evaluation["run"]))}</span>'
    )
    for item in evaluation["records"]:
        conditions = str(item.get("conditions", "")).partition(" | DEVIATES: ")[0]
        deviations = _deviations(item)
        warn = f'<br><span class="warn">deviates: {html.escape(deviations)}</span>' if deviations else ""
        source = item.get("source") or {}
        nfe = source.get("nfe")
        cells.append(
            f'<tr class="value"><td>{html.escape(item["label"])}{of}</td>'
            f'<td class="right">{_value(item, "value")}</td><td class="right">{_value(item, "real")}</td>'
            f'<td class="right">{"?" if nfe is None else nfe}</td>'
            f"<td>{html.escape(str(source.get('ema', '?')))}</td>"
            f"<td>{html.escape(str(source.get('sampler', '?')).removesuffix('()'))}</td></tr>"
            f'<tr><td colspan="6" class="faint">{html.escape(conditions)}{warn}</td></tr>'
        )
    return "".join(cells)


# ---- pictures --------------------------------------------------------------------------------------------


def _samples(folder: RunFolder, config: Mapping[str, Any]) -> str:
    grids = sorted(folder.samples.glob("grid-*.png"))
    paths = sorted(folder.samples.glob("trajectory-*.png"))
    drawn = sorted(folder.samples.glob("*/grid.png"), key=lambda path: path.stat().st_mtime)
    figure_list = []
    if grids:
        figure_list.append(
            page.picture(
                grids[-1].read_bytes(),
                f"Samples at {_images(grids[-1]):,} images seen, every column a class.",
            )
        )
    elif drawn:
        figure_list.append(page.picture(drawn[-1].read_bytes(), f"Samples ({drawn[-1].parent.name})."))
    if len(config.get("shape") or []) != 3 and figure_list:
        figure_list[0] = figure_list[0].replace(", every column a class", "")
    real = _real(folder, config) if figure_list else None
    if real is not None:
        figure_list.append(page.picture(real.read_bytes(), "Real test examples, laid out alike."))
    parts = [f'<div class="pair">{"".join(figure_list)}</div>'] if figure_list else []
    if paths:
        caption = (
            "From noise (left) to sample (right): the prediction of x0 at several steps, one sample a row."
        )
        parts.append(f'<div class="way">{page.picture(paths[-1].read_bytes(), caption)}</div>')
    if len(grids) > 2:
        chosen = [grids[round(i * (len(grids) - 1) / 3)] for i in range(3)] if len(grids) > 3 else grids[:-1]
        early = "".join(
            page.picture(p.read_bytes(), f"{_images(p):,} images")
            for p in dict.fromkeys(chosen)
            if p != grids[-1]
        )
        parts.append(
            f'<details><summary>The same seeds earlier in training</summary><div class="pair">{early}</div></details>'
        )
    return page.section("Samples", "".join(parts)) if parts else ""


def _images(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0


def _real(folder: RunFolder, config: Mapping[str, Any]) -> Path | None:
    """Return the picture of real examples, made once; None where the data cannot be read (any more)."""
    path = folder.samples / REAL
    if path.is_file():
        return path
    from diffusion_lab.app.build import data_module
    from diffusion_lab.callbacks.pictures import tile
    from diffusion_lab.images import to_float

    try:
        data = data_module(config)
        examples, labels = data.test_images()
    except Exception as error:  # the report of a run whose data are gone is still a report
        print(f"report without real examples: {error}")
        return None
    chosen = by_class(
        None if labels is None else labels.numpy(), len(examples), int(config.get("num_classes") or 0)
    )
    folder.samples.mkdir(exist_ok=True)
    if examples.ndim == 4:
        columns = int(config.get("num_classes") or 0) or 8
        # drawn by the hand that drew the samples
        shown = examples[chosen]
        # latents as they are, which is how the samples' pictures show them
        tile(shown if shown.is_floating_point() else to_float(shown), columns).save(path)
    else:
        path.write_bytes(
            figures.points_png([("real", examples.numpy(), None if labels is None else labels.numpy())])
        )
    return path


def by_class(labels: np.ndarray | None, n: int, num_classes: int) -> list[int]:
    """Return indices of a few examples such that the classes come in turn, as in grids of samples.

    Args:
        labels: `(n,)`, or None.
        n: Number of examples.
        num_classes: Number of classes; 0 for data without labels.
    """
    if labels is None or num_classes == 0:
        return list(range(min(n, 8 * REAL_ROWS)))
    of_class = [np.flatnonzero(labels == k) for k in range(num_classes)]
    rows = min([REAL_ROWS, *(len(found) for found in of_class)])
    return [int(of_class[k][row]) for row in range(rows) for k in range(num_classes)]


def _training(folder: RunFolder, rows: Sequence[Mapping[str, float]]) -> str:
    cards = "".join(
        f'<figure class="card">{chart}<figcaption>{html.escape(caption)}</figcaption></figure>'
        for chart, caption in charts(folder, rows)
    )
    return page.section("Training", f'<div class="charts">{cards}</div>') if cards else ""


# ---- the end ---------------------------------------------------------------------------------------------


def _reproduce(told: Mapping[str, Any]) -> str:
    if not told.get("command"):
        return ""
    session = (told.get("sessions") or [{}])[0]
    git = session.get("git") or {}
    checkout = f"git checkout {git['commit']}\n" if git.get("commit") else ""
    dirty = '<p class="warn">The working tree had uncommitted changes.</p>' if git.get("dirty") else ""
    return page.section(
        "Reproduce", f'<pre class="wrap"><code>{html.escape(checkout + told["command"])}</code></pre>{dirty}'
    )


def _details(config: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    choices = config.get("choices") or {}
    chosen = "".join(
        f"<tr><th>{html.escape(str(group))}</th><td>{html.escape(str(option))}</td></tr>"
        for group, option in choices.items()
        if option is not None
    )
    text = OmegaConf.to_yaml(OmegaConf.create(dict(config)))
    record_text = json.dumps(told, indent=2, default=str)
    return page.section(
        "Details",
        f'<details><summary>Options chosen</summary><div class="scroll"><table>{chosen}</table></div></details>'
        f"<details><summary>Config, resolved</summary><pre><code>{html.escape(text)}</code></pre></details>"
        "<details><summary>Record: versions, hardware, sessions</summary>"
        f"<pre><code>{html.escape(record_text)}</code></pre></details>",
    )
