"""Every experiment file trains a few steps, from the command line to the finished run folder."""

import re
import sys
from pathlib import Path

import pytest

from diffusion_lab.app import cli
from diffusion_lab.app.config.choices import read_run
from diffusion_lab.app.config.help import options
from diffusion_lab.app.session import conf_folder


def taught(experiment):
    """Whether an experiment distils: its method asks for a teacher."""
    text = (conf_folder() / "experiment" / f"{experiment}.yaml").read_text()
    method = re.search(r"override /method: (\w+)", text)
    return method and "teacher:" in (conf_folder() / "method" / f"{method[1]}.yaml").read_text()


# those at a paper's own scale are composed and built in test_conf.py
EXPERIMENTS = [
    name
    for name in options([conf_folder()])["experiment"]
    if name.partition("/")[0] in ("digits", "mnist", "toy") or name.endswith("/digits")
]


# pixels, points, and a learnt schedule; a student is trained from the command line in test_teacher.py
QUICK = ("digits/quickstart", "toy/quickstart", "vdm/digits")
MARKED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EXPERIMENTS]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    root = tmp_path_factory.mktemp("teacher")
    words = ["experiment=digits/quickstart", "debug=fast", "trainer=cpu", f"paths.runs={root}"]
    assert cli.main("train", [*words, "~callbacks.sample_grid", "~callbacks.frechet"]) == 0
    return root / "debug" / "digits" / "quickstart" / "latest"


@pytest.mark.parametrize("experiment", MARKED)
def test_every_experiment_trains_a_few_steps(experiment, tmp_path, monkeypatch, request):
    if experiment.startswith("mnist/"):
        request.getfixturevalue("data_root")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = [f"experiment={experiment}", "debug=fast", "trainer=cpu", f"paths.runs={tmp_path}"]
    if taught(experiment):
        arguments.append(f"method.teacher.run={request.getfixturevalue('teacher')}")
    if experiment.startswith("progressive/"):
        # four steps are enough for three halvings
        arguments.append("method.steps_from=8")
    assert cli.main("train", arguments) == 0
    folder = tmp_path / "debug" / experiment / "latest"
    config = read_run(Path(folder))
    assert config["name"] == f"debug/{experiment}" and config["choices"]["experiment"] == experiment
    assert config["choices"]["debug"] == "fast" and config["max_images"] == 128
    assert list((folder / "checkpoints").glob("*.ckpt"))
