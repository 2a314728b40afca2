"""Sampling defaults to what the run was trained with: the command line is completed before Hydra reads it.

`sample.py run=<folder> sampler=heun grid.steps=20` means: take sampler, grid, guidance and schedule as the run's
`config.yaml` recorded them, except the groups named here, and lay the single values on top. Hydra cannot know a run
folder, so each recorded node becomes an option named `from_run` of its group, held in memory, and `group=from_run` goes
in front of the user's overrides for every group that he did not choose himself.

With several runs in one sweep the recorded nodes must agree, for Hydra composes the options once for all jobs.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_lab.app.config.allowlist import check_targets
from diffusion_lab.app.errors import UserError, similar_folder

FROM_RUN = "from_run"
SAMPLING = ("schedule", "sampler", "grid", "guidance", "modifiers")
GROUPS = {"sample": (*SAMPLING, "measurement"), "evaluate": (*SAMPLING, "metrics")}
"""The groups that a run records."""
ONLY = {"sample": (), "evaluate": ("measures", "protocol")}
"""The groups that only an app has."""
FACTS = ("shape", "num_classes")


@dataclass(frozen=True)
class Completed:
    """A completed command line.

    Attributes:
        argv: The arguments for Hydra.
        recorded: For each group, the option that the run had chosen: what `from_run` stands for.
        injected: The overrides put in front of the user's.
    """

    argv: list[str]
    recorded: dict[str, Any]
    injected: list[str]


def split_override(argument: str) -> tuple[str, str] | None:
    """Split `key=value` of an override, the marks + ++ ~ and a package left out of the key; None if it is none."""
    if argument.startswith("-") or "=" not in argument:
        return None
    key, value = argument.split("=", 1)
    return key.lstrip("+~").split("@")[0], value


def top_key(word: str) -> str:
    """Return the first part of a typed word's key: `optimizer` of `+optimizer.lr=1`."""
    return word.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]


def typed(words: Iterable[Any] | None, keys: Container[str]) -> list[str]:
    """Return the typed words that set one of `keys`, or something in it."""
    return [str(word) for word in words or () if top_key(str(word)) in keys]


def is_multirun(argv: Sequence[str]) -> bool:
    """Whether the command line asks for a sweep."""
    return any(argument in ("-m", "--multirun") for argument in argv) or "hydra.mode=MULTIRUN" in argv


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _quote(text: str) -> str:
    """Quote a path for Hydra's grammar, in which = , : and blanks mean something and 2025_01 is a number."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def override(key: str, value: str) -> str:
    """Return `key=value` so that Hydra reads the very text back: quoted where its grammar would take it for more."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    plain = f"{key}={value}"
    try:
        parsed = OverridesParser.create().parse_override(plain)
        if not parsed.is_sweep_override() and parsed.value() == value:
            return plain
    except HydraException:
        pass
    return f"{key}={_quote(value)}"


def plain_override(override: str) -> str:
    """Return an override without the quotes that we put around a run folder for Hydra."""
    key, mark, value = override.partition("=")
    return f"run={_unquote(value).replace(chr(92) + chr(39), chr(39))}" if mark and key == "run" else override


def run_folders(value: str, *, multirun: bool) -> list[Path]:
    """Return the folders that `run=<value>` names; several, parted by commas, in a sweep."""
    whole = _unquote(value)
    if Path(whole).exists() or not multirun or "," not in whole:
        return [Path(whole)]
    return [Path(_unquote(part.strip())) for part in whole.split(",")]


def read_run(folder: Path) -> dict[str, Any]:
    """Read the `config.yaml` of a run or export folder, in order to build what it names.

    Raises:
        UserError: If the folder or the file is missing, unreadable, or names targets that are not allowed.
    """
    config = read_unchecked(folder)
    check_targets(config, str(folder / "config.yaml"))
    return config


def read_unchecked(folder: Path) -> dict[str, Any]:
    """Read the `config.yaml` of a run or export folder as plain data, to compare it, or because we just wrote it.

    Raises:
        UserError: If the folder or the file is missing or unreadable.
    """
    if not folder.is_dir():
        raise UserError(f"run={folder}: no such folder{similar_folder(folder)}")
    file = folder / "config.yaml"
    if not file.is_file():
        newest = folder / "latest"
        tail = f"; did you mean '{newest}'?" if (newest / file.name).is_file() else ""
        raise UserError(f"run={folder}: not a run folder or an export, it has no config.yaml{tail}")
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        # OmegaConf's loader, because YAML's own reads 1e-3 as a string
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: a mapping is needed, this is a {type(config).__name__}")
    return {str(key): value for key, value in config.items()}


def _recorded(config: dict[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    nodes = {group: config[group] for group in groups if isinstance(config.get(group), dict)}
    grid = nodes.get("grid")
    if grid is not None and "schedule" in grid and grid["schedule"] == config.get("schedule"):
        # let a schedule chosen now reach the recorded grid
        nodes["grid"] = {**grid, "schedule": "${schedule}"}
    return nodes


def _without_run(argv: Sequence[str], chosen: set[str]) -> Completed:
    """Two sets against each other: nothing is recorded, so what would have been must be said."""
    if not {"metrics", "protocol"} & chosen:
        raise UserError(
            "metrics=<features> is needed where no run= says which, e.g. metrics=inception or metrics=pixels"
        )
    if not {"reference", "protocol"} & chosen:
        raise UserError("reference=<folder or file> is needed where no run= says which data are meant")
    return Completed(list(argv), {}, [])


def _defaults(group: str, name: str | None, conf: Sequence[Path]) -> list[Any]:
    """Return the defaults list of an option, from the first folder that has it; nothing where none does."""
    import yaml

    for file in (folder / group / f"{name}.yaml" for folder in conf):
        if name and file.is_file():
            return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("defaults") or []
    return []


def chosen_by_protocol(name: str | None, conf: Sequence[Path]) -> set[str]:
    """Return the groups that a protocol chooses, in place of what a run recorded.

    Args:
        name: Name of the protocol; None for none.
        conf: The folders of the config groups.
    """
    defaults = _defaults("protocol", name, conf)
    words = [str(key).split() for item in defaults if isinstance(item, dict) for key in item]
    return {parts[-1].lstrip("/") for parts in words if parts[0] == "override"}


def chosen_by_experiment(name: str | None, group: str, conf: Sequence[Path]) -> str | None:
    """Return the option of a group that an experiment chooses, or one that it builds on; None if it leaves it alone.

    Args:
        name: Name of the experiment; None for none.
        group: Name of the group.
        conf: The folders of the config groups.
    """
    defaults = _defaults("experiment", name, conf)
    for item in defaults:
        if isinstance(item, dict) and f"override /{group}" in item:
            return str(item[f"override /{group}"])
    built_on = [item for item in defaults if isinstance(item, str) and item != "_self_"]
    found = (chosen_by_experiment(item, group, conf) for item in built_on)
    return next((option for option in found if option is not None), None)


def complete(app: str, argv: Sequence[str], conf: Sequence[Path] = ()) -> Completed:
    """Complete the command line of `sample` or `evaluate` with what the run recorded.

    Args:
        app: "sample" or "evaluate".
        argv: The arguments as typed, program name left out.
        conf: The folders of the config groups.

    Raises:
        UserError: If `run=` is missing, its folder is no run, or several runs disagree.
    """
    given = [pair for argument in argv if (pair := split_override(argument)) is not None]
    user = [argument for argument in argv if split_override(argument) is not None or argument.startswith("~")]
    value = dict(given).get("run")
    if not value or value == "null":
        if app == "evaluate" and "samples" in dict(given):
            return _without_run(argv, {split[0] for split in given})
        if app == "evaluate" and "reference" in dict(given):
            raise UserError(
                "samples=<folder or file> is needed to score without a run, or run=<folder> with one"
            )
        bare = "; without a run: samples=<one set> reference=<another> metrics=<features>"
        raise UserError(
            f"run=<folder> is needed, e.g. python {app}.py run=runs/digits/quickstart/latest"
            + (bare if app == "evaluate" else "")
        )
    multirun = is_multirun(argv)
    folders = run_folders(value, multirun=multirun)
    configs = [read_run(folder) for folder in folders]
    # guidance@guidance.inner=cfg chooses what a guidance builds on, not the guidance
    chosen = {split[0] for item in argv if (split := split_override(item)) and "@" not in item.split("=")[0]}
    chosen |= chosen_by_protocol(dict(given).get("protocol"), conf)
    groups = [group for group in GROUPS[app] if group not in chosen]

    nodes = _recorded(configs[0], groups)
    facts = {key: configs[0][key] for key in FACTS if key in configs[0]}
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        other = {**_recorded(config, groups), **{key: config[key] for key in FACTS if key in config}}
        for key, node in {**nodes, **facts}.items():
            if other.get(key) != node:
                advice = f"; choose one for all with {key}=<option>" if key in groups else ""
                raise UserError(f"the runs {folders[0]} and {folder} differ in their {key}{advice}")

    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for group, node in nodes.items():
        store.store(group=group, name=FROM_RUN, node=node, provider="run")
    injected = [f"{group}={FROM_RUN}" for group in nodes]
    injected += [f"{key}={_value(fact)}" for key, fact in facts.items() if key not in chosen]
    # the student of N steps is for N steps
    steps = student_steps(dict(given).get("ema", ""))
    if steps is not None and "grid.steps" not in dict(given) and "steps" in (nodes.get("grid") or {}):
        injected.append(f"grid.steps={steps}")
    quoted = ",".join(_quote(str(folder)) for folder in folders)
    flags = [argument for argument in argv if argument not in user]
    rest = [f"run={quoted}" if argument.startswith("run=") else argument for argument in user]
    choices = configs[0].get("choices") or {}
    return Completed([*flags, *injected, *rest], {group: choices.get(group) for group in nodes}, injected)


def student_steps(ema: str) -> int | None:
    """Return N of weights called `steps_<N>`, the student of N steps that a run of halvings kept; else None."""
    found = re.fullmatch(r"steps_([0-9]+)", ema)
    return int(found[1]) if found else None


def _value(fact: Any) -> str:
    if isinstance(fact, list):
        return "[" + ",".join(_value(item) for item in fact) + "]"
    return "null" if fact is None else str(fact)
