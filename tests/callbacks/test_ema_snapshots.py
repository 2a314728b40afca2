import errno
import os

import pytest
import torch
from tiny_training import BATCH, fit

from diffusion_lab.callbacks import EMACallback, EMASnapshots
from diffusion_lab.ema import ConstantDecay, PowerFunction
from diffusion_lab.modules import CheckpointNotSaved, RunError, find_resumable
from diffusion_lab.modules.snapshot_io import list_snapshots, read_snapshot, save_snapshot


def snapshots(folder, **options):
    return EMASnapshots(dirpath=str(folder / "snapshots"), **{"every_images": 24, **options})


def times(folder):
    found, damaged = list_snapshots(folder / "snapshots")
    assert not damaged
    return [item.images_seen for item in found]


def contents(folder):
    """Names, facts and values; safetensors write the facts in any order."""
    found, _ = list_snapshots(folder / "snapshots")
    assert {item.path for item in found} == set((folder / "snapshots").iterdir())
    return {
        (item.path.name, item.average, item.sigma_rel, item.images_seen, key): value.tolist()
        for item in found
        for key, value in read_snapshot(item).items()
    }


class AsTheyWere(EMACallback):
    """Keeps what the averages were after each step."""

    def on_step(self, trainer, module):
        super().on_step(trainer, module)
        self.history = getattr(self, "history", {})
        self.history[module.images_seen] = {
            name: {key: value.clone() for key, value in average.state_dict().items()}
            for name, average in self.averages.items()
        }


def test_every_power_function_average_is_written_after_its_update(tmp_path, monkeypatch):
    import tiny_training

    kept = []

    def make(**options):
        kept.append(AsTheyWere(**options))
        return kept[-1]

    monkeypatch.setattr(tiny_training, "EMACallback", make)
    # in front of the averages, where it must not stay
    _, trainer = fit(tmp_path, 10 * BATCH, extra=[snapshots(tmp_path, dtype="float32")])
    order = [type(item).__name__ for item in trainer.callbacks]
    assert order.index("EMASnapshots") == order.index("AsTheyWere") + 1 and order[-1] == "Checkpoints"
    found, _ = list_snapshots(tmp_path / "snapshots")
    assert [(item.images_seen, item.average, item.sigma_rel) for item in found] == [
        (24, "power", 0.1), (48, "power", 0.1), (72, "power", 0.1),
    ]  # fmt: skip
    for item in found:
        expected = kept[0].history[item.images_seen]["power"]
        got = read_snapshot(item)
        assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
    assert not list((tmp_path / "snapshots").glob(".*"))


def test_half_precision_is_the_nearest_half(tmp_path):
    fit(tmp_path / "whole", 6 * BATCH, extra=[snapshots(tmp_path / "whole", dtype="float32")])
    fit(tmp_path / "half", 6 * BATCH, extra=[snapshots(tmp_path / "half")])
    for whole, half in zip(
        *(list_snapshots(tmp_path / name / "snapshots")[0] for name in ("whole", "half")), strict=True
    ):
        exact, rounded = read_snapshot(whole), read_snapshot(half)
        assert all(torch.equal(exact[key].half(), rounded[key]) for key in exact)


def test_what_half_precision_cannot_hold_and_what_is_no_parameter_keep_their_type(tmp_path):
    tied = torch.tensor([0.1])
    state = {"large": torch.tensor([1e5]), "a": tied, "b": tied, "count": torch.tensor(3), "grid": tied / 3}
    state["mirror"] = state["grid"]
    save_snapshot(
        tmp_path,
        state,
        average="p",
        sigma_rel=0.1,
        images_seen=8,
        buffers=["count", "grid", "mirror"],
        dtype="float16",
    )
    (item,), damaged = list_snapshots(tmp_path)
    got = read_snapshot(item)
    assert torch.equal(got["large"], state["large"]) and got["a"].dtype == got["b"].dtype == torch.float16
    assert torch.equal(got["count"], state["count"]) and torch.equal(got["grid"], state["grid"])
    assert item.buffers == {"count", "grid", "mirror"} and not damaged


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (4, [8, 16, 24, 32]),
        (5, [8, 16, 24, 32]),
        (6, [16, 32, 48]),
        (8, [16, 32, 48, 64]),
        (12, [32, 64, 96]),
    ],
)
def test_the_interval_doubles_where_there_would_be_too_many(tmp_path, steps, expected):
    fit(tmp_path, steps * BATCH, extra=[snapshots(tmp_path, every_images=8, at_most=4)])
    assert times(tmp_path) == expected


def test_a_resumed_run_has_the_snapshots_of_an_uninterrupted_one(tmp_path):
    """Also those that it left beyond its checkpoint, damaged ones among them, are not there any more."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(whole, 13 * BATCH, extra=[snapshots(whole, every_images=16)])
    fit(cut, 13 * BATCH, extra=[snapshots(cut, every_images=16)])
    (cut / "checkpoints" / "images-0000000104.ckpt").unlink()
    path, _ = find_resumable(cut / "checkpoints")
    assert path.name == "images-0000000080.ckpt"
    later = [file for file in (cut / "snapshots").iterdir() if "0000000096" in file.name]
    assert len(later) == 1
    later[0].write_bytes(b"another future")
    stranger = cut / "snapshots" / "power-0000000099.safetensors"
    stranger.write_bytes(b"another future")
    (cut / "snapshots" / ".power-0000000048.safetensors.77.tmp").write_bytes(b"half")
    fit(cut, 13 * BATCH, resume=path, extra=[snapshots(cut, every_images=16)])
    assert times(cut) == [16, 32, 48, 64, 80, 96] and contents(cut) == contents(whole)


def test_nothing_of_another_future_is_left_even_before_the_next_one_is_due(tmp_path):
    fit(tmp_path, 10 * BATCH, extra=[snapshots(tmp_path, every_images=8)])
    path = tmp_path / "checkpoints" / "images-0000000040.ckpt"
    fit(tmp_path, 6 * BATCH, resume=path, extra=[snapshots(tmp_path, every_images=400)])
    assert times(tmp_path) == [8, 16, 24, 32, 40]


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("diffusion_lab.files.os.fsync", full)
    with pytest.raises(CheckpointNotSaved, match=r"snapshot .* was not saved: No space left") as error:
        save_snapshot(
            tmp_path,
            {"w": torch.ones(2)},
            average="p",
            sigma_rel=0.1,
            images_seen=8,
            buffers=(),
            dtype="float16",
        )
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_bad_settings_are_refused(tmp_path):
    for options in ({"every_images": 0}, {"at_most": 1}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="EMASnapshots"):
            snapshots(tmp_path, **options)


@pytest.mark.parametrize("profiles", [None, {}, {"ema": ConstantDecay()}])
def test_without_a_power_function_the_run_does_not_start(tmp_path, profiles):
    class Trainer:
        callbacks = [] if profiles is None else [EMACallback(profiles=profiles)]

    with pytest.raises(RunError, match="averages=posthoc"):
        snapshots(tmp_path).setup(Trainer(), None, "fit")
    Trainer.callbacks = [EMACallback(profiles={"p": PowerFunction(sigma_rel=0.1)})]
    snapshots(tmp_path).setup(Trainer(), None, "fit")


def test_damaged_files_are_told_and_others_passed_over(tmp_path):
    save_snapshot(
        tmp_path, {"w": torch.ones(2)}, average="p", sigma_rel=0.1, images_seen=8, buffers=(), dtype="float32"
    )
    (tmp_path / "p-0000000016.safetensors").write_bytes(b"cut short")
    (tmp_path / "mine.safetensors").write_bytes(b"not ours")
    found, damaged = list_snapshots(tmp_path)
    assert [item.images_seen for item in found] == [8]
    assert len(damaged) == 1 and "p-0000000016.safetensors is damaged" in damaged[0]


def test_a_longer_interval_on_resuming_takes_nothing_away(tmp_path):
    fit(tmp_path, 10 * BATCH, extra=[snapshots(tmp_path)])
    newest, _ = find_resumable(tmp_path / "checkpoints")
    # the next moment is 96 images, at which neither 24, 48 nor 72 would be due
    fit(tmp_path, 13 * BATCH, extra=[snapshots(tmp_path, every_images=96)], resume=newest)
    assert times(tmp_path) == [24, 48, 72, 96]
