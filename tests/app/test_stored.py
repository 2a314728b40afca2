"""A stored denoiser inside a guidance: named on the command line, told in plain values, part of the identity."""

import pytest
import tiny_runs
import torch

from diffusion_lab.app import stored
from diffusion_lab.app.build import load_denoiser
from diffusion_lab.app.errors import UserError
from diffusion_lab.guidance.autoguidance import AutoGuidance


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs: the one to sample, an earlier one, and one of the plane."""
    root = tmp_path_factory.mktemp("runs")
    good = tiny_runs.train(root, "run_id=good").resolve()
    weak = tiny_runs.train(root, "run_id=weak", "seed=1", "model.multipliers=[1]", max_images=160).resolve()
    words = [
        "experiment=toy/quickstart", "model.width=8", "model.depth=1", "batch_size=32", "max_images=320",
        "dataset.num_examples=500", "trainer=cpu", "~callbacks.sample_grid", "~callbacks.throughput",
        "lr_schedule=constant", f"paths.runs={root}",
    ]  # fmt: skip
    assert tiny_runs.main("train", *words) == 0
    return good, weak, (root / "toy" / "quickstart" / "latest").resolve()


def sample(out, run, *more, n=24, code=0):
    assert tiny_runs.main("sample", f"run={run}", f"out={out}", f"num_samples={n}", *more) == code
    return tiny_runs.images_of(out)[0] if code == 0 else None


AUTO = ["guidance=autoguidance", "guidance.scale=2"]


def test_autoguidance_from_the_command_line_is_autoguidance(runs, tmp_path):
    """Against the same recipe made by hand from the two loaded denoisers."""
    good, weak, _ = runs
    got = sample(tmp_path / "s", good, *AUTO, f"guidance.weak.run={weak}", "guidance.weak.ema=raw")
    from diffusion_lab.app.build import generation_of, instantiate
    from diffusion_lab.app.sampling.job import streams
    from diffusion_lab.app.sampling.parts import to_array

    settings = tiny_runs.record_of(tmp_path / "s")["settings"]["generation"]
    unguided = {**settings, "guidance": {"_target_": "diffusion_lab.guidance.Unguided", "_partial_": True}}
    generation = generation_of({"generation": unguided})
    denoiser = AutoGuidance(load_denoiser(good).denoiser, load_denoiser(weak, "raw").denoiser, scale=2.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        label = torch.tensor([i % 10 for i in range(64)])
        by_hand = to_array(generation(denoiser, seeds=streams(0, range(64)), cond={"label": label}))
    torch.set_num_threads(threads)
    assert (got == by_hand[:24]).all()
    assert instantiate(settings["guidance"], "guidance").keywords["weak"].network is not None
    told = tiny_runs.record_of(tmp_path / "s")
    # three steps, and each of them asks both
    assert told["nfe"] == 6 and "weak=weak/raw" in told["guidance"]
    node = settings["guidance"]["weak"]
    assert (
        node["run"] == str(weak)
        and node["ema"] == "raw"
        and node["sha256"] == load_denoiser(weak, "raw").sha256
    )


@pytest.mark.slow
def test_scale_one_is_no_guidance_and_null_is_the_run_itself(runs, tmp_path, capsys):
    good, weak, _ = runs
    plain = sample(tmp_path / "plain", good)
    assert (
        sample(tmp_path / "one", good, *AUTO, f"guidance.weak.run={weak}", "guidance.scale=1") == plain
    ).all()
    capsys.readouterr()
    words = [f"run={good}", f"out={tmp_path / 'same'}", "num_samples=4", *AUTO]
    assert tiny_runs.main("sample", *words) == 2
    assert "the weak model is the model itself" in capsys.readouterr().err
    raw = sample(tmp_path / "raw", good, *AUTO, "guidance.weak.ema=raw")
    assert (raw != plain).any()
    node = tiny_runs.record_of(tmp_path / "raw")["settings"]["generation"]["guidance"]["weak"]
    assert node["run"] == str(good) and node["ema"] == "raw"


@pytest.mark.slow
def test_several_processes_read_it_too(runs, tmp_path):
    good, weak, _ = runs
    words = [*AUTO, f"guidance.weak.run={weak}"]
    one = sample(tmp_path / "one", good, *words, n=100)
    two = sample(tmp_path / "two", good, *words, "devices=2", "batch_size=64", n=100)
    assert (one == two).all()


def test_the_weights_are_part_of_the_identity(runs, tmp_path, capsys):
    good, weak, _ = runs
    sample(tmp_path / "s", good, *AUTO, f"guidance.weak.run={weak}", "guidance.weak.ema=raw")
    capsys.readouterr()
    sample(tmp_path / "s", good, *AUTO, f"guidance.weak.run={weak}", "guidance.weak.ema=ema", code=2)
    assert "other samples are there already" in capsys.readouterr().err


def test_a_run_that_went_on_meanwhile_is_refused(runs):
    _, weak, _ = runs
    with pytest.raises(UserError, match="has other weights than when this job began"):
        stored.stored("weak", str(weak), "raw", "0" * 64)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("guidance.weak.run=nowhere", "guidance.weak.run={here}/nowhere: no such folder"),
        ("guidance.weak.ema=emma", "guidance.weak.ema=emma: {good} has no such weights; did you mean 'ema'?"),
        ("guidance.weak.ema=third", "has no such weights; there are: ema, raw"),
        ("guidance.weak.run={plane}", "{plane}: its shape is [2], that of the run to sample is [1, 8, 8]"),
        ("guidance.weak.rnu=x", "guidance.weak.rnu=x: no key 'rnu' in 'guidance.weak'; did you mean 'run'?"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(runs, tmp_path, capsys, monkeypatch, word, message):
    monkeypatch.chdir(tmp_path)
    good, _, plane = runs
    names = {"good": good, "plane": plane, "here": tmp_path}
    sample(tmp_path / "s", good, *AUTO, word.format(**names), code=2)
    error = capsys.readouterr().err
    assert message.format(**names) in error and error.count("\n") == 1 and not (tmp_path / "s").exists()


def test_training_does_not_take_one(tmp_path, capsys):
    words = [*tiny_runs.TINY, f"paths.runs={tmp_path}", "guidance=autoguidance"]
    assert tiny_runs.main("train", *words) == 2
    error = capsys.readouterr().err
    assert "guidance.weak" in error and "sample.py" in error and error.count("\n") == 1


def test_nodes_are_found_wherever_they_stand():
    node = {
        "_target_": "a.B", "inner": {"_target_": "c.D", "weak": {"run": "r", "ema": None}},
        "others": [{"classifier": {"run": None, "ema": None}}], "weak": {"_target_": "e.F"}, "run": "x",
    }  # fmt: skip
    found = dict(stored.find(node, "guidance"))
    assert set(found) == {"guidance.inner.weak", "guidance.others.0.classifier"}
