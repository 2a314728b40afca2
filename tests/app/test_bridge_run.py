"""Bridges from the command line: trained on pairs, sampled from spoilt test images, scored, and refused in one line."""

import json

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image

from diffusion_lab.app.build import data_module, generation_of, load_denoiser
from diffusion_lab.app.sampling.posterior import from_array
from diffusion_lab.callbacks.pictures import tile
from diffusion_lab.denoisers.bridge import InterpolantField
from diffusion_lab.images import to_uint8
from diffusion_lab.samplers.transport import transport_ode

BRIDGE = [
    "method=stochastic_interpolant", "model.out_channels=2", "model.num_classes=0", "sampler=transport_ode",
    "grid=uniform_time", "method.loss.label_dropout=0.0",
]  # fmt: skip
PAIRS = ["dataset=degraded_digits"]
N = 70


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return tiny_runs.train(root, *PAIRS, *BRIDGE, max_images=160, pictures=True).resolve()


def sample(out, run, *more, n=N, code=0):
    assert tiny_runs.main("sample", f"run={run}", f"out={out}", f"num_samples={n}", *more) == code
    if code:
        return None
    with np.load(out / "samples.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples") / "whole"
    return out, sample(out, trained)


def test_samples_are_carried_from_spoilt_test_images_of_their_class(trained, whole):
    _, stored = whole
    loaded = load_denoiser(trained)
    assert isinstance(loaded.denoiser, InterpolantField)
    data, labels = data_module(loaded.config), torch.arange(N) % 10
    sources = data.conditions(range(N), labels)["image"]
    end = transport_ode(loaded.denoiser, sources, torch.linspace(0, 1, 4, dtype=torch.float64))
    for name, expected in (
        ("images", end), ("sources", sources), ("originals", data.originals(range(N), labels)),
    ):  # fmt: skip
        off = stored[name].astype(int) - to_uint8(expected).permute(0, 2, 3, 1).numpy()
        # a last bit may depend on how many are carried at once
        assert np.abs(off).max() <= (1 if name == "images" else 0), name
    assert stored["labels"].tolist() == labels.tolist()


def test_what_is_told_and_drawn(whole):
    out, stored = whole
    told = tiny_runs.record_of(out)
    assert told["nfe"] == 6 and "TransportODE" in told["sampler"]
    x0 = from_array(stored["originals"]).double()
    for name, key in (("sources", "psnr_of_sources"), ("images", "psnr_of_samples")):
        error = (from_array(stored[name]) - x0).square().flatten(1).mean(1)
        assert told["sources"][key] == pytest.approx(float((10 * torch.log10(4 / error)).mean()), abs=1e-3)
    with Image.open(out / "sources.png") as picture:
        assert picture.width * (3 * 9 - 1) == picture.height * (16 * 9 - 1)


def test_pictures_in_training_start_from_the_same_sources(trained, whole):
    # four rows of the ten classes, of the same weights as the samples drawn later
    with Image.open(trained / "samples" / "grid-0000000160.png") as picture:
        drawn = np.asarray(picture.convert("L")).astype(int)
    later = np.asarray(tile(from_array(whole[1]["images"][:40]), 10).convert("L")).astype(int)
    assert drawn.shape == later.shape and np.abs(drawn - later).max() <= 1
    assert list((trained / "samples").glob("trajectory-*.png"))


def test_neither_batches_nor_the_number_of_samples_matter(trained, whole, tmp_path):
    found = sample(tmp_path / "s", trained, "batch_size=7", n=30)
    for name, array in whole[1].items():
        assert np.array_equal(found[name], array[:30]), name
    other = sample(tmp_path / "t", trained, "seed=1", "sampler=transport_sde", n=30)
    assert not np.array_equal(other["sources"], found["sources"])


def test_it_is_scored(trained, tmp_path, capsys):
    words = [f"run={trained}", "num_samples=40", "sampler=transport_sde", f"out={tmp_path}"]
    assert tiny_runs.main("evaluate", *words) == 0
    assert "TransportSDE" in capsys.readouterr().out
    (evaluation,) = json.loads((tmp_path / "metrics.json").read_text())["evaluations"]
    assert {record["metric"] for record in evaluation["records"]} == {"frechet", "accuracy"}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            ["sampler=heun"],
            "field of a bridge, which Heun cannot follow: sampler=transport_ode or transport_sde",
        ),
        (["guidance=cfg", "guidance.scale=2"], "(guidance=none)"),
        (["modifiers=[static_threshold]"], "without modifiers"),
        (["grid=karras"], "grid=uniform_time"),
        (["grid=align_your_steps"], "grid=uniform_time"),
        (["guidance=autoguidance", "guidance.weak.ema=raw"], "(guidance=none)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_carry_is_one_line(trained, tmp_path, capsys, words, why):
    sample(tmp_path / "s", trained, *words, code=2)
    error = capsys.readouterr().err
    assert why in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([*BRIDGE, "sampler=ddim"], "field of a bridge, which DDIM cannot follow"),
        ([*BRIDGE, "guidance=cfg"], "(guidance=none)"),
        ([*BRIDGE, "grid=uniform_logsnr"], "grid=uniform_time"),
        ([*BRIDGE, "sampler=transport_sde", "method.denoiser.bridge.noise=0.0"], "no score"),
        (["sampler=transport_ode"], "method=stochastic_interpolant"),
        ([*BRIDGE, "dataset.noise=-1"], "noise >= 0"),
    ],
    ids=["sampler", "guidance", "grid", "noise", "denoiser", "data"],
)
def test_what_could_not_be_sampled_is_not_trained(tmp_path, capsys, words, why):
    words = [*tiny_runs.TINY, *PAIRS, f"paths.runs={tmp_path}", "max_images=64", *words]
    assert tiny_runs.main("train", *words) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1


@pytest.mark.slow
def test_without_pairs_a_bridge_starts_from_noise(tmp_path):
    run = tiny_runs.train(tmp_path, *BRIDGE, max_images=64)
    stored = sample(tmp_path / "s", run, n=8)
    assert sorted(stored) == ["images", "labels"] and len(np.unique(stored["images"], axis=0)) == 8
    assert "sources" not in tiny_runs.record_of(tmp_path / "s")


@pytest.mark.slow
def test_a_denoiser_may_be_told_the_same_images(tmp_path):
    """Image-conditional diffusion: the data set and its spoilt copies serve any network that sees images."""
    run = tiny_runs.train(tmp_path, *PAIRS, "model.image_channels=1", max_images=64)
    stored = sample(tmp_path / "s", run, n=8)
    assert stored["sources"].shape == stored["images"].shape == (8, 8, 8, 1)
    # what the network sees is the source: without it the same noise becomes another image
    loaded = load_denoiser(run)
    generation = generation_of(loaded.config)
    cond = {"label": torch.arange(8)}
    image = data_module(loaded.config).conditions(range(8), cond["label"])["image"]
    told = generation(loaded.denoiser, seeds=range(8), cond={**cond, "image": image})
    kept = torch.from_numpy(stored["images"].astype(int))
    assert int((to_uint8(told).permute(0, 2, 3, 1).int() - kept).abs().max()) <= 1
    alone = generation(loaded.denoiser, seeds=range(8), cond=cond)
    assert float((told - alone).abs().max()) > 1e-3
