"""What cannot be scored is refused in one line before anything slow; samples of others are never a run's own score."""

import json

import numpy as np
import pytest
import tiny_runs
from PIL import Image

from diffusion_lab.app.evaluate import table
from diffusion_lab.app.export.model_card import SHOWN, _quality
from diffusion_lab.app.report import build
from diffusion_lab.app.scoring import scores
from diffusion_lab.data.digits import Digits

pytestmark = pytest.mark.usefixtures("no_cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tiny_runs.train(tmp_path_factory.mktemp("runs"), max_images=64).resolve()


@pytest.fixture(scope="module")
def pics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "pics"
    folder.mkdir()
    for k, image in enumerate(Digits(batch_size=8, seed=0).test_images()[0][:20]):
        Image.fromarray(image[0].numpy()).save(folder / f"{k:02d}.png")
    return folder


def evaluate(*words, code=0):
    assert tiny_runs.main("evaluate", *map(str, words)) == code


@pytest.fixture
def refused(monkeypatch, capsys):
    """Evaluate, expect one line of error, and that nothing was drawn or measured before it."""
    from diffusion_lab.app import evaluate as app

    def never(*_, **__):
        raise AssertionError("this is slow")

    monkeypatch.setattr(app, "draw", never)
    monkeypatch.setattr(app, "score", never)

    def run(*words):
        evaluate(*words, code=2)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ")
        return error

    return run


@pytest.mark.parametrize("word", ["sampler=heun", "grid.steps=9", "seed=1"])
def test_how_samples_are_drawn_has_no_part_in_samples_that_exist(word, trained, pics, refused):
    assert f"{word}: has no part in scoring samples that exist" in refused(
        f"run={trained}", f"samples={pics}", word
    )


def test_what_a_protocol_sets_was_not_typed(trained, pics, tmp_path):
    evaluate(f"run={trained}", f"samples={pics}", "protocol=quick2k", f"out={tmp_path}/o")


def test_paths_are_looked_at_first_and_the_nearest_is_named(trained, pics, refused, monkeypatch):
    from diffusion_lab.app import evaluate as app

    monkeypatch.setattr(app, "yardstick", None)
    line = refused(f"run={trained}", "reference=tset")
    assert "reference=tset: no such file or folder; did you mean test?" in line
    line = refused(f"run={trained}", f"samples={pics.parent}/picts")
    assert f"samples={pics.parent}/picts: no such file or folder; did you mean {pics}?" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["metrics=mnist", "num_samples=20"], "these samples cannot be scored: mnist-cnn"),
        (["num_samples=1"], "num_samples=1: a distance needs at least two images"),
        (["num_samples=20", "reference={other}"], "they are grey 8x8, "),
        (["num_samples=20", "metrics=pixels", "measures=accuracy"], "none of the measures applies"),
    ],
)
def test_what_cannot_work_is_refused_before_samples_are_drawn(words, message, trained, tmp_path, refused):
    np.savez(tmp_path / "other.npz", images=np.zeros((4, 9, 9, 1), np.uint8))
    words = [word.format(other=tmp_path / "other.npz") for word in words]
    assert message in refused(f"run={trained}", *words)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("grid.png", None, "a single picture; name its folder"),
        ("notes.txt", b"hello there", "an .npz with an array `images` is needed, or a folder of pictures"),
        ("floats.npy", np.zeros((3, 8, 8, 1)), "of floats in [0, 1] they are (x * 255).round()"),
        ("grey.npy", np.zeros((3, 8, 8), np.uint8), "save images[..., None]"),
    ],
)
def test_files_that_are_no_samples_say_what_to_do(name, content, message, trained, tmp_path, refused):
    path = tmp_path / name
    if content is None:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    line = refused(f"run={trained}", f"samples={path}")
    assert message in line and "pickle" not in line


def test_samples_of_others_stand_under_their_own_name(trained, pics, capsys):
    evaluate(f"run={trained}", "num_samples=20")
    evaluate(f"run={trained}", f"samples={pics}")
    out = capsys.readouterr().out
    assert "pics (not drawn by this run)" in " ".join(out.split())
    assert "all of these: not by the protocol" in out
    own, other = json.loads((trained / "metrics.json").read_text())["evaluations"]
    assert own["own"] and own["run"].startswith("digits/quickstart/") and not other["own"]
    assert "| pics (not drawn by this run) |" in (trained / "metrics.md").read_text()
    card = (trained / "export" / "README.md").read_text()
    assert own["records"][0]["shown"] in card and other["records"][0]["shown"] not in card
    report = (trained / "report.html").read_text()
    numbers = report.split('<div class="numbers">')[1].split('<div class="scroll">')[0]
    assert (
        f"{own['records'][0]['value']:.4g}" in numbers
        and f"{other['records'][0]['value']:.4g}" not in numbers
    )
    assert "pics (not drawn by this run)" in report.split("<tbody>")[1]
    # its own samples, named as samples=, are its own
    evaluate(f"run={trained}", f"samples={own['samples']}")
    assert json.loads((trained / "metrics.json").read_text())["evaluations"][-1]["own"]


def record(label, value, *, n=100, deviates=False, protocol="house", **more):
    return {
        "label": label, "metric": "kernel", "value": value, "n": n, "shown": f"{value}",
        "source": {"ema": "ema", "sampler": "S()", "nfe": 3},
        "conditions": f"{protocol}: n {n}" + (" | DEVIATES: n" if deviates else ""), **more,
    }  # fmt: skip


def test_spread_and_number_of_real_images_are_told_everywhere():
    item = record("KD@100", 0.25, spread=0.03, real=0.5, real_n=360, better="higher")
    assert scores.number(item) == "0.25 ± 0.03" and scores.number(item, "real") == "0.5"
    assert scores.number({"value": 0.5, "spread": 0.01, "percent": True}) == "50.00 % ± 1.00 %"
    (column,) = [c for c in table([{"run": "r", "records": [item]}]).columns if c.header == "value"]
    assert list(column.cells) == ["0.25 ± 0.03"]
    assert "<b>0.25 ± 0.03</b><small>0.5 for 360 real images</small>" in build._number(item)
    assert "0.5 for as many real images" in build._number({**item, "real_n": 100})


def test_the_best_is_by_its_protocol_then_of_most_images_then_newest():
    def made(name, **more):
        return {"name": name, "records": [record("FD", 1.0, **more)]}

    few, many, older = made("few", n=30), made("many", n=1437), made("older", n=1437)
    deviating = made("deviating", n=5000, deviates=True)
    assert scores.best([older, many, few, deviating])["name"] == "many"
    assert scores.best([few, deviating])["name"] == "few"
    assert (
        scores.best([made("small", n=5, deviates=True), deviating, made("last", n=30, deviates=True)])
        == deviating
    )
    assert scores.best([{**many, "own": False}]) is None and scores.best([]) is None


def test_the_card_shows_the_newest_by_each_protocol_first_and_counts_what_it_leaves_out():
    def made(value, k=1, **more):
        return {"samples": "s", "records": [record(f"M{i}", value, **more) for i in range(k)]}

    full = made(1.5, 11)
    trials = [made(100.5 + k, deviates=True) for k in range(SHOWN)]
    evaluations = [made(7.5), full, made(9.5, protocol="paper"), *trials]
    text = list(_quality(evaluations))
    rows = [line for line in text if line.startswith("| M")]
    assert len(rows) == SHOWN and sum("| 1.5 |" in row for row in rows) == 11
    assert "| 9.5 |" in rows[0] and "| 1.5 |" in rows[1] and f"| {100.5 + SHOWN - 1} |" in rows[12]
    assert text[-1] == "and 13 more in metrics.json of the run"
    assert "more in metrics.json" not in "".join(_quality([full]))
    # more than there is room for, where they may all be quoted
    assert len([line for line in _quality([made(1.0, SHOWN + 6)]) if line.startswith("| M")]) == SHOWN + 6
