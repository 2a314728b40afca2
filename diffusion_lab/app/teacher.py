"""The teacher of a distillation: a run named on the command line, told in plain values, read when the student is built.

    method:
      teacher: {run: <folder>, ema: <name or null>}     as typed
      teacher: {run: <absolute folder>, ema: <name>, sha256: <of the weights>}     in the student's config.yaml

    completed    data, network, process, prediction and schedule are the teacher's, unless they are chosen
    planned      the folder, the average and the hash of its weights become part of the config and of its identity
    checked      what must agree does
    node         what builds the teacher; only training asks for it

A student's run and its export name their teacher and do not need it: nothing that samples or scores builds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_lab.app.config.choices import (
    FROM_RUN,
    Completed,
    chosen_by_experiment,
    is_multirun,
    override,
    read_run,
    run_folders,
    split_override,
)
from diffusion_lab.app.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

WHERE = "method.teacher"
KEY = f"{WHERE}.run"
GROUPS = ("dataset", "model", "interpolant", "prediction", "schedule")
"""What a student takes over from its teacher's config."""
OF_DENOISER = ("_target_", "sigma_data", "scales", "finest")
PLAIN = "diffusion_lab.denoisers.NetworkDenoiser"
TOLD = ("diffusion_lab.denoisers.GuidedDenoiser", "diffusion_lab.denoisers.ShortcutDenoiser")
"""A student may be told a number more than its teacher was: what it answers means the same."""
OF_RUN = {"batch_size": "${batch_size}", "seed": "${seed}"}
"""What a data set's config takes from the run that it belongs to."""


def complete(argv: Sequence[str], conf: Sequence[Path] = ()) -> Completed:
    """Complete the command line of `train` with what the teacher it names recorded; one that names none is left alone.

    Args:
        argv: The arguments as typed, program name left out.
        conf: The folders of the config groups.

    Raises:
        UserError: If the folder is no run, or not named as it must be, the teachers of a sweep differ in what a student
            takes over, or the experiment is a recipe for other data than the teacher's and no data are named.
    """
    given = [pair for argument in argv if (pair := split_override(argument)) is not None]
    if (bare := dict(given).get(WHERE, "null")) != "null" and not bare.startswith("{"):
        raise UserError(f"{WHERE}={bare}: a teacher is named by {KEY}=<folder>")
    value = dict(given).get(KEY)
    if not value or value == "null" or "$" in value:
        return Completed(list(argv), {}, [])
    folders = run_folders(value, multirun=is_multirun(argv))
    configs = [_read(folder) for folder in folders]
    choices = configs[0].get("choices") or {}
    chosen = {split[0] for item in argv if (split := split_override(item)) and "@" not in item.split("=")[0]}
    groups = [group for group in GROUPS if group not in chosen]
    if "dataset" in groups:
        _check_experiment(dict(given).get("experiment"), choices.get("dataset"), conf)
    nodes = [_nodes(config, groups) for config in configs]
    for folder, other in zip(folders[1:], nodes[1:], strict=True):
        for group, node in nodes[0].items():
            if other.get(group) != node:
                raise UserError(
                    f"the teachers {folders[0]} and {folder} differ in their {group}: sweep apart"
                )

    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for group, node in nodes[0].items():
        # a data set says what its examples are, at the top level
        store.store(group=group, name=FROM_RUN, node=node, package="_global_", provider="teacher")
    injected = [f"{group}={FROM_RUN}" for group in nodes[0]]
    denoiser = (configs[0].get("method") or {}).get("denoiser") or {}
    told = {key: denoiser[key] for key in OF_DENOISER if denoiser.get(key) not in (None, PLAIN)}
    injected += [f"++method.denoiser.{key}={value}" for key, value in told.items()]
    user = [argument for argument in argv if split_override(argument) is not None or argument.startswith("~")]
    flags = [argument for argument in argv if argument not in user]
    quoted = [override(KEY, _plain(argument)) if _is_run(argument) else argument for argument in user]
    return Completed([*flags, *injected, *quoted], {group: choices.get(group) for group in groups}, injected)


def _check_experiment(name: str | None, data: str | None, conf: Sequence[Path]) -> None:
    """Refuse a recipe for other data than the teacher's."""
    recipe = chosen_by_experiment(name, "dataset", conf)
    if data and recipe not in (None, data):
        raise UserError(
            f"experiment={name} is a recipe for {recipe}, and the teacher's data are {data}: take another experiment, "
            f"or add dataset={data}"
        )


def _is_run(argument: str) -> bool:
    """Whether an argument names one teacher by a path that Hydra might read as something else."""
    split = split_override(argument)
    return split is not None and split[0] == KEY and Path(_plain(argument)).exists()


def _plain(argument: str) -> str:
    return argument.partition("=")[2].strip("'\"")


def _read(folder: Path) -> dict[str, Any]:
    try:
        config = read_run(folder)
    except UserError as error:
        text = str(error)
        raise UserError(f"{WHERE}.{text}" if text.startswith("run=") else f"{WHERE}: {text}") from error
    if "denoiser" not in (config.get("method") or {}):
        raise UserError(f"{KEY}={folder}: this run has no denoiser, so it can be nobody's teacher")
    return config


def _nodes(config: Mapping[str, Any], groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    nodes: dict[str, dict[str, Any]] = {
        group: {group: config[group]} for group in groups if isinstance(config.get(group), dict)
    }
    if "dataset" in nodes:
        data = {key: OF_RUN.get(key, value) for key, value in config["dataset"].items()}
        facts = {key: config[key] for key in ("shape", "num_classes") if key in config}
        nodes["dataset"] = {"dataset": data, **facts}
    return nodes


def plan(cfg: DictConfig) -> None:
    """Tell a composed config's teacher in plain values; a config without a teacher, or a planned one, is left alone.

    Raises:
        UserError: If its run or its weights are missing.
        RunError: If its checkpoint is unsafe.
    """
    from omegaconf import OmegaConf, open_dict

    method: Any = cfg.get("method")
    node: Any = method.get("teacher") if OmegaConf.is_dict(method) else None
    if not OmegaConf.is_dict(node) or not isinstance(node.get("run"), str) or node.get("sha256"):
        return
    from diffusion_lab.app.runs.weights import read_weights

    place = Path(node.run).resolve()
    try:
        _read(place)
        weights = read_weights(place, node.get("ema"))
    except UserError as error:
        text = str(error)
        raise UserError(f"{WHERE}.{text}" if text.startswith("ema=") else text) from error
    with open_dict(cfg):
        cfg.method.teacher = {"run": str(place), "ema": weights.name, "sha256": weights.sha256}


def check(cfg: DictConfig) -> None:
    """Check a composed config of `train` whose types are known to fit.

    Raises:
        UserError: If a method that needs a teacher has none, or student and teacher do not fit: the line names the
            first difference.
    """
    from omegaconf import OmegaConf

    if "teacher" not in (cfg.get("method") or {}):
        return
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    node = config["method"]["teacher"]
    if not isinstance(node, Mapping) or not node.get("sha256"):
        raise UserError(
            f"{KEY}=<folder> is needed: the run of the teacher, e.g. runs/digits/quickstart/latest"
        )
    theirs = _read(Path(node["run"]))
    for name, found, own in _facts(theirs, config):
        if found != own:
            raise UserError(
                f"{KEY}={node['run']}: its {name} is {_short(found)}, that of this run is {_short(own)}"
            )
    _check_scale(config, theirs)


def _check_scale(config: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """A student that is told the guidance scale has a teacher to be guided, and is told it when it is sampled too."""
    scales = config["method"]["denoiser"].get("scales")
    if scales is None:
        return
    guidance = config.get("guidance") or {}
    if ".Distilled" not in str(guidance):
        raise UserError(
            "guidance: this student is told its guidance scale: guidance=distilled guidance.scale=<scale>"
        )
    scale = guidance.get("scale")
    if isinstance(scale, int | float) and not scales[0] <= scale <= scales[1]:
        raise UserError(f"guidance.scale={scale}: this student learns the scales {scales[0]} to {scales[1]}")
    method = theirs.get("method") or {}
    plain = (method.get("denoiser") or {}).get("scales") is None
    if plain and (method.get("loss") or {}).get("label_dropout") == 0.0:
        raise UserError(
            f"{KEY}: this teacher was trained with method.loss.label_dropout=0 and knows no answer without a label, "
            "by which to guide"
        )


def _facts(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What must agree: the data, the process, and what the network's answer means."""
    found, own = (config["method"]["denoiser"] for config in (theirs, ours))
    facts = [(key, theirs.get(key), ours.get(key)) for key in ("shape", "num_classes")]
    data = [(config.get("dataset") or {}).get("_target_") for config in (theirs, ours)]
    facts.append(("dataset", data[0], data[1]))
    kinds = [PLAIN if part.get("_target_") in TOLD else part.get("_target_") for part in (found, own)]
    facts.append(("denoiser._target_", kinds[0], kinds[1]))
    keys = ("interpolant", "prediction", "sigma_data", *(["scales"] if "scales" in found else []))
    return facts + [(f"denoiser.{key}", found.get(key), own.get(key)) for key in keys]


def _short(value: Any) -> Any:
    """Return a value for a message: a node by the name of its class and what it is told."""
    if not isinstance(value, Mapping):
        return value.rsplit(".", 1)[-1] if isinstance(value, str) else value
    told = ", ".join(f"{key}={inner}" for key, inner in value.items() if not str(key).startswith("_"))
    return str(value.get("_target_")).rsplit(".", 1)[-1] + (f"({told})" if told else "")


def with_teacher(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the method's config with its planned teacher told as what builds it."""
    from diffusion_lab.app.stored import TARGET

    node = method.get("teacher")
    if not isinstance(node, Mapping) or "sha256" not in node:
        return dict(method)
    return {**method, "teacher": {"_target_": TARGET, "kind": "teacher", **node}}


def makes_images(method: Mapping[str, Any]) -> bool:
    """Whether what a method's config trains can be sampled: a distilled encoder takes images to noise."""
    from hydra.utils import get_object

    loss = method.get("loss")
    target = loss.get("_target_") if isinstance(loss, Mapping) else None
    return not isinstance(target, str) or bool(getattr(get_object(target), "makes_images", True))


def portable(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the method's config with no more of the teacher's folder than its name, for an export."""
    node = method.get("teacher")
    if not isinstance(node, Mapping) or not isinstance(node.get("run"), str):
        return dict(method)
    return {**method, "teacher": {**node, "run": Path(node["run"]).name}}
