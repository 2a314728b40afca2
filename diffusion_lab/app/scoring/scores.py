"""metrics.json: every evaluation of a run, each with the command, the versions and the protocol; and metrics.md.

    {"evaluations": [{"created", "run", "images_seen", "samples", "command", "records": [...], "versions", "git"}, ...]}

An evaluation made again takes the place of its predecessor: the same measures, by the same protocol, of the same
samples or weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_lab.app.runs import record
from diffusion_lab.files import write_atomically

HEAD = ["run", "measure", "value", "weights", "sampler", "NFE", "how"]


def evaluation(
    *,
    run: str,
    images_seen: int | None,
    samples: str | None,
    config: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    own: bool = True,
) -> dict[str, Any]:
    """Return an evaluation with all that belongs to it.

    Args:
        run: What was evaluated.
        images_seen: Training examples behind the weights; None where it is not known.
        samples: Where the samples are; None where a model was judged without.
        config: The resolved config.
        records: The values, with `label`, `shown` and `conditions`.
        own: Whether the run drew the samples; else the values are not its scores.
    """
    return {
        "created": record.now(),
        "run": run,
        "own": own,
        "images_seen": images_seen,
        "samples": samples,
        "command": record.command("evaluate", config.get("overrides") or []),
        "records": [dict(item) for item in records],
        "versions": record.versions(),
        "git": record.git_state(),
    }


def append(out: Path, made: Mapping[str, Any]) -> Path:
    """Add an evaluation to the file in a folder, in place of an equal earlier one.

    Args:
        out: The folder, or the name of the file, *.json.
        made: See `evaluation`.

    Returns:
        The file.
    """
    file = out if out.suffix == ".json" else out / "metrics.json"
    kept = [item for item in record.read_evaluations(file) if _what(item) != _what(made)]
    everything = [*kept, dict(made)]
    write_atomically(file, json.dumps({"evaluations": everything}, indent=2, default=str) + "\n")
    write_atomically(file.with_suffix(".md"), markdown(everything))
    return file


def _what(item: Mapping[str, Any]) -> tuple[Any, ...]:
    """What was measured, on what."""
    measured = [(one.get("label"), one.get("conditions")) for one in item.get("records", [])]
    return item.get("images_seen"), item.get("samples"), str(measured)


def quotable(made: Mapping[str, Any]) -> bool:
    """Whether every value of an evaluation was measured by its protocol."""
    return not any(" | DEVIATES: " in str(item.get("conditions", "")) for item in made["records"])


def best(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the evaluation to show first: by its protocol if there is one, then of the most images, then the newest.

    Args:
        evaluations: Evaluations, oldest first; those of samples that the run did not draw are passed over.
    """
    ranked = [
        (quotable(made), _count(made), k) for k, made in enumerate(evaluations) if made.get("own", True)
    ]
    return evaluations[max(ranked)[2]] if ranked else None


def _count(made: Mapping[str, Any]) -> int:
    return max((int(item.get("of_n") or item.get("n") or 0) for item in made["records"]), default=0)


def number(item: Mapping[str, Any], key: str = "value") -> str:
    """Return `value` or `real` of a record as text, the value with its spread where it has one.

    Args:
        item: The record, as in metrics.json; the number is there.
        key: Which number.
    """
    # records older than the key are shares where they are accuracies
    share = item.get("percent", item.get("metric") == "accuracy")
    found = [item[key]]
    if key == "value" and item.get("spread") is not None:
        found.append(item["spread"])
    return " ± ".join(f"{100 * value:.2f} %" if share else f"{value:.4g}" for value in found)


def markdown(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Return all numbers as a Markdown table, a row a number, with the line that says how each was measured."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- | --- | ---: | --- | --- | ---: | --- |"]
    for made in evaluations:
        for item in made["records"]:
            source = item.get("source") or {}
            cells = [
                made["run"],
                item["label"],
                item["shown"],
                source.get("ema", "–"),
                str(source.get("sampler", "–")).removesuffix("()"),
                "?" if source.get("nfe") is None else source["nfe"],
                item["conditions"],
            ]
            lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
