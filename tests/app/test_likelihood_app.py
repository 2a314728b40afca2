"""evaluate.py metrics=bpd: the figure with its protocol, taken up after a kill, the same to the bit."""

import json
import math

import numpy as np
import pytest
import tiny_runs

from diffusion_lab.app.scoring import likelihood_rows
from diffusion_lab.app.scoring.likelihood import lines
from diffusion_lab.modules.checkpoint_io import list_checkpoints, load_checkpoint

VDM = [
    "method=vdm", "schedule=learned", "schedule.width=8", "prediction=eps_residual", "grid=uniform_logsnr", "run_id=vdm"
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tiny_runs.train(tmp_path_factory.mktemp("runs"), *VDM, max_images=160).resolve()


def evaluate(run, out, *more, code=0):
    assert tiny_runs.main("evaluate", f"run={run}", "metrics=bpd", f"out={out}", *more) == code


def last(folder):
    (item,) = json.loads((folder / "metrics.json").read_text())["evaluations"][-1]["records"]
    return item


def images_file(folder):
    (file,) = folder.glob("likelihood/*/images.npz")
    return file


def test_the_bound_of_a_run_with_the_ends_that_it_learnt(trained, tmp_path, capsys):
    evaluate(trained, tmp_path, "metrics.draws=2", "num_images=130")
    item = last(tmp_path)
    state = load_checkpoint(list_checkpoints(trained / "checkpoints")[0])["state_dict"]
    low, high = (float(state[f"loss.schedule.logsnr_{end}"]) for end in ("min", "max"))
    assert high != 13.3 and low != -5.0  # they moved: what the config says is another model
    assert item["protocol"]["ends"] == f"log-SNR {low:.4g} to {high:.4g}"
    assert sum(part["value"] for part in item["terms"].values()) == pytest.approx(item["value"], rel=1e-9)
    assert list(item["terms"]) == ["prior", "reconstruction", "diffusion"]
    with np.load(images_file(tmp_path)) as stored:
        value, label = stored["value"], stored["label"]
    assert len(value) == 130 and set(label) == set(range(10))
    assert item["value"] == pytest.approx(value.mean()) and item["n"] == 130
    assert item["standard_error"] == pytest.approx(value.std(ddof=1) / math.sqrt(130))
    half = (item["interval_95"][1] - item["interval_95"][0]) / 2
    assert 1.9 < half / item["standard_error"] < 2.0
    assert sum(row["value"] for row in item["by_level"]) == pytest.approx(item["terms"]["diffusion"]["value"])
    # the protocol is printed, and what is not by it
    out = capsys.readouterr().out
    assert item["label"] == "bits/dim@130 (VLB)" and item["deviations"] == ["n 130 instead of 360"]
    for words in (
        "bits/dim of 130 of 360 test images", "weights ema", "continuous time", "LearnedSchedule, as learnt",
        "2 noise levels an image", "256 levels of [-1, 1] (17 occur)", "labels given", "32-true, seed 0",
        "DEVIATES: n 130 instead of 360", "95 % interval", "deviation of one draw",
    ):  # fmt: skip
        assert words in out, words


@pytest.mark.slow
def test_killed_and_resumed_and_with_any_batch_size_to_the_same_bits(trained, tmp_path, monkeypatch, capsys):
    words = ("metrics.draws=2", "num_images=200")
    evaluate(trained, tmp_path / "whole", *words)
    save, saved = likelihood_rows._save, []

    def dying(path, rows):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, rows)

    monkeypatch.setattr(likelihood_rows, "_save", dying)
    evaluate(trained, tmp_path / "killed", *words, code=130)
    assert not (tmp_path / "killed" / "metrics.json").exists()
    monkeypatch.setattr(likelihood_rows, "_save", lambda path, rows: (saved.append(path), save(path, rows)))
    capsys.readouterr()
    evaluate(trained, tmp_path / "killed", *words, "batch_size=1")
    assert "128 of 200 images are measured already" in capsys.readouterr().out
    assert [path.stem for path in saved] == ["0000000", "0000001", "0000002", "0000003"]
    a, b = (np.load(images_file(tmp_path / name)) for name in ("whole", "killed"))
    assert np.array_equal(a["rows"], b["rows"]) and len(np.unique(a["rows"][:, 3])) == 200
    assert last(tmp_path / "whole")["value"] == last(tmp_path / "killed")["value"]
    # more images take these over; the set's end is filled up, and does not count
    evaluate(trained, tmp_path / "killed", "metrics.draws=2")
    assert len(saved) == 6 and last(tmp_path / "killed")["label"] == "bits/dim (VLB)"
    assert np.array_equal(np.load(images_file(tmp_path / "killed"))["rows"][:200], a["rows"])


@pytest.mark.slow
def test_what_is_done_otherwise_is_seen(trained, tmp_path):
    few = ("metrics.draws=1", "num_images=64")
    evaluate(trained, tmp_path, *few)
    plain = last(tmp_path)
    evaluate(trained, tmp_path, *few, "ema=raw")
    assert "raw weights instead of averaged" in last(tmp_path)["deviations"]
    evaluate(trained, tmp_path, *few, "metrics.labels=false")
    assert "labels not given" in last(tmp_path)["conditions"] and last(tmp_path)["value"] != plain["value"]
    evaluate(trained, tmp_path, *few, "schedule=linear_logsnr", "schedule.logsnr_max=10")
    assert "log-SNR -5 to 10 (LinearLogSNR)" in last(tmp_path)["conditions"]
    evaluate(trained, tmp_path, *few, "metrics=bpd_discrete", "metrics.steps=4", "metrics.logsnr_max=9")
    assert (
        last(tmp_path)["label"] == "bits/dim@64 (VLB, 4 steps)" and " to 9 " in last(tmp_path)["conditions"]
    )
    # the same again takes the place of what it was
    evaluate(trained, tmp_path, *few)
    assert len(json.loads((tmp_path / "metrics.json").read_text())["evaluations"]) == 5
    assert last(tmp_path)["value"] == plain["value"]


@pytest.mark.slow
def test_the_ode_with_each_dequantisation(trained, tmp_path, capsys):
    pytest.importorskip("torchode")
    few = ("metrics=bpd_ode", "num_images=4", "metrics.steps=2", "metrics.dequantisation_images=256")
    for name in ("uniform", "truncated_normal", "variational"):
        evaluate(trained, tmp_path, *few, f"metrics.dequantisation={name}")
        item = last(tmp_path)
        assert item["label"] == f"bits/dim@4 (ODE, {name.replace('_', ' ')})" and item["source"]["nfe"] == 8
        parts = item["terms"]
        assert parts["density"]["value"] + parts["dequantisation"]["value"] == pytest.approx(item["value"])
        words = name.replace("_", " ")
        assert f"dequantisation {words}" in item["conditions"] and "1 rademacher probe" in item["conditions"]
        if name == "uniform":
            assert parts["dequantisation"]["value"] == pytest.approx(math.log2(255 / 2))
    assert "learning to dequantise" in capsys.readouterr().out
    # learned once: an interrupted evaluation does not learn again
    evaluate(trained, tmp_path, *few, "metrics.dequantisation=variational")
    assert "learning" not in capsys.readouterr().out and last(tmp_path)["value"] == item["value"]


@pytest.mark.slow
def test_points_have_nats(tmp_path):
    words = [
        "dataset=toy",
        "model=mlp",
        "method=diffusion",
        "weighting=elbo",
        "max_images=64",
        "batch_size=16",
    ]
    more = ["name=toy", "run_id=toy", "trainer=cpu", f"paths.runs={tmp_path}", "dataset.num_examples=320"]
    assert tiny_runs.main("train", *words, *more, "callbacks=[checkpoints]") == 0
    run = tmp_path / "toy" / "toy"
    evaluate(run, tmp_path, "metrics.draws=2")
    item = last(tmp_path)
    assert item["label"] == "nats/dim (VLB)" and "density of points" in item["conditions"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["guidance=cfg"], "guidance=cfg: has no part in metrics=bpd"),
        (["num_samples=7"], "num_images says how many"),
        (["num_images=361"], "the test set has 360 images"),
        (["precision=bf16-mixed"], "32-true or 64-true"),
        (["metrics.logsnr_min=20"], "leaves"),
        (["metrics.draws=0"], "draws and steps must be at least 1"),
        (["metrics.drawss=2"], "did you mean 'draws'?"),
    ],
)
def test_mistakes_are_one_line(trained, tmp_path, capsys, words, message):
    evaluate(trained, tmp_path, *words, code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_export_does_not_hold_what_its_schedule_learnt(trained, tmp_path, capsys):
    evaluate(trained / "export", tmp_path, code=2)
    assert "name the run folder, or a schedule" in capsys.readouterr().err
    evaluate(
        trained / "export",
        tmp_path,
        "schedule=linear_logsnr",
        "schedule.logsnr_max=9",
        "num_images=4",
        "metrics.draws=1",
    )
    assert last(tmp_path)["n"] == 4


def test_the_table_of_one_image():
    unknown = {"standard_error": math.nan, "interval_95": [math.nan, math.nan]}
    item = {"label": "bits/dim@1 (VLB)", "value": 1.0, **unknown, "terms": {}}
    assert "of one image" in lines(item)[0][1]
