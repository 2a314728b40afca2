"""A noisy classifier from the command line: trained, stopped and resumed, exported, and guiding samples."""

import csv

import pytest
import tiny_runs
import torch

from diffusion_lab.app.build import load_classifier

WORDS = [
    "experiment=digits/noisy_classifier", "model.channels=8", "model.attention=[]", f"batch_size={tiny_runs.BATCH}",
    "lr_schedule=constant", "lr_schedule.warmup_images=100", "averages.ema.half_life_images=300",
    "callbacks.training_log.every_images=48", "callbacks.gradient_norm.every_images=48",
    "callbacks.loss_by_noise_level.every_images=320", "callbacks.checkpoints.every_images=160",
    "callbacks.accuracy_by_noise_level.every_images=160", "callbacks.accuracy_by_noise_level.levels=[-4,0,4]",
    "trainer=cpu",
]  # fmt: skip


def train(runs, *more, max_images=320):
    assert tiny_runs.main("train", *WORDS, f"paths.runs={runs}", f"max_images={max_images}", *more) == 0
    return (runs / "digits" / "noisy_classifier" / "latest").resolve()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return tiny_runs.train(root).resolve(), train(root)


def test_it_is_a_run_like_any_other(runs):
    _, folder = runs
    names = {path.name for path in folder.iterdir()}
    assert {"checkpoints", "export", "report.html", "metrics.csv", "accuracy_by_noise_level.csv"} <= names
    assert not list((folder).glob("samples/grid-*.png"))
    with (folder / "accuracy_by_noise_level.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["images_seen"], float(row["logsnr"])) for row in rows] == [
        (images, level) for images in ("160", "320") for level in (-4.0, 0.0, 4.0)
    ]
    assert all(0 <= float(row["accuracy"]) <= 1 and row["n"] == "360" for row in rows)
    assert "accuracy" in (folder / "metrics.csv").read_text().splitlines()[0]
    raw, averaged, exported = (
        load_classifier(folder, "raw"),
        load_classifier(folder),
        load_classifier(folder / "export"),
    )
    assert averaged.ema == "ema" and averaged.sha256 == exported.sha256 != raw.sha256
    x, level = torch.zeros(2, 1, 8, 8), torch.zeros(2)
    assert torch.equal(averaged.classifier(x, level), exported.classifier(x, level))
    assert averaged.classifier(x, level).shape == (2, 10)


@pytest.mark.slow
def test_a_stopped_one_goes_on_to_the_bit(runs, tmp_path):
    train(tmp_path, max_images=160)
    resumed = train(tmp_path, "resume=auto")
    tiny_runs.assert_same(tiny_runs.state(runs[1]), tiny_runs.state(resumed))
    same = [(folder / "accuracy_by_noise_level.csv").read_text() for folder in (runs[1], resumed)]
    assert same[0] == same[1]


def sample(out, run, *more, code=0):
    assert tiny_runs.main("sample", f"run={run}", f"out={out}", "num_samples=20", *more) == code
    return tiny_runs.images_of(out)[0] if code == 0 else None


@pytest.mark.slow
def test_it_guides_samples(runs, tmp_path):
    denoiser, classifier = runs
    words = ["guidance=classifier", f"guidance.classifier.run={classifier}"]
    plain = sample(tmp_path / "plain", denoiser)
    assert (sample(tmp_path / "off", denoiser, *words, "guidance.scale=0") == plain).all()
    assert (sample(tmp_path / "on", denoiser, *words, "guidance.scale=30") != plain).any()
    told = tiny_runs.record_of(tmp_path / "on")
    # the classifier's passes are no evaluations of the denoiser
    assert told["nfe"] == 3 and f"classifier={classifier.name}/ema" in told["guidance"]
    assert (
        told["settings"]["generation"]["guidance"]["classifier"]["sha256"]
        == load_classifier(classifier).sha256
    )
    without = sample(tmp_path / "without", denoiser, *words, "guidance.with_label=false", "guidance.scale=30")
    assert (without != plain).any()
    both = [*words, "guidance@guidance.inner=cfg", "guidance.inner.scale=3", "guidance.scale=0"]
    cfg = sample(tmp_path / "cfg", denoiser, "guidance=cfg", "guidance.scale=3")
    assert (sample(tmp_path / "both", denoiser, *both) == cfg).all()


@pytest.mark.slow
def test_what_does_not_fit_is_one_line(runs, tmp_path, capsys):
    denoiser, classifier = runs
    cases = [
        ([], "guidance.classifier.run=<folder> is needed"),
        ([f"guidance.classifier.run={denoiser}"], "this run has no classifier; it trained a denoiser"),
        (
            [f"guidance.classifier.run={classifier}", "guidance.classifier.ema=nine"],
            "guidance.classifier.ema=nine: ",
        ),
        (
            [f"guidance.classifier.run={tmp_path}/no"],
            f"guidance.classifier.run={tmp_path}/no: no such folder",
        ),
    ]
    capsys.readouterr()
    for words, message in cases:
        sample(tmp_path / "s", denoiser, "guidance=classifier", *words, code=2)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    for app in ("sample", "evaluate"):
        assert tiny_runs.main(app, f"run={classifier}") == 2
        error = capsys.readouterr().err
        hint = f"guidance=classifier guidance.classifier.run={classifier}"
        assert f"this run has no denoiser; it trained a classifier: {hint}" in error


@pytest.mark.slow
def test_another_process_is_refused(runs, tmp_path, capsys):
    flow = tiny_runs.train(tmp_path, "interpolant=rectified_flow", max_images=64).resolve()
    sample(tmp_path / "s", flow, "guidance=classifier", f"guidance.classifier.run={runs[1]}", code=2)
    error = capsys.readouterr().err
    assert "its process is VariancePreserving, that of the run to sample is RectifiedFlow" in error


def test_the_callback_is_for_classifiers(tmp_path, capsys):
    words = [*tiny_runs.TINY, *tiny_runs.NO_PICTURES, f"paths.runs={tmp_path}", "max_images=32"]
    assert tiny_runs.main("train", *words, "callbacks=[default,accuracy_by_noise_level]") == 2
    assert "accuracy_by_noise_level is for method=noisy_classifier" in capsys.readouterr().err
