"""Hydra's and OmegaConf's exceptions, told in one line that names the key and the nearest valid one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from diffusion_lab.app.config.choices import FROM_RUN
from diffusion_lab.app.config.help import options
from diffusion_lab.app.errors import UserError, did_you_mean, nearest, one_line, similar_folder

Keys = Callable[[], list[str]]
# what other code bases call it
ELSEWHERE = {
    "cfg_scale": "guidance.scale",
    "epochs": "max_images",
    "gpus": "trainer.devices",
    "guidance_scale": "guidance.scale",
    "iterations": "max_images",
    "learning_rate": "optimizer.lr",
    "max_steps": "max_images",
    "num_inference_steps": "grid.steps",
}


def check_options(arguments: Sequence[str], folders: Sequence[Path]) -> None:
    """Check `group=option[,option...]` overrides against the files, before anything runs.

    Hydra finds a misspelt option of a sweep only when its job comes up, after the jobs before it have run.

    Raises:
        UserError: If an option does not exist.
    """
    groups = options(folders)
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        group = key.split("@")[0]
        names = groups.get(group)
        if names is None or not value or not re.fullmatch(r"[\w/,. \[\]-]+", value):
            continue
        for word in value.strip("[]").split(","):
            word = word.strip().removesuffix(".yaml")
            if word and word not in (*names, FROM_RUN, "null"):
                raise UserError(f"{argument}: {_no_option(group, word, names)}")


def check_flags(arguments: Sequence[str], folders: Sequence[Path]) -> None:
    """Check everything that begins with a dash against the options Hydra has, spelt out in full.

    Hydra's parser takes any beginning of an option, so `--experiment=x` would mean its `--experimental-rerun=x`.

    Raises:
        UserError: If an option does not exist, or lacks its value.
    """
    if not any(argument.startswith("-") for argument in arguments):
        return
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    actions = parser._option_string_actions
    rest = iter([*arguments, ""])
    for argument in rest:
        name, mark, _ = argument.partition("=")
        if not argument.startswith("-"):
            continue
        if name in actions and not (mark and actions[name].nargs == 0):
            if not mark and actions[name].nargs is None:
                next(rest, None)
            continue
        word = argument.lstrip("-")
        if not mark and word in options(folders):
            following = next(rest)
            word = f"{word}={following or '<option>'}"
            mark = "="
        if mark:
            raise UserError(f"{argument}: settings have no dashes; did you mean {word}?")
        known = [option for option in actions if option.startswith("--")]
        raise UserError(
            f"{argument}: no such option{did_you_mean(argument, known, limit=0) or '; see --help'}"
        )

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(list(arguments))


def check_resume(arguments: Sequence[str]) -> None:
    """Check `resume=` before anything heavy is imported.

    Raises:
        UserError: If it names neither a folder nor `auto`.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        value = value.strip("'\"")
        if key == "resume" and value not in ("auto", "null", "") and "," not in value and "$" not in value:
            if not Path(value).is_dir():
                tail = similar_folder(Path(value)) or did_you_mean(value, ["auto"], limit=0)
                raise UserError(f"{argument}: no such folder{tail}")


def check_blanks(arguments: Sequence[str]) -> None:
    """Check that no blank parts a list: the shell takes what is behind it for another word.

    Raises:
        UserError: If a word ends in a comma, or the next one begins with one.
    """
    words = list(arguments)
    for place, word in enumerate(words):
        if "=" not in word or word.startswith("-"):
            continue
        list_of = [word]
        for following in words[place + 1 :]:
            goes_on = list_of[-1].endswith(",") or following.startswith(",")
            if not goes_on or "=" in following or following.startswith("-"):
                break
            list_of.append(following)
        if len(list_of) > 1:
            raise UserError(f"{' '.join(list_of)}: a list has no blanks: {''.join(list_of)}")
        if word.endswith(",") and "[" not in word:
            raise UserError(f"{word}: a value is missing behind the comma")


def check_sweep(arguments: Sequence[str], *, multirun: bool) -> None:
    """Check what is said about a sweep before Hydra plans it.

    Args:
        arguments: The command line.
        multirun: Whether it asks for a sweep.

    Raises:
        UserError: If a plugin is missing, a sweep is set up but not asked for, or torchrun or srun started several
            processes: each would plan the sweep for itself.
    """
    from diffusion_lab.app.launch import started_by_others
    from diffusion_lab.app.sweep.settings import PLUGINS, check_plugins

    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        group = key.partition(".")[0]
        if group not in PLUGINS or argument.startswith("-"):
            continue
        if not multirun:
            raise UserError(f"{argument}: this is for a sweep; add --multirun")
        if key == group:
            if "," in value:
                raise UserError(f"{argument}: a sweep has one {group}")
            check_plugins({group: value})
    if multirun and started_by_others():
        raise UserError(
            "--multirun under torchrun or srun: each process would plan a sweep of its own; start it once, "
            "and let every job start its processes: trainer=ddp trainer.devices=<n>"
        )


def _no_option(group: str, option: str, names: Sequence[str]) -> str:
    return f"no option '{option}' in group '{group}'{did_you_mean(option, names)}"


def unknown_key(key: str, override: str, folders: Sequence[Path], known: Sequence[str]) -> str:
    """Return the line for an override whose key is neither a group nor a key of the config.

    Args:
        key: The key, marks and package left out.
        override: The override as typed.
        folders: The config folders, for the groups.
        known: Every full key of the config.
    """
    if key == "measurement" and key not in known:
        return f"{override}: only sample.py samples a posterior"
    parent, _, last = key.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    if parent and siblings:
        siblings = [name for name in siblings if not name.startswith("_")]
        another = f"; another is {parent}=<option>" if parent in options(folders) else ""
        if not siblings:
            return f"{override}: no key '{last}' in '{parent}', which has no settings{another}"
        if (parent, last) == ("grid", "steps"):
            return f"{override}: this grid has its levels told one by one, {', '.join(siblings)}{another}"
        return f"{override}: no key '{last}' in '{parent}'{did_you_mean(last, siblings)}"
    if parent:
        guess = nearest(parent, {name.rpartition(".")[0] for name in known} - {""})
        full = f"{guess}.{last}" if guess else ""
        tail = f"; did you mean '{full}'?" if full in known else did_you_mean(key, known, limit=0)
        return f"{override}: no key '{key}'{tail}"
    guess = nearest(key, {*options(folders), *siblings})
    if guess is None:
        deeper = [name for name in known if name.rpartition(".")[2] == key or name == ELSEWHERE.get(key)]
        guess = min(deeper, key=lambda name: (name.count("."), name), default=None)
    tail = f"; did you mean '{guess}'?" if guess else "; --help lists the groups, --cfg job every key"
    return f"{override}: no group or key '{key}'{tail}"


def translate(
    error: BaseException, overrides: Sequence[str], folders: Sequence[Path], keys: Keys
) -> str | None:
    """Return one line for a mistake of the user's, or None for a defect of ours.

    Args:
        error: What was raised.
        overrides: The overrides of the command line, to find the one at fault.
        folders: The config folders, for the groups and their options.
        keys: Gives every full key of the config composed without single values; called only when needed.
    """
    from hydra import errors as hydra_errors
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if is_for_user(error) or isinstance(error, YAMLError):
        return one_line(str(error))
    if isinstance(error, hydra_errors.InstantiationException):
        return _instantiation(error)
    if isinstance(error, hydra_errors.OverrideParseException):
        return _malformed(error.override, str(error))
    if isinstance(error, hydra_errors.MissingConfigException):
        return _missing(str(error.missing_cfg_file or ""), str(error), folders)
    if isinstance(error, hydra_errors.HydraException | OmegaConfBaseException):
        return _composition(error, overrides, folders, keys)
    return None


def _malformed(override: str, text: str) -> str:
    if "=" not in override:
        return f"{override}: an override reads key=value (or ~key to drop one)"
    return f"{override}: malformed override: {one_line(text.split(chr(10) + 'See ')[0])}"


def _missing(missing: str, text: str, folders: Sequence[Path]) -> str:
    """Tell that a file named by a defaults list or the command line is not there."""
    from diffusion_lab.app.sweep.settings import EXTRA

    if missing.startswith(("hydra/launcher/", "hydra/sweeper/")):
        return f"{missing.removeprefix('hydra/')} needs a plugin of Hydra's that is not installed: {EXTRA}"
    groups = options(folders)
    group, _, option = missing.partition("/")
    if group in groups and option:
        return f"{group}={option}: {_no_option(group, option, groups[group])}"
    return f"{missing}: no such config{did_you_mean(group, groups)}" if option else one_line(text)


def _composition(error: BaseException, overrides: Sequence[str], folders: Sequence[Path], keys: Keys) -> str:
    """Tell why Hydra or OmegaConf refused an override or a defaults list."""
    text, cause = str(error), str(error.__cause__ or "")
    if several := re.match(r"Ambiguous value for argument '(([^=]+)=(.*))'", text):
        whole, key, value = several.groups()
        return f"{whole}: several values are a sweep, add --multirun; one value that is a list: '{key}=[{value}]'"
    if taken := re.search(r"An item is already at '([^']+)'", text):
        plain = next((item for item in overrides if item.startswith(f"+{taken[1]}=")), f"+{taken[1]}=")
        return f"{plain}: '{taken[1]}' exists already; write {plain.lstrip('+')} to change it"
    if refused := re.search(r"Could not (?:override|delete from config\.) ?'([^']+)'", text):
        override = next((item for item in overrides if item.lstrip("+~").split("=")[0] == refused[1]), None)
        if "@" in refused[1]:
            return _no_place(refused[1], override or refused[1], overrides, folders)
        if "is not in struct" in cause or "No match in the defaults list" in text or "delete" in refused[0]:
            return unknown_key(refused[1].split("@")[0].lstrip("/"), override or refused[1], folders, keys())
        return f"{override or refused[1]}: {one_line((cause or text).splitlines()[0])}"
    head, tail = one_line(text), one_line(cause.splitlines()[0]) if cause else ""
    return head if tail in head else f"{head}: {tail}"


def _no_place(key: str, override: str, overrides: Sequence[str], folders: Sequence[Path]) -> str:
    """Tell why `group@place=option` was refused: the file chosen has no such place in its defaults list."""
    group, _, place = key.partition("@")
    holder = place.partition(".")[0]
    # the last one wins, and may be a list of a sweep
    option = next(
        (w for word in reversed(overrides) if (w := word.removeprefix(f"{holder}=")) != word), "none"
    )
    if option == FROM_RUN:
        return f"{override}: the {holder} that the run recorded is taken as it is; name it, {holder}=<option>"
    files = [file for folder in folders if (file := folder / holder / f"{option}.yaml").is_file()]
    text = files[0].read_text(encoding="utf-8") if files else ""
    places = [f"{holder}.{name}" for name in re.findall(rf"^\s*-\s*/{group}@(\w+)\s*:", text, re.MULTILINE)]
    if not places:
        return f"{override}: {holder}={option} builds on no other {group}"
    return f"{override}: no such place in {holder}={option}{did_you_mean(place, places)}"


def is_for_user(error: BaseException) -> bool:
    """Whether an error's message is written for the user: `UserError`, and the errors of training and of data.

    The latter two are known by name, for their packages pull in torch and we may be here before that.
    """
    return any(kind.__name__ in {"UserError", "RunError", "DataError"} for kind in type(error).__mro__)


def _instantiation(error: BaseException) -> str | None:
    """Tell which object refused its arguments, in its own words. A defect deeper inside keeps its trace."""
    cause = error.__cause__
    place = re.search(r"full_key: (\S+)", str(error))
    where = f"{place.group(1)}: " if place else ""
    if cause is not None and is_for_user(cause):
        return one_line(str(cause))
    if cause is None or isinstance(cause, ValueError | TypeError | OSError | LookupError | ImportError):
        return one_line(f"{where}{cause if cause is not None else error}")
    return None
