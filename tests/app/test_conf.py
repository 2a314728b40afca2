"""Every file of every group composes, is valid, is complete, and builds; a misspelt key in any of them is an error."""

from functools import cache
from pathlib import Path

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from diffusion_lab.app.config.help import options
from diffusion_lab.app.config.schema import SCHEMAS
from diffusion_lab.app.config.signatures import resolve, signature
from diffusion_lab.app.config.validate import HYDRA_KEYS, validate
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.session import conf_folder
from diffusion_lab.samplers.grids import FittedGrid

CONF = conf_folder()
GROUPS = options([CONF])
FILES = [(group, option) for group, names in GROUPS.items() for option in names]
# what some options need beside them
COMPANY = {
    ("dataset", "image_folder"): ["dataset.root=somewhere"],
    ("dataset", "latents"): ["dataset.root=somewhere"],
    ("dataset", "shards"): ["dataset.root=somewhere"],
    ("dataset", "shards_stream"): ["dataset.urls='https://host/train-{0..9}.tar'"],
    ("dataset", "toy"): ["model=mlp"],
    ("model", "mlp"): ["dataset=toy"],
    ("model", "unet_mnist"): ["dataset=mnist"],
    ("model", "unet_cifar10"): ["dataset=image_folder", "dataset.root=somewhere"],
    ("model", "unet_64"): ["dataset=image_folder", "dataset.root=somewhere", "shape=[3,64,64]"],
    **{("method", name): ["model.scalars=[guidance_scale]"] for name in GROUPS["method"] if "guided" in name},
    **{("method", name): ["model.scalars=[steps]"] for name in ("shortcut", "shortcut_scratch")},
}
# supplied by whoever calls the node, not by the config
CALLER = {
    "torch.optim": {"params"},
    "diffusion_lab.guidance": {"denoiser"},
    "diffusion_lab.posterior": {"denoiser"},
}
# groups and options that only sample.py has: what samples a posterior takes its operator from `measurement`
MEASURED = [file.stem for file in (CONF / "guidance").glob("*.yaml") if "${measurement" in file.read_text()]
SAMPLE_ONLY = {("guidance", name) for name in MEASURED} | {
    (group, name) for group in ("measurement", "reward") for name in GROUPS[group]
}
ON_SAMPLE = ["run=somewhere", "shape=[1,8,8]", "num_classes=10"]
EVALUATE_ONLY = ("measures", "protocol")
# groups whose files merge: each is a mapping of names to parts
NAMED = ("averages", "callbacks", "logger", "measures", "modifiers")
# groups whose parts are built without each other are composed together, the first options of all, then the second ones:
# to compose takes a third of a second, and there are hundreds of files
TOGETHER = (
    "averages",
    "interpolant",
    "launcher",
    "logger",
    "lr_schedule",
    "metrics",
    "modifiers",
    "optimizer",
    "prediction",
    "sampler",
    "schedule",
    "sweep",
    "trainer",
    "weighting",
)


@cache
def composed(app: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(app, overrides=list(overrides))


def config(app: str, *overrides: str) -> DictConfig:
    return composed(app, *overrides).copy()


def app_of(group: str, option: str) -> str:
    if group in EVALUATE_ONLY:
        return "evaluate"
    return "sample" if (group, option) in SAMPLE_ONLY else "train"


def words_of(group: str, option: str) -> list[str]:
    """The overrides that choose an option, and what it needs beside it."""
    if (group, option) in SAMPLE_ONLY:
        # a reward is a part of a guidance
        place = ["guidance=particles", f"reward@guidance.reward={option}"] if group == "reward" else []
        measurement = [] if group == "measurement" else ["measurement=inpaint"]
        return [*ON_SAMPLE, *(place or [f"{group}={option}"]), *measurement]
    if group in EVALUATE_ONLY:
        return [*ON_SAMPLE, f"{group}={option}"]
    if group in TOGETHER:
        row = GROUPS[group].index(option)
        return [f"{name}={GROUPS[name][row % len(GROUPS[name])]}" for name in TOGETHER]
    if group == "model" and (group, option) not in COMPANY:
        # a network for other data says so in its name
        ending = option.rpartition("_")[2]
        names = (name for name in GROUPS["dataset"] if len(ending) > 1 and name.endswith(ending))
        return [f"model={option}", f"dataset={next(names, 'digits')}"]
    return [f"{group}={option}", *COMPANY.get((group, option), [])]


def with_option(group: str, option: str) -> DictConfig:
    return config(app_of(group, option), *words_of(group, option))


@cache
def checked(app: str, *overrides: str) -> None:
    validate(config(app, *overrides), SCHEMAS[app])


def targets(node, prefix=""):
    """Yield every node with a `_target_` that is written here, not reached through an interpolation."""
    if OmegaConf.is_dict(node) and "_target_" in node:
        yield prefix, node
    keys = list(node.keys()) if OmegaConf.is_dict(node) else range(len(node))
    for key in keys:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        if OmegaConf.is_config(node[key]):
            yield from targets(node[key], f"{prefix}.{key}" if prefix else str(key))


def test_the_groups_users_type_keep_their_names():
    assert {"dataset", "model", "schedule", "sampler", "guidance", "experiment"} <= set(GROUPS)
    assert {"digits", "mnist", "toy", "image_folder"} <= set(GROUPS["dataset"])
    assert {"ddim", "ddpm", "euler", "heun", "dpmpp_2m"} <= set(GROUPS["sampler"])
    assert len(GROUPS["schedule"]) >= 9 and len(GROUPS["prediction"]) >= 6 and len(GROUPS["weighting"]) >= 10
    assert "digits/quickstart" in GROUPS["experiment"]


@pytest.mark.parametrize(("group", "option"), FILES, ids=lambda x: x)
def test_every_file_composes_and_is_valid(group, option):
    checked(app_of(group, option), *words_of(group, option))


@pytest.mark.slow
@pytest.mark.parametrize("app", ["sample", "evaluate"])
def test_the_other_apps_are_valid(app):
    for group in ("schedule", "sampler", "grid", "guidance", "modifiers"):
        for option in GROUPS[group]:
            if app == "evaluate" and (group, option) in SAMPLE_ONLY:
                continue
            validate(config(app, "run=somewhere", "shape=[1,8,8]", f"{group}={option}"), SCHEMAS[app])


@pytest.mark.parametrize(("group", "option"), FILES, ids=lambda x: x)
def test_every_argument_of_our_own_is_written(group, option):
    for prefix, node in targets(with_option(group, option)):
        if not node._target_.startswith("diffusion_lab."):
            continue
        accepted = signature(resolve(node._target_))
        caller = next((names for root, names in CALLER.items() if node._target_.startswith(root)), set())
        unwritten = set(accepted.parameters) - {str(key) for key in node} - caller - HYDRA_KEYS
        assert not unwritten, f"{prefix}: {unwritten}"


def place_of(cfg: DictConfig, group: str) -> tuple[DictConfig, str]:
    """The node that a group's file fills, and its full key."""
    return (cfg.guidance.reward, "guidance.reward") if group == "reward" else (cfg[group], group)


@pytest.mark.parametrize("most", [2, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("group", sorted(set(GROUPS) - {"debug", "experiment"}))
def test_a_misspelt_key_in_any_group_is_an_error_that_names_it(group, most):
    for option in GROUPS[group][:most]:
        cfg = with_option(group, option)
        with open_dict(cfg):
            node, prefix = place_of(cfg, group)
            if node is None:
                continue
            if group in NAMED:
                if not node:
                    continue
                name = next(iter(node))
                node, prefix = node[name], f"{group}.{name}"
            if group == "measurement":
                if node.operator is None:
                    continue
                node, prefix = node.operator, f"{group}.operator"
            node["lerning_rate"] = 1
        with pytest.raises(UserError) as error:
            validate(cfg, SCHEMAS[app_of(group, option)])
        assert str(error.value).startswith(f"{prefix}.lerning_rate: ")


@pytest.mark.parametrize(
    "file", sorted(CONF.glob("*/**/*.yaml")), ids=lambda path: str(path.relative_to(CONF))
)
def test_a_group_file_names_at_most_one_target_and_explains_itself(file: Path):
    text = file.read_text()
    group = file.relative_to(CONF).parts[0]
    if group == "experiment":
        assert text.startswith("# @package _global_\n# "), "an experiment says where it comes from"
    # a method is a small assembly: module, denoiser, a loss that may wrap a loss, or the bridge with its path; a
    # sampler may hold another part, and a data set the one that it makes pairs of
    most = {"method": 5, "dataset": 2, "sampler": 2, "schedule": 2, "averages": 2}
    assert text.count("_target_:") <= most.get(group, 1)


# what is built only with a certain other choice
NEEDS = {("method", "adaptive"): ["schedule=adaptive"], ("method", "vdm"): ["schedule=learned"]}


@pytest.mark.parametrize(
    ("group", "option"), [f for f in FILES if f[0] not in ("experiment", "debug", "paths")], ids=lambda x: x
)
def test_every_file_builds(group, option, tmp_path):
    """A student's teacher is its own network here: none is trained."""
    if (group, option) in (
        ("metrics", "clip"),
        ("metrics", "dinov2"),
        ("metrics", "inception"),
        ("metrics", "mnist"),
        ("protocol", "standard"),
        ("dataset", "image_folder"),
        ("trainer", "gpu"),
    ):
        pytest.skip("needs files or hardware; built by the tests of its own module")
    if group == "model":
        # whatever its size: on this device nothing is allocated
        with torch.device("meta"):
            assert isinstance(hydra.utils.instantiate(with_option(group, option).model), torch.nn.Module)
        return
    cfg = with_option(group, option)
    if (group, option) in NEEDS:
        cfg = config("train", f"{group}={option}", *NEEDS[group, option])
    cfg.paths.run = str(tmp_path)
    with_its_own_teacher(cfg)
    if group in NAMED:
        assert set(hydra.utils.instantiate(cfg[group])) == set(cfg[group])
    else:
        assert hydra.utils.instantiate(place_of(cfg, group)[0]) is not None
    if group == "grid":
        grid = hydra.utils.instantiate(cfg.grid)
        if isinstance(grid, FittedGrid):
            return
        assert bool((grid.diff() > 0).all()) and float(grid[-1]) == float("inf")


def with_its_own_teacher(cfg: DictConfig) -> None:
    if "method" in cfg and "teacher" in cfg.method:
        cfg.method.teacher = cfg.method.denoiser
        if cfg.method._target_.endswith((".GuidedModule", ".ShortcutModule")):
            # whose teacher is not told what it is told
            own = cfg.method.denoiser
            plain = {key: own[key] for key in own if key not in ("scales", "finest")}
            cfg.method.teacher = {**plain, "_target_": "diffusion_lab.denoisers.NetworkDenoiser"}


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_experiment_builds_its_module_and_its_generation(experiment):
    cfg = config("train", f"experiment={experiment}")
    with_its_own_teacher(cfg)
    # papers' own sizes too: on this device nothing is allocated
    with torch.device("meta"):
        module = hydra.utils.instantiate(cfg.method)
    assert module.denoiser.network is not None
    assert tuple(hydra.utils.instantiate(cfg.generation).shape) == tuple(cfg.shape)


@pytest.mark.parametrize("folder", sorted((CONF / "experiment").iterdir()), ids=lambda path: path.name)
def test_every_paper_has_a_laptop_sibling(folder: Path):
    """A paper's recipe at its own scale stands beside one that anybody can try."""
    if folder.name not in ("digits", "mnist", "toy"):
        assert (folder / "digits.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["digits/quickstart", "toy/quickstart"])
@pytest.mark.parametrize(
    "group", ["schedule", "sampler", "guidance", "lr_schedule", "prediction", "weighting", "averages"]
)
def test_any_option_can_be_put_on_top_of_an_experiment(experiment, group):
    for option in GROUPS[group]:
        if experiment.startswith("toy/") and option in ("shifted_cosine", "interpolated_cosine"):
            continue  # these are shifted by the side of an image
        if (group, option) in SAMPLE_ONLY:
            continue
        validate(config("train", f"experiment={experiment}", f"{group}={option}"), SCHEMAS["train"])
