"""What `--help` prints, written without Hydra: groups are folders and options are files, so it answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusion_lab.app.config.choices import GROUPS, ONLY

COMMANDS = {
    "train": [
        ("train, sample and score on real images, two minutes on a CPU", "experiment=digits/quickstart"),
        ("change anything: group=option, key=value", "experiment=digits/quickstart sampler=heun optimizer.lr=1e-3"),
        ("a grid of runs, one after the other", "-m experiment=digits/quickstart schedule=cosine,sigmoid seed=0,1"),
        ("go on with the newest run of an experiment", "experiment=digits/quickstart resume=auto"),
        ("distil it to few steps", "experiment=progressive/digits method.teacher.run=runs/digits/quickstart/latest"),
    ],
    "sample": [
        ("1,000 images from the newest quickstart", "run=runs/digits/quickstart/latest num_samples=1000"),
        ("another sampler, fewer steps", "run=runs/digits/quickstart/latest sampler=heun grid.steps=10"),
        ("stronger guidance", "run=runs/digits/quickstart/latest guidance=cfg guidance.scale=3"),
        ("fill in what is missing of test images", "run=<folder> guidance=tweedie measurement=inpaint input=test:8"),
        ("a grid of settings", "-m run=<folder> sampler=ddim,heun,dpmpp_2m grid.steps=5,10,20"),
    ],
    "evaluate": [
        ("score the newest quickstart", "run=runs/digits/quickstart/latest"),
        ("score with another sampler", "run=runs/digits/quickstart/latest sampler=heun grid.steps=10"),
        ("everything there is, by a named protocol", "run=<folder> measures=full protocol=quick2k"),
        ("two sets of images against each other", "samples=mine reference=theirs metrics=inception"),
        ("a grid of settings", "-m run=<folder> sampler=ddim,dpmpp_2m grid.steps=5,10,20"),
    ],
}  # fmt: skip

TITLES = {
    "train": "Train a diffusion model.",
    "sample": "Draw samples from a trained run or an export.",
    "evaluate": "Score a trained run, an export, or samples.",
}


def options(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Return the options of every group found under the config folders; nested groups as `paper/scale`."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/**/*.yaml"):
            group, *rest = file.relative_to(folder).with_suffix("").parts
            if group != "hydra":
                found.setdefault(group, set()).add("/".join(rest))
    return {group: sorted(names) for group, names in sorted(found.items())}


def _wrap(words: list[str], indent: int, width: int = 110) -> str:
    lines, line = [], ""
    for word in words:
        if line and len(line) + len(word) + 2 > width - indent:
            lines.append(line)
            line = ""
        line += (", " if line else "") + word
    return (",\n" + " " * indent).join([*lines, line])


def _taught(groups: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return the lines that say which methods need a teacher; none where there are no methods to choose."""
    texts = {file.stem: file.read_text() for folder in folders for file in folder.glob("method/*.yaml")}
    found = {name for name, text in texts.items() if "\nteacher:" in text}
    # and those that begin with one of them
    found |= {name for name, text in texts.items() if any(f"\n  - {other}\n" in text for other in found)}
    if "method" not in groups or not found:
        return []
    return [
        "",
        "A trained run is the teacher, method.teacher.run=<folder>, of",
        f"  {_wrap(sorted(found), 2)}",
    ]


def text(app: str, program: str, folders: Sequence[Path]) -> str:
    """Return the help page of `train`, `sample` or `evaluate`."""
    groups = options(folders)
    evaluating = {name for names in ONLY.values() for name in names}
    training = [name for name in groups if name not in evaluating]
    names = [name for name in (*GROUPS.get(app, training), *ONLY.get(app, ())) if name in groups]
    width = max((len(name) for name in names), default=0)
    rows = [f"  {name:<{width}}  {_wrap(groups[name], width + 4)}" for name in names]
    commands = [f"  # {what}\n  {program} {arguments}" for what, arguments in COMMANDS[app]]
    return "\n".join(
        [
            TITLES[app],
            "",
            f"usage: {program} [group=option] [key=value] [-m]",
            "",
            "Five commands to begin with:",
            *commands,
            "",
            "Groups and their options:",
            *rows,
            *_taught(names, folders),
            "",
            "  --cfg job            print the composed config and do nothing (--resolve: fill in interpolations)",
            "  --info defaults-tree show which files the config comes from",
            "  -m, --multirun       run every combination of comma-separated values"
            + ("; launcher= says where, sweep= which" if app == "train" else ""),
            "  --config-dir DIR     add a folder of your own config groups",
            "  --hydra-help         everything else that Hydra knows",
            f'  Tab completion:      eval "$({program} -sc install=bash)"     (zsh and fish likewise)',
            "  DIFFUSION_LAB_TRACEBACK=1 in the environment shows the full trace of an error.",
            "",
        ]
    )
