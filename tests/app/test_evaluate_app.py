"""evaluate.py: numbers with their protocol, from a run, an export, or samples that exist."""

import json

import numpy as np
import pytest
import tiny_runs

from diffusion_lab.data.digits import Digits
from diffusion_lab.metrics.protocol import Record

pytestmark = pytest.mark.usefixtures("no_cache")


def evaluate(run, *more, code=0):
    assert tiny_runs.main("evaluate", f"run={run}", *more) == code


def evaluations(folder):
    return json.loads((folder / "metrics.json").read_text())["evaluations"]


@pytest.fixture
def real_digits(tmp_path):
    """The test digits themselves as samples, so that the right answer is known."""
    images, labels = Digits(batch_size=8, seed=0).test_images()
    np.savez(tmp_path / "real.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    return tmp_path / "real.npz"


def test_a_run_is_sampled_and_scored_once_and_again_without_sampling(trained, capsys):
    evaluate(trained, "num_samples=100")
    out = capsys.readouterr().out
    assert "FD@100 (digits-cnn)" in out and "real images" in out and "accuracy@100" in out
    assert "not by the protocol" in out and "report" in out
    assert (trained / "metrics.md").read_text().count("| FD@100 (digits-cnn) |") == 1
    assert "<h2>Scores</h2>" in (trained / "report.html").read_text()
    evaluate(trained, "num_samples=100", "batch_size=3")
    out = capsys.readouterr().out
    assert "scoring the samples in" in out and "sampling" not in out
    assert len(evaluations(trained)) == 1


def test_records_are_complete_and_can_be_read_back(trained):
    evaluate(trained, "num_samples=130")
    item = evaluations(trained)[-1]["records"][0]
    back = Record.from_dict({k: v for k, v in item.items() if k not in ("shown", "conditions")})
    assert back.n == 130 and back.source.ema == "ema" and back.source.nfe == 3 and back.real is not None
    assert "DPMSolverPP2M" in back.source.sampler and str(back.conditions) == item["conditions"]


def test_more_samples_take_over_the_first_ones(trained, capsys):
    evaluate(trained, "num_samples=64", "seed=3")
    evaluate(trained, "num_samples=128", "seed=3")
    assert "64 of 128 samples are there already" in capsys.readouterr().out


def test_real_test_digits_score_zero_distance_and_the_classifiers_accuracy(trained, real_digits, tmp_path):
    evaluate(trained, f"samples={real_digits}", f"out={tmp_path}/scores")
    distance, accuracy = evaluations(tmp_path / "scores")[0]["records"]
    assert distance["value"] == pytest.approx(0.0, abs=1e-9) and distance["real"] > 0.01
    assert accuracy["value"] == pytest.approx(accuracy["real"], abs=1e-9) and accuracy["value"] > 0.95


def test_an_export_is_scored_like_a_run(trained, tmp_path):
    evaluate(trained, "num_samples=100", f"out={tmp_path}/a")
    evaluate(trained / "export", "num_samples=100", f"out={tmp_path}/b")
    a, b = (evaluations(tmp_path / name)[0]["records"][0]["value"] for name in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "no such file or folder"),
        ({"pictures": np.zeros((4, 8, 8, 1), np.uint8)}, "an array `images` is needed"),
        ({"images": np.zeros((4, 8, 8, 1), np.float32)}, "images must be uint8"),
        ({"images": np.zeros((4, 9, 9, 1), np.uint8)}, "cannot be scored"),
        (
            {"images": np.zeros((4, 8, 8, 1), np.uint8), "labels": np.zeros(3, np.int64)},
            "4 images have 3 labels",
        ),
    ],
)
def test_samples_that_are_none_are_one_line(trained, tmp_path, capsys, arrays, message):
    if arrays is not None:
        np.savez(tmp_path / "s.npz", **arrays)
    evaluate(trained, f"samples={tmp_path}/s.npz", f"out={tmp_path}/scores", code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_npz_with_pickles_is_refused(trained, tmp_path, capsys):
    np.savez(tmp_path / "s.npz", images=np.array([{"a": 1}], dtype=object))
    evaluate(trained, f"samples={tmp_path}/s.npz", f"out={tmp_path}/scores", code=2)
    assert "allow_pickle" in capsys.readouterr().err


@pytest.mark.slow
def test_a_score_of_some_classes_only_says_so(trained, tmp_path, capsys):
    evaluate(trained, "num_samples=40", "labels=[3,5]", f"out={tmp_path}/some")
    assert "labels [3, 5] instead of all" in capsys.readouterr().out
    (item, _) = evaluations(tmp_path / "some")[0]["records"]
    assert "labels [3, 5] instead of all" in item["deviations"] and "labels [3, 5]" in item["conditions"]
    evaluate(trained, "num_samples=40", "labels=[9,8,7,6,5,4,3,2,1,0]", f"out={tmp_path}/all")
    evaluate(trained, "num_samples=40", f"out={tmp_path}/turn")
    for name in ("all", "turn"):
        for item in evaluations(tmp_path / name)[0]["records"]:
            assert not any("labels" in line for line in item["deviations"])


@pytest.mark.slow
def test_paths_are_printed_as_they_were_typed(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained.parent)
    evaluate(trained.name, "num_samples=20")
    out = capsys.readouterr().out
    assert f"metrics {trained.name}/metrics.json" in out and f"report  {trained.name}/report.html" in out
    assert tiny_runs.main("sample", f"run={trained.name}", "num_samples=20", "seed=4") == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    told = {line[0]: line[1].strip() for line in lines if len(line) == 2}
    assert told["picture"].startswith(f"{trained.name}/samples/") and told["picture"].endswith("grid.png")
    assert told["images"].startswith(f"{trained.name}/samples/") and told["seed"] == "4"
    assert told["grid"].startswith("uniform_u(") and told["guidance"].startswith("Unguided")
