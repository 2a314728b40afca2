"""Signatures read from source, values against annotations, whole configs, and the allow-list."""

import ast
import inspect
import sys

import pytest
from omegaconf import OmegaConf

from diffusion_lab.app.config import allowlist, signatures
from diffusion_lab.app.config.signatures import TargetNotFound, resolve, signature
from diffusion_lab.app.config.validate import check_node, drop_absent_parts, validate
from diffusion_lab.app.config.values import fits
from diffusion_lab.app.errors import UserError, did_you_mean, nearest

SOURCE = {
    "__init__.py": """
        from standin.parts import Child, make as build
        from standin.stars import *
        from .inner import deep
        if True:
            from standin.parts import Plain as Renamed
        import os
        Alias = Child
        raise RuntimeError("this package must never be imported")
    """,
    "parts.py": """
        from __future__ import annotations
        from dataclasses import dataclass, field
        import dataclasses
        from typing import ClassVar, Literal, Optional, Sequence
        import nowhere_installed

        @dataclass(frozen=True, kw_only=True)
        class Base:
            width: int
            rate: float = 0.1
            kind: ClassVar[str] = "x"
            cache: dict = field(default_factory=dict, init=False)

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Child(Base):
            mode: Literal["a", "b"] = "a"
            sizes: Sequence[int] = ()
            pair: tuple[float, float] = (0.0, 1.0)
            name: Optional[str] = None
            rate: float

        class Plain(Child):
            def __init__(self, *, alpha: int, beta="x", **kwargs): ...
            @classmethod
            def load(cls, path: str): ...

        class Heir(Plain):
            pass

        class Empty:
            pass

        class Unknown(nowhere_installed.Thing):
            pass

        def make(first, second: "int | None" = None): ...
    """,
    "stars.py": "class Starred:\n    def __init__(self, only): ...\n",
    "inner/__init__.py": "",
    "inner/deep.py": "from ..parts import Base\nclass Deep(Base): ...\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package on the path that raises when imported."""
    for name, text in SOURCE.items():
        file = tmp_path / "standin" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(inspect.cleandoc("\n" + text))
    monkeypatch.syspath_prepend(str(tmp_path))
    for cached in (signatures.find_module, signatures._tree, signatures.resolve):
        cached.cache_clear()
    yield
    assert "standin" not in sys.modules
    for cached in (signatures.find_module, signatures._tree, signatures.resolve):
        cached.cache_clear()


def accepted(target):
    found = signature(resolve(target))
    return None if found is None else {name: p.required for name, p in found.parameters.items()}


def test_signatures_follow_reexports_fields_and_bases(package):
    child = {"width": True, "rate": True, "mode": False, "sizes": False, "pair": False, "name": False}
    assert accepted("standin.Child") == accepted("standin.Alias") == accepted("standin.parts.Child") == child
    assert accepted("standin.Renamed") == accepted("standin.parts.Heir") == {"alpha": True, "beta": False}
    assert signature(resolve("standin.parts.Heir")).open
    assert accepted("standin.Starred") == {"only": True}
    assert accepted("standin.build") == {"first": True, "second": False}
    assert accepted("standin.parts.Heir.load") == {"path": True}
    assert accepted("standin.deep.Deep") == {"width": True, "rate": False}
    assert accepted("standin.parts.Empty") == {}
    assert accepted("standin.parts.Unknown") is None
    assert resolve("standin.build").path == "standin.parts.make"
    with pytest.raises(TargetNotFound) as error:
        resolve("standin.parts.Chidl")
    assert nearest(error.value.missing, error.value.options) == "Child"
    with pytest.raises(TargetNotFound):
        resolve("standin")


@pytest.mark.parametrize(
    ("target", "real"),
    [
        ("torch.optim.AdamW", "torch.optim"),
        ("torch.optim.SGD", "torch.optim"),
        ("torch.nn.Linear", "torch.nn"),
        ("lightning.pytorch.Trainer", "lightning.pytorch"),
        ("diffusion_lab.process.ShiftedCosine", "diffusion_lab.process"),
        ("diffusion_lab.process.LogitNormal", "diffusion_lab.process"),
        ("diffusion_lab.denoisers.NetworkDenoiser", "diffusion_lab.denoisers"),
    ],
)
def test_what_is_read_from_source_is_what_python_sees(target, real):
    import importlib

    kind = getattr(importlib.import_module(real), target.rsplit(".", 1)[1])
    want = {
        name: p.default is inspect.Parameter.empty
        for name, p in inspect.signature(kind).parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    assert accepted(target) == want


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [1, -3], [1.5, "1", True, None, [1]]),
        ("float", [1, 1.5, float("inf")], ["1.5", True, None, {"a": 1}]),
        ("bool", [True], [1, "true"]),
        ("str", ["x"], [1, None]),
        ("int | None", [1, None], ["x", 2.5]),
        ("Optional[float]", [None, 0.5], ["x"]),
        ("Union[int, str]", [1, "x"], [1.5, None]),
        ("Literal['a', 'b', 3]", ["a", 3], ["c", 3.0, None]),
        ("Sequence[int]", [[1, 2], []], [[1.5], "12", 3, ["x"]]),
        ("list[tuple[float, float]]", [[[1, 2.0]]], [[[1]], [["a", 2]]]),
        ("tuple[int, ...]", [[1, 2, 3]], [[1, "x"]]),
        ("Mapping[str, int]", [{"a": 1}], [{"a": "b"}, 3]),
        ("Schedule", [{"_target_": "x.Y"}], [3, "cosine"]),
        ("Union[float, Tensor]", [0.1, {"_target_": "x.Y"}], ["abc", True]),
        ("Callable[[int], int] | None", [{"_target_": "x.Y", "_partial_": True}, None], [3, "f"]),
        ("_SOME_ALIAS", [1, "x", None, [1]], []),
        ("'int | None'", [1, None], ["x"]),
    ],
)
def test_values_against_annotations(annotation, good, bad):
    parsed = ast.parse(annotation, mode="eval").body
    assert [value for value in good if not fits(parsed, value)] == []
    assert [value for value in bad if fits(parsed, value)] == []


@pytest.mark.parametrize(
    ("node", "line"),
    [
        ({"widht": 3}, "model.widht: Child has no argument 'widht'; did you mean 'width'?"),
        ({"width": 3}, "model.rate: Child needs this argument"),
        ({"width": 3.5, "rate": 1}, "model.width: Child expects int, got 3.5"),
        ({"width": 3, "rate": "fast"}, "model.rate: Child expects float, got 'fast'"),
        ({"width": 3, "rate": 1, "mode": "c"}, "model.mode: Child expects Literal['a', 'b'], got 'c'"),
        ({"width": 3, "rate": 1, "name": 2}, "model.name: Child expects str | null, got 2"),
        ({"width": 3, "rate": 1, "pair": [1]}, "model.pair: Child expects tuple[float, float], got [1]"),
        ({"width": 3, "rate": 1, "cache": {}}, "model.cache: Child has no argument 'cache'"),
        (
            {"_target_": "standin.Chidl"},
            "model._target_: 'standin.Chidl' does not exist: no 'Chidl' in standin; did you mean 'Child'?",
        ),
        (
            {"_target_": "standin.part.Child"},
            "model._target_: 'standin.part.Child' does not exist: no 'part' in standin; did you mean 'parts'?",
        ),
        ({"_target_": "standing.Child"}, "model._target_: 'standing.Child' does not exist: no 'standing' in"),
        ({"_target_": 3}, "model._target_: a dotted path is needed, got 3"),
    ],
)
def test_a_bad_node_is_one_line_with_the_full_key(package, node, line):
    with pytest.raises(UserError) as error:
        check_node(OmegaConf.create({"_target_": "standin.Child", **node}), "model")
    assert str(error.value).startswith(line)


def test_good_nodes_pass(package):
    check_node(
        OmegaConf.create({"_target_": "standin.Child", "width": 3, "rate": 2, "sizes": [1], "pair": [0, 1]}),
        "x",
    )
    check_node(OmegaConf.create({"_target_": "standin.Child", "_partial_": True, "rate": 2}), "x")
    check_node(OmegaConf.create({"_target_": "standin.parts.Plain", "alpha": 1, "anything": "goes"}), "x")
    check_node(OmegaConf.create({"_target_": "standin.parts.Unknown", "anything": "goes"}), "x")


def test_whole_configs():
    from dataclasses import dataclass
    from typing import Any

    @dataclass(kw_only=True)
    class Schema:
        seed: int
        model: Any
        method: Any

    def check(**changes):
        cosine = {"_target_": "diffusion_lab.process.Cosine", "logsnr_min": "${low}"}
        cfg = {"seed": 1, "model": cosine, "method": {"parts": ["${model}", {"a": "${seed}"}]}, **changes}
        validate(OmegaConf.create(cfg), Schema)

    check(model={"_target_": "diffusion_lab.process.Cosine"})
    for changes, line in [
        ({}, "model.logsnr_min: '${low}' leads nowhere"),
        (
            {"model": {"b": [1, {"c": "???"}]}},
            "model.b.1.c: a value is needed; add model.b.1.c=<value> to the command line",
        ),
        ({"model": "${sead}"}, "model: '${sead}' leads nowhere; did you mean 'seed'?"),
        ({"model": "${nosuch:1}"}, "model: Unsupported interpolation type nosuch"),
        (
            {"model": {"a": [{"_target_": "diffusion_lab.process.Cosin"}]}},
            "model.a.0._target_: 'diffusion_lab.process.Cosin'",
        ),
        ({"modle": 1, "model": None}, "modle: no such key; did you mean 'model'?"),
        ({"seed": 1.5, "model": None}, "seed: expects int, got 1.5"),
    ]:
        with pytest.raises(UserError) as error:
            check(**changes)
        assert str(error.value).startswith(line) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="model: missing from the config"):
        validate(OmegaConf.create({"seed": 1, "method": None}), Schema)


@pytest.mark.parametrize(
    "target",
    [
        "diffusion_lab.process.Cosine",
        "diffusion_lab.process.schedules.Cosine",
        "diffusion_lab.denoisers.NetworkDenoiser",
        "diffusion_lab.modules.learning_rate.Constant",
        "torch.optim.AdamW",
        "torch.nn.Linear",
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.ModelSummary",
    ],
)
def test_building_blocks_are_allowed(target):
    allowlist.check_targets({"a": [{"_target_": target, "x": 1}]}, "config.yaml")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "numpy.load",
        "pathlib.Path.unlink",
        "subprocess.run",
        "webdataset.WebDataset",
        "hydra.utils.get_method",
        "functools.partial",
        "torch.nn.init.os.system",
        "torch.nn.Module.load_state_dict",
        "torch.nn.functional.relu",
        "torch.optim.swa_utils.torch.load",
        "torch.nn.modules.module.torch.load",
        "lightning.pytorch.cli.LightningCLI",
        "lightning.pytorch.utilities.parsing.pickle.load",
        "lightning.pytorch.Trainer.fit",
        "diffusion_lab",
        "diffusion_lab.process.Nothing",
        "diffusion_lab.denoisers.network.torch.load",
        "diffusion_lab.denoisers.network.nn.Module",
        "diffusion_lab.app.cli.main",
        "diffusion_lab.app.cli.os.system",
        "diffusion_lab.app.runs.run.os.system",
        "diffusion_lab.app.cli.importlib.import_module",
        "diffusion_lab.rng.step_rng",
        "diffusion_lab.loggers.wandb.wandb.init",
        "diffusion_lab.modules.checkpoint_io.os.remove",
        "diffusion_lab.modules.checkpoint_io.find_resumable",
        "diffusion_lab..process.Cosine",
        "",
        None,
        {"_target_": "os.system"},
    ],
)
def test_everything_else_is_refused(target):
    with pytest.raises(UserError) as error:
        allowlist.check_targets({"a": [{"_target_": target, "x": 1}]}, "config.yaml")
    assert str(error.value).startswith("config.yaml: a.0._target_ = ") and "\n" not in str(error.value)


def test_an_interpolation_in_a_stored_config_is_refused():
    with pytest.raises(UserError, match=r"config.yaml: out holds an interpolation"):
        allowlist.check_targets({"out": "${oc.env:SECRET}"}, "config.yaml")


def test_nearest():
    assert nearest("chanels", ["channels", "size"]) == "channels"
    assert nearest("CFG", ["cfg", "none"]) == "cfg"
    assert nearest("dpm", ["ddim", "dpmpp_2m", "heun"]) in ("dpmpp_2m", "ddim")
    assert nearest("zzz", ["cfg"]) is None
    assert did_you_mean("zzz", ["b", "a"]) == "; there are: a, b"
    assert did_you_mean("zzz", []) == ""


def test_settings_of_parts_that_were_not_chosen_are_dropped():
    groups = {
        "callbacks": ["default", "none", "progress", "checkpoints"],
        "logger": ["csv"],
        "averages": ["ema"],
    }
    chosen = {"_target_": "diffusion_lab.process.Cosine"}

    def drop(callbacks, overrides=()):
        cfg = OmegaConf.create({"callbacks": callbacks, "logger": {"csv": chosen}})
        drop_absent_parts(cfg, groups, overrides)
        return OmegaConf.to_container(cfg)["callbacks"]

    assert drop({"checkpoints": {"keep": 3}, "progress": chosen}) == {"progress": chosen}
    with pytest.raises(
        UserError, match=r"^callbacks.checkpoint: nothing of this name .* did you mean 'checkpoints'\?$"
    ):
        drop({"checkpoint": {"keep": 3}})
    with pytest.raises(
        UserError, match=r"^callbacks.checkpoints.keep=3: 'checkpoints' is not among the callbacks chosen$"
    ):
        drop({"checkpoints": {"keep": 3}}, ["callbacks.checkpoints.keep=3"])


def test_arguments_that_an_experiment_set_go_with_the_option_that_the_user_replaced():
    constant = "diffusion_lab.modules.learning_rate.Constant"

    def dropped(*overrides):
        cfg = OmegaConf.create({"lr_schedule": {"_target_": constant, "warmup_images": 5, "final": 0.1}})
        drop_absent_parts(cfg, {}, overrides)
        return set(cfg.lr_schedule)

    assert dropped("lr_schedule=constant") == {"_target_", "warmup_images"}
    # what stands there by itself, or was asked for, is a mistake to be told
    assert "final" in dropped() and "final" in dropped("optimizer=adam")
    assert "final" in dropped("lr_schedule=constant", "lr_schedule.final=0.1")


def test_a_grid_whose_levels_are_named_one_by_one_loses_steps_that_the_user_did_not_name():
    grids = "diffusion_lab.samplers.grids."
    named = {"_target_": f"{grids}from_logsnrs", "logsnrs": [0.0], "steps": 2}
    cfg = OmegaConf.create({"grid": named})
    drop_absent_parts(cfg, {}, ["debug=fast"])
    assert "steps" not in cfg.grid
    cfg = OmegaConf.create({"grid": named})
    drop_absent_parts(cfg, {}, ["grid.steps=2"])
    with pytest.raises(UserError, match="has no argument 'steps'"):
        check_node(cfg.grid, "grid")
    for target in ("uniform_u", "no_such_grid"):
        cfg = OmegaConf.create({"grid": {"_target_": f"{grids}{target}", "steps": 2}})
        drop_absent_parts(cfg, {}, [])
        assert cfg.grid.steps == 2
