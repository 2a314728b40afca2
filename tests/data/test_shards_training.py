"""Training on shards through the real command line: a stop, workers and processes do not show in the weights."""

import csv

import pytest
import tiny_runs
from shard_files import samples, shards, spoil, write

from diffusion_lab.data import order

WORDS = [
    word for word in tiny_runs.TINY if not word.startswith(("dataset=", "trainer="))
] + tiny_runs.NO_PICTURES


@pytest.fixture
def root(tmp_path):
    shards(tmp_path / "data", lengths=(40, 7, 23))
    write(tmp_path / "data" / "test-000.tar", samples(range(200, 205)))
    spoil(tmp_path / "data" / "train-001.tar", "0043.png")
    return tmp_path / "data"


def train(root, runs, *more, images=320, trainer=("trainer=cpu",)):
    words = [
        *WORDS,
        "dataset=shards",
        f"dataset.root={root}",
        "shape=[3,8,8]",
        "num_classes=10",
        f"paths.runs={runs}",
    ]
    words += ["dataset.max_corrupt=0.05", "dataset.num_workers=0", f"max_images={images}", *trainer, *more]
    assert tiny_runs.main("train", *words) == 0
    return (runs / "digits" / "quickstart" / "latest").resolve()


def assert_same_run(a, b):
    tiny_runs.assert_same(tiny_runs.state(a), tiny_runs.state(b))
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()


def skipped(folder):
    with (folder / "metrics.csv").open() as file:
        return [
            int(float(row["skipped_samples"])) for row in csv.DictReader(file) if row.get("skipped_samples")
        ]


def test_unreadable_samples_are_counted_in_the_log(root, tmp_path, capfd):
    folder = train(root, tmp_path, "~callbacks.checkpoints", images=160)
    assert "train-001.tar: '0043'" in capfd.readouterr().err
    # 160 images are 2 epochs of 70 and 20 more; the rows are 48 images apart, and a step is 16
    at = [p for p in range(160) if order(0, 70, [p])[0] == 43]
    rows = [n for n in range(16, 161, 16) if n // 48 != (n - 16) // 48]
    expected = [sum(p < n for p in at) for n in rows]
    assert skipped(folder) == [k for k in expected if k] and expected[-1] >= 2


@pytest.mark.slow
def test_a_run_on_shards_that_is_stopped_and_resumed_is_the_same_bitwise(root, tmp_path):
    whole = train(root, tmp_path / "whole")
    for images in (160, 320):  # 160 is between two rows of the log
        folder = train(root, tmp_path / "parts", "resume=auto", "run_id=a", images=images)
    assert skipped(whole)[-1] >= 4
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_workers_do_not_show_in_a_resumed_run(root, tmp_path):
    whole = train(root, tmp_path / "whole")
    for images, workers in ((160, 2), (320, 1)):
        more = ["resume=auto", "run_id=a", f"dataset.num_workers={workers}"]
        folder = train(root, tmp_path / "parts", *more, images=images)
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_two_processes_count_together_and_one_goes_on(root, tmp_path):
    off = "model.dropout=0.0"
    whole = train(root, tmp_path / "whole", off)
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    train(root, tmp_path / "parts", off, "resume=auto", "run_id=a", images=160, trainer=two)
    folder = train(root, tmp_path / "parts", off, "resume=auto", "run_id=a")
    assert skipped(folder) == skipped(whole)
    first, second = tiny_runs.state(folder), tiny_runs.state(whole)
    assert first.keys() == second.keys() and first["images_seen"] == second["images_seen"] == 320
    weights = [key for key in first if key.startswith("state_dict/")]
    assert max(float((first[k] - second[k]).abs().max()) for k in weights) < 2e-4


def test_a_missing_shard_is_one_line_and_leaves_no_run(root, tmp_path, capsys):
    words = [
        *WORDS,
        "dataset=shards",
        f"dataset.root={root}",
        "shape=[3,8,8]",
        "num_classes=10",
        "trainer=cpu",
    ]
    words += [f"paths.runs={tmp_path / 'runs'}", "dataset.train='train-{000..003}.tar'", "max_images=32"]
    assert tiny_runs.main("train", *words) == 2
    text = capsys.readouterr().err
    assert "train-003.tar is missing" in text and "Traceback" not in text
    assert not list((tmp_path / "runs").glob("*/*/2*"))
