"""What a job asks of its networks is known before anything is sampled: evaluations, and answers without a label."""

import json

import pytest
import tiny_runs
import torch

from diffusion_lab.app.sampling import probe
from diffusion_lab.process import VariancePreserving


@pytest.fixture(scope="module")
def never_without(tmp_path_factory):
    """A run whose examples always had their labels."""
    root = tmp_path_factory.mktemp("runs")
    return tiny_runs.train(root, "method.loss.label_dropout=0.0", max_images=64).resolve()


def sample(out, run, *more, code=0):
    words = [f"run={run}", f"out={out}", *more]
    assert tiny_runs.main("sample", *words) == code


REFUSED = "trained with method.loss.label_dropout=0 and knows no answer without one"


@pytest.mark.slow
def test_guidance_without_a_label_needs_a_model_that_knows_it(never_without, tmp_path, capsys):
    sample(tmp_path / "a", never_without, "num_samples=4", "guidance=cfg", "guidance.scale=2", code=2)
    error = capsys.readouterr().err
    assert (
        error
        == f"error: guidance: ClassifierFree asks the model without a label, but this run was {REFUSED}\n"
    )
    assert not (tmp_path / "a").exists()
    assert tiny_runs.main("evaluate", f"run={never_without}", "num_samples=16", "guidance=cfg") == 2
    assert REFUSED in capsys.readouterr().err
    # nothing is wrong where that branch is never asked
    sample(tmp_path / "b", never_without, "num_samples=4", "guidance=cfg", "guidance.scale=1")
    sample(
        tmp_path / "c", never_without, "num_samples=4", "guidance=cfg_interval", "guidance.interval=[50,60]"
    )
    sample(tmp_path / "d", never_without, "num_samples=4", "guidance=autoguidance", "guidance.weak.ema=raw")


@pytest.mark.slow
def test_a_posterior_without_labels_needs_one_too(never_without, tmp_path, capsys):
    words = ["guidance=pigdm", "measurement=inpaint", "input=test:2", "draws=1"]
    sample(tmp_path / "a", never_without, *words, code=2)
    error = capsys.readouterr().err
    assert REFUSED in error and "give the class, labels=<class>" in error and error.count("\n") == 1
    sample(tmp_path / "b", never_without, *words, "labels=[0,5]")
    assert tiny_runs.images_of(tmp_path / "b")[1].tolist() == [0, 5]


def test_the_stand_in_counts_rows_and_sees_missing_labels():
    blank = probe.Blank(VariancePreserving())
    x, level = torch.ones(3, 2, requires_grad=True), torch.zeros(3)
    out = blank(x, level, {"label": torch.tensor([0, 1, 2])})
    assert blank.calls == 3 and not blank.unconditional and out.requires_grad and not out.any()
    blank(x, level, {"label_embedding": torch.zeros(3, 4)})
    assert not blank.unconditional
    blank(x, level, {"label": torch.tensor([0, -1, 2])})
    assert blank.unconditional and blank.calls == 9
    for cond in (None, {}, {"seed": torch.zeros(3)}):
        blank.unconditional = False
        blank(x, level, cond)
        assert blank.unconditional


def test_what_guidance_and_sampler_refuse_is_one_line(never_without, tmp_path, capsys):
    words = ["num_samples=4", "guidance=skip_layer", "guidance.layers=[nowhere]"]
    sample(tmp_path / "a", never_without, *words, code=2)
    error = capsys.readouterr().err
    assert "these settings cannot be sampled: the network has no layer 'nowhere' to skip" in error
    assert error.count("\n") == 1 and not (tmp_path / "a").exists()


def test_a_learned_variance_is_sampled_with_and_counted(tmp_path):
    words = ("method=iddpm", "method.loss.steps=20", "model.out_channels=2")
    run = tiny_runs.train(tmp_path / "runs", *words, max_images=64).resolve()
    sample(tmp_path / "a", run, "num_samples=4", "sampler=iddpm", "guidance=none", "grid.steps=3")
    assert json.loads((tmp_path / "a" / "record.json").read_text())["nfe"] == 3
    # guidance hides it
    sample(tmp_path / "b", run, "num_samples=4", "sampler=iddpm", "guidance=cfg", "guidance.scale=2", code=2)


def test_a_loss_around_a_loss_says_too_whether_labels_were_dropped(tmp_path, capsys):
    words = ("method=edm2", "method.loss.loss.label_dropout=0.0")
    run = tiny_runs.train(tmp_path / "runs", *words, max_images=64).resolve()
    sample(tmp_path / "a", run, "num_samples=4", "guidance=cfg", "guidance.scale=2", code=2)
    assert "knows no answer without one" in capsys.readouterr().err
