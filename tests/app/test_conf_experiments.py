"""Every experiment file trains a few steps, from the command line to the finished run folder."""

import sys
from pathlib import Path

import pytest

from diffusion_lab.app import cli
from diffusion_lab.app.choices import read_run
from diffusion_lab.app.help import options

# those at a paper's own scale are composed and built in test_conf.py
EXPERIMENTS = [
    name
    for name in options([cli.conf_folder()])["experiment"]
    if name.partition("/")[0] in ("digits", "mnist", "toy") or name.endswith("/digits")
]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains_a_few_steps(experiment, tmp_path, monkeypatch, request):
    if experiment.startswith("mnist/"):
        request.getfixturevalue("data_root")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = [f"experiment={experiment}", "debug=fast", "trainer=cpu", f"paths.runs={tmp_path}"]
    assert cli.main("train", arguments) == 0
    folder = tmp_path / "debug" / experiment / "latest"
    config = read_run(Path(folder))
    assert config["name"] == f"debug/{experiment}" and config["choices"]["experiment"] == experiment
    assert config["choices"]["debug"] == "fast" and config["max_images"] == 128
    assert list((folder / "checkpoints").glob("*.ckpt"))
