"""The model card: README.md beside exported weights, so that who gets them knows what they are and how to use them.

    what it is    network, what it predicts, process, data, images seen
    files         the averages, with the hashes that records of samples name
    quality       every evaluation in metrics.json, each number with its protocol
    how it was made    command, commit, versions, device, time
    how to use it

All of it is told by the run's config, record and metrics; nothing is believed that they do not say. Folders of this
machine are left out. What stands between the two marks is written anew whenever the weights are exported or scored; the
rest of the file, the licence above all, is the user's and is kept. A README without marks is not touched.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_lab.app.config.allowlist import TRUST, needs_trust
from diffusion_lab.app.config.choices import read_unchecked
from diffusion_lab.app.display import clock
from diffusion_lab.app.runs import record
from diffusion_lab.app.runs.run import RunFolder
from diffusion_lab.app.sampling.fit import describe_part
from diffusion_lab.app.scoring import scores
from diffusion_lab.files import write_atomically

CARD = "README.md"
BEGIN, END = (
    "<!-- diffusion_lab: written by the program -->",
    "<!-- diffusion_lab: end; what you add below is kept -->",
)
LICENCE = """---
# license: which one is yours to say, e.g. apache-2.0
tags: [diffusion]
library_name: diffusion_lab
---
"""
SHOWN = 24
"""Numbers shown, but that those which may be quoted are all."""


def write_card(folder: RunFolder) -> Path | None:
    """Write the card of a run's export.

    Args:
        folder: The run.

    Returns:
        The file; None where there is no export, or a README that is the user's own.
    """
    if not (folder.export / "config.yaml").is_file():
        return None
    path = folder.export / CARD
    try:
        earlier = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        earlier = f"{LICENCE}\n{BEGIN}\n{END}\n"
    before, mark, rest = earlier.partition(BEGIN)
    _, other, after = rest.partition(END)
    if not (mark and other):
        return None
    text = "\n".join(_lines(folder))
    write_atomically(path, f"{before}{BEGIN}\n{text}\n{END}{after}")
    return path


def _lines(folder: RunFolder) -> Iterator[str]:
    config, told = read_unchecked(folder.export), record.read(folder.record)
    files = _files(folder.export)
    yield f"# {config.get('name') or folder.path.name}"
    yield ""
    yield from _what(config, told, files)
    yield ""
    yield "## Files"
    yield ""
    yield "| file | weights | images seen | sha256 of the tensors |"
    yield "| --- | --- | ---: | --- |"
    for path, facts in files:
        images = facts.get("images_seen", "")
        count = f"{int(images):,}" if images.isdigit() else "?"
        yield f"| `{path.name}` | {facts.get('average', path.stem)} | {count} | `{facts.get('sha256', '?')[:16]}` |"
    yield ""
    yield "`config.yaml` rebuilds the denoiser."
    yield ""
    yield from _quality(record.read_evaluations(folder.metrics_json))
    yield ""
    yield from _made(told)
    yield ""
    yield from _use(config, files)


def _files(export: Path) -> list[tuple[Path, dict[str, str]]]:
    from diffusion_lab.app.runs.weights import metadata

    return [(path, metadata(path)) for path in sorted(export.glob("*.safetensors"))]


def _what(
    config: Mapping[str, Any], told: Mapping[str, Any], files: Sequence[tuple[Path, Mapping[str, str]]]
) -> Iterator[str]:
    method, choices = config.get("method") or {}, config.get("choices") or {}
    part = method.get("denoiser") or method.get("classifier") or {}
    kind = "denoiser of a diffusion model" if "denoiser" in method else "classifier of noisy images"
    classes, shape = config.get("num_classes"), " x ".join(map(str, config.get("shape") or []))
    parameters = _sessions(told)[-1].get("parameters")
    size = f", {parameters / 1e6:,.1f} million parameters" if isinstance(parameters, int) else ""
    yield f"A {kind}, trained with diffusion_lab."
    yield ""
    dataset = choices.get("dataset") or str((config.get("dataset") or {}).get("_target_")).rpartition(".")[2]
    yield f"* data: {dataset}, examples of shape {shape}" + (
        f", {classes} classes" if classes else ", no classes"
    )
    for name, node in (
        ("network", part.get("network")),
        ("predicts", part.get("prediction")),
        ("process", part.get("interpolant")),
        ("noise levels", config.get("schedule")),
        ("weighting", (method.get("loss") or {}).get("weighting")),
        ("distilled by", {"_target_": method["_target_"]} if "teacher" in method else None),
    ):
        if isinstance(node, Mapping):
            yield f"* {name}: `{describe_part(node)}`" + (size if name == "network" else "")
    teacher = method.get("teacher")
    if isinstance(teacher, Mapping) and teacher.get("sha256"):
        named = f"{Path(str(teacher.get('run'))).name}, {teacher.get('ema')}"
        yield f"* teacher: {named}, sha256 of its tensors `{str(teacher['sha256'])[:16]}`"
    images = {facts["images_seen"] for _, facts in files if facts.get("images_seen", "").isdigit()}
    if images:
        batch = config.get("batch_size")
        yield f"* images seen: {max(map(int, images)):,}" + (f", in batches of {batch}" if batch else "")


def _sessions(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [item for item in told.get("sessions") or [] if isinstance(item, dict)] or [{}]


def _quality(evaluations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "## Quality"
    yield ""
    chosen, more = _chosen(
        [found for found in evaluations if found.get("own", True) and found.get("records")]
    )
    rows = [(item, found) for found in chosen for item in found["records"]]
    if not rows:
        yield "Not measured yet: `python evaluate.py run=<the run>` does, and writes it here."
        return
    yield "| measure | value | images seen | by its protocol |"
    yield "| --- | ---: | ---: | --- |"
    for item, found in rows:
        images = found.get("images_seen")
        deviations = "; ".join(item.get("deviations") or []) or "yes"
        count = f"{images:,}" if isinstance(images, int) else "?"
        yield f"| {item.get('label')} | {item.get('shown')} | {count} | {_cell(deviations)} |"
    yield ""
    yield "How they were measured:"
    yield ""
    ways: dict[str, list[str]] = {}
    for item, _ in rows:
        ways.setdefault(str(item.get("conditions")), []).append(str(item.get("label")))
    yield from (f"* {', '.join(labels)}: {conditions}" for conditions, labels in ways.items())
    if more:
        yield ""
        yield f"and {more} more in metrics.json of the run"


def _chosen(evaluations: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
    """Return what a card shows: the newest by each protocol, then others while there is room; and how many not."""
    newest = list(reversed(evaluations))
    first: dict[str, Mapping[str, Any]] = {}
    for found in newest:
        if scores.quotable(found):
            first.setdefault(_kind(found), found)
    chosen, more = list(first.values()), 0
    room = SHOWN - sum(len(found["records"]) for found in chosen)
    for found in newest:
        if any(found is one for one in chosen):
            continue
        room -= len(found["records"])
        if room >= 0 or not chosen:
            chosen.append(found)
        else:
            more += len(found["records"])
    return chosen, more


def _kind(found: Mapping[str, Any]) -> str:
    """The protocol of an evaluation, and whether it is of samples: what stands before the first colon."""
    protocols = [str(item.get("conditions")).partition(":")[0] for item in found["records"]]
    return f"{found.get('samples') is not None} {sorted(set(protocols))}"


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _made(told: Mapping[str, Any]) -> Iterator[str]:
    sessions = _sessions(told)
    last = sessions[-1]
    yield "## How it was made"
    yield ""
    if told.get("command"):
        yield "```"
        yield shareable(str(told["command"]))
        yield "```"
        yield ""
    commits = dict.fromkeys(
        f"{git['commit'][:12]}{' with changes' if git.get('dirty') else ''}"
        for session in sessions
        if (git := session.get("git") or {}).get("commit")
    )
    versions = last.get("versions") or {}
    facts = {
        "commit of diffusion_lab": ", ".join(commits) or "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "device": last.get("device") or (last.get("hardware") or {}).get("cpu"),
        "time": clock(record.training_seconds(told))
        + (f" in {len(sessions)} sessions" if len(sessions) > 1 else ""),
        "seed": told.get("seed"),
        "settings": told.get("identity"),
    }
    yield from (f"* {name}: {value}" for name, value in facts.items() if value not in (None, ""))


# a path from the root, a home or a file:// on, after whatever a command line may have before one; no other URLs
LOCAL = re.compile(
    r"""(^|[=,\[{:'"( ])(?!//)(?:file://)?(?:~[\w.-]*)?/(?:[^/,\]}'"]+/)*?([^/,\]}'"]*)/?(?=$|[,\]}'"])"""
)


def shareable(command: str) -> str:
    """Return a command line without this machine's folders: of a path only its last part is kept."""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    kept = [word for word in words if not re.match(r"\+*(paths\.|run_id=|resume=)", word)]
    return shlex.join(LOCAL.sub(r"\1.../\2", word) for word in kept)


def _use(config: Mapping[str, Any], files: Sequence[tuple[Path, Mapping[str, str]]]) -> Iterator[str]:
    own, method = needs_trust(dict(config)), config.get("method") or {}
    trust = f"{TRUST}={','.join(own)} " if own else ""
    yield "## How to use it"
    yield ""
    if "classifier" in method:
        yield "```"
        guide = "guidance=classifier guidance.classifier.run=<this folder>"
        yield f"{trust}python sample.py run=<a denoiser's run> {guide}"
        yield "```"
        return
    averages = [facts.get("average", path.stem) for path, facts in files]
    yield "```"
    yield f"{trust}python sample.py run=<this folder> num_samples=64 out=samples" + (
        f"    # ema={'|'.join(averages)}" if len(averages) > 1 else ""
    )
    yield "python -m diffusion_lab.app.export <this folder> --diffusers <folder>    # where the architecture allows"
    yield "```"
    yield ""
    yield "From Python:"
    yield ""
    yield "```python"
    yield "from pathlib import Path"
    yield ""
    yield "import torch"
    yield "from diffusion_lab.app.build import load_denoiser"
    yield ""
    other = f"    # others: ema='{averages[-1]}'" if len(averages) > 1 else ""
    yield f"loaded = load_denoiser(Path('<this folder>')){other}"
    shape = ", ".join(map(str, config.get("shape") or []))
    yield f"x, logsnr = torch.randn(1, {shape}), torch.tensor([-5.0])    # noisy data of the process above"
    meant = "the student's x0_hat" if "teacher" in method else "E[x0 | x]"
    told = ""
    if scales := (method.get("denoiser") or {}).get("scales"):
        told = ", cond"
        label = "'label': torch.tensor([0]), " if config.get("num_classes") else ""
        yield f"cond = {{{label}'guidance_scale': torch.tensor([{float(scales[0])}])}}    # to {float(scales[1])}"
    yield f"x0 = loaded.denoiser(x, logsnr{told})    # {meant}"
    yield "```"
