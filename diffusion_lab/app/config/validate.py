"""Check a composed config before anything heavy is imported.

Hydra composes whatever the files say: a misspelt argument lives until the constructor is called, seconds or hours
later. Here every key is looked at first. Top-level keys are those of a schema; a node with a `_target_` must name
something that exists and pass it arguments that it accepts, all that it needs, of types that fit; nothing may be
missing (`???`); every interpolation must lead somewhere. The first trouble found becomes one line that names the full
key.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from diffusion_lab.app.config import schema as schemas
from diffusion_lab.app.config.signatures import TargetNotFound, resolve, signature
from diffusion_lab.app.config.values import describe, fits
from diffusion_lab.app.errors import UserError, did_you_mean, one_line

# what Hydra reads in a node besides the arguments
HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
# keys the app adds to a composed config, see `cli.py`
APP_KEYS = {"choices", "overrides"}


def validate(cfg: DictConfig, schema: type) -> None:
    """Check a composed, unresolved config.

    Args:
        cfg: The config, Hydra's own node left out.
        schema: A dataclass of `schema.py`.

    Raises:
        UserError: At the first trouble; one line.
    """
    _known(cfg, schema, "")
    _resolves(cfg, "", cfg)
    _typed(schema, cfg, "")
    _nodes(cfg, "")


def drop_absent_parts(cfg: DictConfig, groups: Mapping[str, Sequence[str]], overrides: Sequence[str]) -> None:
    """Drop settings of what was not chosen, as long as the user himself did not name them.

    An experiment sets the intervals of its callbacks; `callbacks=none` on top of it leaves these settings without an
    object to belong to. That is no mistake, as long as the part exists: so it is with callbacks, loggers, averages and
    modifiers. An experiment sets arguments of its schedule, too, which another `schedule=` on the command line may not
    have. And it, or `debug=fast`, sets the number of steps of a grid, whose levels may be named one by one.

    Args:
        cfg: The composed config; changed in place.
        groups: The options of every group.
        overrides: The user's overrides.

    Raises:
        UserError: If the settings are of a part that does not exist, or were given on the command line.
    """
    for group in ("callbacks", "logger", "averages", "modifiers"):
        for name in [str(name) for name in _children(cfg.get(group) or OmegaConf.create({}))]:
            node = cfg[group][name]
            if not isinstance(node, DictConfig) or "_target_" in node:
                continue
            where = f"{group}.{name}"
            if name not in groups.get(group, ()):
                tail = did_you_mean(name, set(groups.get(group, ())) - {"default", "none"})
                raise UserError(f"{where}: nothing of this name in the group '{group}'{tail}")
            for override in overrides:
                if override.lstrip("+~").startswith(f"{where}."):
                    raise UserError(f"{override}: '{name}' is not among the {group} chosen")
            with open_dict(cfg):
                del cfg[group][name]
    named = {override.lstrip("+~").partition("=")[0] for override in overrides}
    for group in _children(cfg):
        node = cfg._get_node(group)
        if not isinstance(node, DictConfig) or node._is_none() or "_target_" not in node:
            continue
        for key in [str(key) for key in _children(node)]:
            # an experiment's arguments of the option that stood here before
            stale = group in named or (group, key) == ("grid", "steps")
            if stale and key not in HYDRA_KEYS and f"{group}.{key}" not in named and not _takes(node, key):
                with open_dict(cfg):
                    del cfg[group][key]


def _takes(node: DictConfig, name: str) -> bool:
    """Whether the target of a node has an argument; one that does not exist is for `check_node` to tell."""
    try:
        definition = resolve(str(node.get("_target_")))
    except TargetNotFound:
        return True
    accepted = signature(definition) if definition is not None else None
    return accepted is None or accepted.open or name in accepted.parameters


def _known(node: DictConfig, schema: type, prefix: str) -> None:
    """Raise unless the keys of a node are exactly the fields of a schema."""
    names = schemas.keys(schema)
    given = [str(key) for key in _children(node)]
    for key in given:
        if key not in names and not (key in APP_KEYS and not prefix):
            raise UserError(f"{_join(prefix, key)}: no such key{did_you_mean(key, names)}")
    for name in names:
        if name not in given:
            raise UserError(f"{_join(prefix, name)}: missing from the config")


def _join(prefix: str, key: object) -> str:
    return f"{prefix}.{key}" if prefix else str(key)


def _children(node: DictConfig | ListConfig) -> list[Any]:
    return list(node.keys()) if isinstance(node, DictConfig) else list(range(len(node)))


def _resolves(node: DictConfig | ListConfig, prefix: str, root: DictConfig) -> None:
    """Raise at the first value that is missing or whose interpolation leads nowhere."""
    for key in _children(node):
        full = _join(prefix, key)
        raw = node._get_node(key)
        if OmegaConf.is_missing(node, key):
            raise UserError(f"{full}: a value is needed; add {full}=<value> to the command line")
        try:
            value = node[key]
        except InterpolationKeyError as error:
            wanted = _interpolated(str(getattr(raw, "_value", lambda: "")()))
            if wanted.partition(".")[0] == "measurement" and "measurement" not in root:
                raise UserError(
                    f"{full}: sampling a posterior needs measurement= and input=, which only sample.py has"
                ) from error
            tail = did_you_mean(wanted, all_keys(root), limit=0) if wanted else ""
            reason = f"'${{{wanted}}}' leads nowhere" if wanted else one_line(str(error))
            raise UserError(f"{full}: {reason}{tail}") from error
        except OmegaConfBaseException as error:
            raise UserError(f"{full}: {one_line(str(error).splitlines()[0])}") from error
        # a node reached through an interpolation is checked where it stands
        if OmegaConf.is_config(value) and not OmegaConf.is_interpolation(node, key):
            _resolves(value, full, root)


def _interpolated(text: str) -> str:
    """Return the key inside a plain `${a.b}`, or an empty string."""
    inner = text.strip().removeprefix("${").removesuffix("}")
    return inner if text.strip().startswith("${") and "$" not in inner and ":" not in inner else ""


def all_keys(node: DictConfig, prefix: str = "") -> list[str]:
    """List every full key of a config, interpolations not followed."""
    found: list[str] = []
    for key in _children(node):
        full = _join(prefix, key)
        found.append(full)
        inner = node._get_node(key)
        if isinstance(inner, DictConfig) and not inner._is_none() and not inner._is_missing():
            if not inner._is_interpolation():
                found += all_keys(inner, full)
    return found


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _typed(schema: type, cfg: DictConfig, prefix: str) -> None:
    """Check the fields that a schema types."""
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        hint, full = hints[item.name], _join(prefix, item.name)
        if hint is Any:
            continue
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            node = cfg[item.name]
            if not isinstance(node, DictConfig):
                raise UserError(f"{full}: a group of keys is needed, got {node!r}")
            _known(node, hint, full)
            _typed(hint, node, full)
            continue
        value = _plain(cfg[item.name])
        if not _matches(hint, value):
            wanted = inspect.formatannotation(hint).replace("None", "null")
            raise UserError(f"{full}: expects {wanted}, got {value!r}")
        schemas.check_values(schema, item.name, value)


def _matches(hint: Any, value: Any) -> bool:
    """Whether a plain value is of a simple runtime type: scalars, unions, lists."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return value is None
    if origin is list:
        return isinstance(value, list) and all(_matches(inner[0], item) for item in value)
    if inner:
        return any(_matches(part, value) for part in inner)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def _nodes(node: DictConfig | ListConfig, prefix: str) -> None:
    """Check every node with a `_target_`, outermost first."""
    if isinstance(node, DictConfig) and "_target_" in node:
        check_node(node, prefix)
    for key in _children(node):
        if OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig | ListConfig):
            _nodes(value, _join(prefix, key))


def check_node(node: DictConfig, where: str) -> None:
    """Check one node against the signature of its `_target_`.

    Args:
        node: The node; interpolations are resolved for the comparison of types.
        where: Its full key, for the message.

    Raises:
        UserError: If the target does not exist, an argument is unknown or missing, or a value cannot fit.
    """
    target = node["_target_"]
    if not isinstance(target, str):
        raise UserError(f"{where}._target_: a dotted path is needed, got {target!r}")
    try:
        definition = resolve(target)
    except TargetNotFound as error:
        tail = did_you_mean(error.missing, error.options)
        found = f"'{target}' does not exist: no '{error.missing}' in {error.holder}"
        raise UserError(f"{where}._target_: {found}{tail}") from None
    accepted = signature(definition) if definition is not None else None
    if definition is None or accepted is None:
        return
    given = [name for name in map(str, _children(node)) if name not in HYDRA_KEYS]
    for name in given:
        parameter = accepted.parameters.get(name)
        if parameter is None:
            if accepted.open:
                continue
            tail = did_you_mean(name, accepted.parameters)
            raise UserError(f"{where}.{name}: {definition.name} has no argument '{name}'{tail}")
        value = _plain(node[name])
        if value is None and OmegaConf.is_interpolation(node, name):
            continue  # such as ${paths.run}, which the app fills in later
        if parameter.annotation is not None and not fits(parameter.annotation, value):
            wanted = describe(parameter.annotation).replace("None", "null")
            raise UserError(f"{where}.{name}: {definition.name} expects {wanted}, got {_shown(value)}")
    if node.get("_partial_") or "_args_" in node:
        return
    for parameter in accepted.parameters.values():
        if parameter.required and parameter.name not in given:
            raise UserError(f"{where}.{parameter.name}: {definition.name} needs this argument")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a node ({value['_target_']})" if "_target_" in value else "a group of keys"
    return "null" if value is None else repr(value)
