"""evaluate.py on what users have lying about: folders of pictures, arrays, two sets, other references; bad input."""

import json

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image

from diffusion_lab.data.digits import Digits

pytestmark = pytest.mark.usefixtures("no_cache")


def evaluate(*words, code=0):
    assert tiny_runs.main("evaluate", *map(str, words)) == code


def records(folder):
    (evaluation,) = json.loads((folder / "metrics.json").read_text())["evaluations"]
    return evaluation["records"]


def digits(split="test"):
    data = Digits(batch_size=8, seed=0)
    return data.test_images() if split == "test" else data.train_images()


def as_pictures(folder, images, suffix=".png"):
    folder.mkdir(parents=True)
    for k, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{k:05d}{suffix}")
    return folder


def as_array(path, images, **more):
    np.savez(path, images=images.permute(0, 2, 3, 1).numpy(), **more)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return as_pictures(tmp_path_factory.mktemp("sets") / "pictures", digits()[0][:120])


def test_a_folder_of_pictures_an_array_and_adms_names_score_alike(trained, pictures, tmp_path):
    images = digits()[0][:120]
    as_array(tmp_path / "array.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "plain.npy", images.permute(0, 2, 3, 1).numpy())
    values = []
    for k, samples in enumerate(
        (pictures, *(tmp_path / n for n in ("array.npz", "packed.npz", "plain.npy")))
    ):
        evaluate(f"run={trained}", f"samples={samples}", f"out={tmp_path}/{k}")
        values.append(records(tmp_path / str(k))[0]["value"])
    assert values[0] > 0 and values == [values[0]] * 4


def test_two_sets_against_each_other_need_no_run(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    half = as_array(tmp_path / "half.npz", digits()[0][:60])
    evaluate(f"samples={half}", f"reference={pictures}", "metrics=digits")
    out = capsys.readouterr().out
    (record,) = records(tmp_path / "runs" / "evaluations" / "half")
    assert (
        record["reference"].endswith("pictures") and record["reference_n"] == 120 and record["real"] is None
    )
    assert "accuracy is not measured: the samples have no labels" in out and "instead of test" not in out
    evaluate(f"samples={pictures}", f"reference={pictures}", "metrics=pixels", "out=same")
    assert records(tmp_path / "same")[0]["value"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reference=b", "metrics=digits"], "samples=<folder or file> is needed"),
        (["samples=a", "reference=b"], "metrics=<features> is needed"),
        (["samples=a", "metrics=digits"], "reference=<folder or file> is needed"),
        (["samples=nowhere", "reference=nowhere", "metrics=digits"], "nowhere: no such file or folder"),
    ],
)
def test_what_is_missing_without_a_run_is_one_line(words, message, capsys):
    evaluate(*words, code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_train_split_as_reference_shows_in_the_line(trained, pictures, tmp_path, capsys):
    evaluate(f"run={trained}", f"samples={pictures}", "reference=train", f"out={tmp_path}/o")
    assert "reference train instead of test" in capsys.readouterr().out
    (record,) = records(tmp_path / "o")
    # the test images stand in for samples
    assert record["reference_n"] == 1437 and record["real_n"] == 120 and "DEVIATES" in record["conditions"]


def test_raw_weights_and_too_few_images_show_in_the_line(trained, tmp_path, capsys):
    evaluate(f"run={trained}", "protocol=quick2k", "num_samples=30", "ema=raw", f"out={tmp_path}/o")
    out = " ".join(capsys.readouterr().out.split())
    assert "n 30 instead of 2000; raw weights instead of averaged; seeds" in out
    assert "FD@30 (digits-cnn)" in out and "FD@2000" not in out


def test_another_resize_shows_in_the_line(trained, tmp_path, capsys):
    # 16x16 samples of a 16x16 data set, judged by features that average them back to 8x8
    big = digits()[0][:60].repeat_interleave(2, 2).repeat_interleave(2, 3)
    samples, reference = as_array(tmp_path / "a.npz", big[:30]), as_array(tmp_path / "b.npz", big[30:])
    evaluate(
        f"samples={samples}", f"reference={reference}", "metrics=digits_upsampled", "protocol=quick2k",
        "num_samples=30", "protocol.resize=none", f"out={tmp_path}/o",
    )  # fmt: skip
    assert "resize block means, to 8x8 instead of none" in " ".join(capsys.readouterr().out.split())


def test_a_protocol_takes_the_place_of_what_the_run_recorded(trained, tmp_path, capsys):
    # features that the run did not record, without naming them: the weights are not at hand, and it says which
    evaluate(f"run={trained}", "protocol=adm50k", f"metrics.weights_path={tmp_path}/none.pth", code=2)
    assert "no Inception weights" in capsys.readouterr().err
    evaluate(f"run={trained}", "protocol=quick2k", "num_samples=40", "metrics=pixels", f"out={tmp_path}/o")
    assert records(tmp_path / "o")[0]["features"] == "pixels"


def test_a_corrupt_picture_is_named_and_skipped_only_when_asked(trained, tmp_path, capsys):
    folder = as_pictures(tmp_path / "some", digits()[0][:20])
    whole = (folder / "00003.png").read_bytes()
    (folder / "00003.png").write_bytes(whole[:60])
    evaluate(f"run={trained}", f"samples={folder}", f"out={tmp_path}/o", code=2)
    error = capsys.readouterr().err
    assert "00003.png is not a readable image" in error and "skip_corrupt=true" in error
    assert error.count("\n") == 1
    evaluate(f"run={trained}", f"samples={folder}", "skip_corrupt=true", f"out={tmp_path}/o")
    assert "00003.png" in capsys.readouterr().out and records(tmp_path / "o")[0]["n"] == 19


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f.mkdir(), "no pictures there"),
        (lambda f: as_pictures(f, torch.zeros(3, 1, 9, 9, dtype=torch.uint8)), "grey 9x9, test is grey 8x8"),
        (lambda f: _coloured(f), "RGB 8x8, test is grey 8x8"),
        (lambda f: _mixed(f), "pictures differ: 0.png is grey 8x8, 1.png is grey 5x8"),
        (lambda f: as_pictures(f, torch.zeros(1, 1, 8, 8, dtype=torch.uint8)), "at least two images"),
    ],
    ids=["empty", "size", "colour", "mixed", "one"],
)
def test_pictures_that_do_not_fit_are_one_line(make, message, trained, tmp_path, capsys):
    make(tmp_path / "set")
    evaluate(f"run={trained}", f"samples={tmp_path}/set", f"out={tmp_path}/o", code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def _coloured(folder):
    folder.mkdir()
    for k in range(3):
        Image.fromarray(np.full((8, 8, 3), 9 * k, np.uint8)).save(folder / f"{k}.png")


def _mixed(folder):
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "0.png")
    Image.fromarray(np.zeros((8, 5), np.uint8)).save(folder / "1.png")


def test_a_reference_of_another_resolution_is_refused(trained, pictures, tmp_path, capsys):
    other = as_array(tmp_path / "other.npz", torch.zeros(9, 1, 16, 16, dtype=torch.uint8))
    evaluate(f"run={trained}", f"samples={pictures}", f"reference={other}", f"out={tmp_path}/o", code=2)
    error = capsys.readouterr().err
    assert "grey 8x8" in error and "grey 16x16" in error and "nothing is resized" in error


def test_statistics_from_elsewhere_need_the_published_features(trained, pictures, tmp_path, capsys):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(32), sigma=np.eye(32))
    evaluate(
        f"run={trained}",
        f"samples={pictures}",
        f"reference={tmp_path}/stats.npz",
        f"out={tmp_path}/o",
        code=2,
    )
    assert "those of the published Inception network" in capsys.readouterr().err


def test_a_pass_in_blocks_goes_on_where_it_stopped_with_the_same_bits(trained, tmp_path, monkeypatch, capsys):
    from diffusion_lab.app.scoring import measuring

    images = digits("train")[0]
    samples = as_array(tmp_path / "train.npz", images)
    words = (f"run={trained}", f"samples={samples}", "measures=[frechet,prdc]")
    monkeypatch.setattr(measuring, "BLOCK", 500)
    evaluate(*words, f"out={tmp_path}/whole")
    whole = [record["value"] for record in records(tmp_path / "whole")]
    # stopped in the third block
    made = []
    block_of = measuring.block_of

    def stopping(images, rows, *more):
        if images.name.endswith("train.npz"):
            made.append(rows.start)
            if len(made) == 3:
                raise KeyboardInterrupt
        return block_of(images, rows, *more)

    monkeypatch.setattr(measuring, "block_of", stopping)
    with pytest.raises(BaseException):  # noqa: B017
        tiny_runs.main("evaluate", *words, f"out={tmp_path}/stopped")
        raise RuntimeError
    evaluate(*words, f"out={tmp_path}/again")
    assert made == [0, 500, 1000, 1000]
    assert [record["value"] for record in records(tmp_path / "again")] == whole


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(trained, tmp_path):
    images = digits("train")[0].repeat(7, 1, 1, 1)
    samples = as_array(tmp_path / "train.npz", images)
    for devices in (1, 2):
        evaluate(f"run={trained}", f"samples={samples}", f"devices={devices}", f"out={tmp_path}/{devices}")
    one, two = (records(tmp_path / str(devices)) for devices in (1, 2))
    assert [record["value"] for record in one] == [record["value"] for record in two]


def test_sets_without_a_run_in_a_sweep_end_in_a_page(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k, n in enumerate((40, 80)):
        as_array(tmp_path / f"{k}.npz", digits()[0][:n])
    evaluate("-m", "samples=0.npz,1.npz", f"reference={pictures}", "metrics=pixels", f"out={tmp_path}/o")
    out = capsys.readouterr().out
    (page,) = (tmp_path / "runs" / "comparisons").glob("*.html")
    assert "comparison" in out and "1.npz" in page.read_text()


def test_a_reference_called_train_is_not_the_train_split(trained, tmp_path, capsys):
    folder = as_pictures(tmp_path / "train", digits()[0][:50])
    evaluate(
        f"run={trained}",
        f"samples={folder}",
        f"reference={folder}",
        "measures=[frechet,memorisation]",
        f"out={tmp_path}/o",
    )
    frechet, copies, _ = records(tmp_path / "o")
    assert (
        frechet["reference"] == str(folder) and f"reference {folder} instead of test" in frechet["deviations"]
    )
    # copies are sought in what the model was trained on, and beside them stands what it never saw
    assert copies["reference"] == "train" and copies["reference_n"] == 1437 and copies["real_n"] == 360


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((30, 10), np.int64), "labels are one number an image"),
        (np.zeros(30), "labels must be integers, these are float64"),
    ],
)
def test_labels_that_are_none_are_one_line(labels, message, trained, tmp_path, capsys):
    samples = as_array(tmp_path / "a.npz", digits()[0][:30], labels=labels)
    evaluate(f"run={trained}", f"samples={samples}", f"out={tmp_path}/o", code=2)
    assert message in capsys.readouterr().err


def test_labels_in_a_column_are_labels(trained, tmp_path):
    images, labels = digits()
    samples = as_array(tmp_path / "a.npz", images[:100], labels=labels[:100, None].numpy())
    evaluate(f"run={trained}", f"samples={samples}", f"out={tmp_path}/o")
    assert 0.9 < records(tmp_path / "o")[1]["value"] <= 1


def test_lossy_pictures_say_so(trained, tmp_path):
    folder = as_pictures(tmp_path / "jpegs", digits()[0][:20], ".jpg")
    evaluate(f"run={trained}", f"samples={folder}", f"out={tmp_path}/o")
    assert any("lossy (.jpg)" in line for line in records(tmp_path / "o")[0]["deviations"])


def test_another_set_on_the_disk_is_another_set(tmp_path):
    from diffusion_lab.data.image_sets import Split
    from diffusion_lab.data.stored_images import identity

    class Rows:
        def __init__(self, step):
            self.step = step

        def __len__(self):
            return 9000

        def read(self, rows):
            return torch.from_numpy((rows % self.step == 0).astype(np.uint8)).reshape(-1, 1, 1, 1), None

    # every second one differs: rows at even distances would not notice
    assert identity(Split(Rows(1), "train")) != identity(Split(Rows(2), "train"))
