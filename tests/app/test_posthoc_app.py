"""Averages made after training, on the command line of sample.py and evaluate.py."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch

from diffusion_lab.app.build import load_denoiser
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.export import __main__ as export
from diffusion_lab.app.runs.posthoc import make, parse
from diffusion_lab.app.runs.weights import averages_of, read_weights
from diffusion_lab.ema import PowerFunction
from diffusion_lab.modules.checkpoint_io import list_checkpoints, load_checkpoint
from diffusion_lab.modules.snapshot_io import save_snapshot

END, N = 640, 20
# tiny_runs names the average that it shortens
WORDS = [word for word in tiny_runs.TINY if not word.startswith("averages.")]
CHECKED = {"direct": 0.075, "wide": 0.15}


@pytest.fixture(scope="module", autouse=True)
def no_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with snapshots every 32 images; it also tracks two widths that are in no snapshot, to compare with."""
    runs = tmp_path_factory.mktemp("runs")
    extra = [
        f"+averages.{name}={{_target_:diffusion_lab.ema.PowerFunction,sigma_rel:{width}}}"
        for name, width in CHECKED.items()
    ]
    words = [
        *WORDS, "averages=posthoc", *extra, "callbacks=[default,ema_snapshots]", "~callbacks.sample_grid",
        "callbacks.ema_snapshots.every_images=32", "callbacks.ema_snapshots.dtype=float32",
        "callbacks.checkpoints.keep=9", f"paths.runs={runs}", f"max_images={END}",
    ]  # fmt: skip
    assert tiny_runs.main("train", *words) == 0
    folder = (runs / "digits" / "quickstart" / "latest").resolve()
    for name in CHECKED:
        for file in (folder / "snapshots").glob(f"{name}-*"):
            file.unlink()
    return folder


def tracked(run, name, images=END):
    path = next(item for item in list_checkpoints(run / "checkpoints") if f"{images:010d}" in item.name)
    return averages_of(load_checkpoint(path))[name]


def apart(a, b):
    """Largest difference of two state dicts, relative to the largest weight of each tensor."""
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max() / b[key].abs().max().clamp_min(1e-3)) for key in b)


def test_a_tracked_width_at_the_end_is_the_tracked_average(run):
    for ema, name in (("posthoc_0.05", "power_005"), ("posthoc_0.1", "power_010")):
        weights = read_weights(run, ema)
        assert weights.name == ema and weights.images_seen == END
        assert apart(weights.tensors, tracked(run, name)) < 1e-6


@pytest.mark.parametrize(("name", "width"), CHECKED.items())
def test_a_width_that_is_in_no_snapshot_is_what_tracking_would_have_given(run, name, width):
    made, direct = read_weights(run, f"posthoc_{width}").tensors, tracked(run, name)
    near = min(apart(tracked(run, other), direct) for other in ("power_005", "power_010"))
    assert apart(made, direct) < 0.02 * near


def test_as_of_an_earlier_moment(run):
    """From the snapshots of then alone; at a moment of which there is a checkpoint to compare with."""
    weights = read_weights(run, "posthoc_0.1@320")
    assert (weights.name, weights.images_seen) == ("posthoc_0.1@320", 320)
    assert apart(weights.tensors, tracked(run, "power_010", 320)) < 1e-6
    near = apart(tracked(run, "power_010", 320), tracked(run, "direct", 320))
    assert apart(read_weights(run, "posthoc_0.075@320").tensors, tracked(run, "direct", 320)) < 0.1 * near
    assert read_weights(run, f"posthoc_0.075@{END}").sha256 == read_weights(run, "posthoc_0.075").sha256


def test_samples_of_a_tracked_width_are_those_of_the_tracked_average(run, tmp_path):
    images = {}
    for ema in ("posthoc_0.10", "power_010", "power_005"):
        out = tmp_path / ema
        assert tiny_runs.main("sample", f"run={run}", f"ema={ema}", f"out={out}", f"num_samples={N}") == 0
        images[ema] = tiny_runs.images_of(out)[0].astype(int)
    # weights agree up to rounding, so a byte may round the other way
    assert np.abs(images["posthoc_0.10"] - images["power_010"]).max() <= 1
    assert np.abs(images["power_005"] - images["power_010"]).max() > 1
    told = tiny_runs.record_of(tmp_path / "posthoc_0.10")
    assert told["weights"]["ema"] == "posthoc_0.1" and told["weights"]["source"] == str(run / "snapshots")


@pytest.mark.slow
def test_a_sweep_of_widths_ends_in_a_page_that_marks_the_best(run, capsys):
    widths = ["posthoc_0.05", "posthoc_0.1", "posthoc_0.2", "posthoc_0.1@320"]
    words = [f"run={run}", f"ema={','.join(widths)}", f"num_samples={N}", "--multirun"]
    assert tiny_runs.main("evaluate", *words) == 0
    out = capsys.readouterr().out
    text = Path(re.fullmatch(r"comparison  (\S+\.html)", out.splitlines()[-1])[1]).read_text()
    assert "<th>ema</th>" in text
    lines = re.findall(r"<tr[^>]*>(<td.*?)</tr>", text)
    cells = [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<td.*?</td>", line)] for line in lines]
    table = {row[0].lstrip("●"): row[1] for row in cells if row[0].lstrip("●") in widths}
    assert list(table) != [] and set(table) == set(widths)
    distances = {name: float(value.removeprefix("best&ensp;")) for name, value in table.items()}
    marked = [name for name, value in table.items() if value.startswith("best")]
    assert marked == [min(distances, key=distances.get)]
    shown = "\n".join(out.splitlines()[-9:])
    assert all(width in shown for width in widths)


@pytest.mark.slow
def test_two_processes_make_the_same_average(run, tmp_path):
    words = [f"run={run}", "ema=posthoc_0.075", "num_samples=128"]
    assert tiny_runs.main("sample", *words, f"out={tmp_path / 'one'}") == 0
    assert tiny_runs.main("sample", *words, f"out={tmp_path / 'two'}", "devices=2") == 0
    assert np.array_equal(*(tiny_runs.images_of(tmp_path / name)[0] for name in ("one", "two")))


def test_a_weak_model_of_autoguidance(run, tmp_path):
    words = [
        "guidance=autoguidance",
        "guidance.scale=2",
        "guidance.weak.ema=posthoc_0.2@320",
        "ema=posthoc_0.05",
    ]
    assert tiny_runs.main("sample", f"run={run}", *words, f"out={tmp_path / 's'}", f"num_samples={N}") == 0
    told = tiny_runs.record_of(tmp_path / "s")
    assert told["settings"]["generation"]["guidance"]["weak"]["ema"] == "posthoc_0.2@320"
    assert f"weak={run.name}/posthoc_0.2@320" in told["guidance"]


def test_a_chosen_width_can_be_given_away(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    monkeypatch.setattr(sys, "argv", ["export", str(copy), "posthoc_0.075"])
    assert export.main() == 0
    path = copy.resolve() / "export" / "posthoc_0.075.safetensors"
    assert path.is_file() and capsys.readouterr().out == f"weights  {path}\n"
    monkeypatch.setattr(sys, "argv", ["export", str(copy), "pothoc"])
    assert export.main() == 2 and capsys.readouterr().err.startswith("error: ema=pothoc: ")
    away = load_denoiser(copy / "export", "posthoc_0.075")
    assert away.sha256 == read_weights(run, "posthoc_0.075").sha256 and away.images_seen == END
    # what stood first still does
    assert load_denoiser(copy / "export").ema == "power_005"
    with pytest.raises(UserError, match=r"^ema=posthoc_0.08: .* is an export, which holds no snapshots"):
        read_weights(copy / "export", "posthoc_0.08")


def test_snapshots_beyond_the_checkpoint_are_not_used(run, tmp_path):
    """A run killed after a snapshot and before its checkpoint has not come that far."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for path in list_checkpoints(copy / "checkpoints"):
        if path.name != "images-0000000320.ckpt":
            path.unlink()
    weights = read_weights(copy, "posthoc_0.075")
    assert weights.images_seen == 320
    assert apart(weights.tensors, read_weights(run, "posthoc_0.075@320").tensors) < 1e-6
    with pytest.raises(UserError, match=r"from 32 to 320 images, and none of 640; the nearest is @320"):
        read_weights(copy, "posthoc_0.075@640")


def test_a_damaged_snapshot_is_passed_over_and_told(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    next((copy / "snapshots").glob("power_010-*0096.safetensors")).write_bytes(b"cut short")
    made = read_weights(copy, "posthoc_0.075").tensors
    assert "power_010-0000000096.safetensors is damaged" in capsys.readouterr().out
    assert 0 < apart(made, read_weights(run, "posthoc_0.075").tensors) < 1e-3


@pytest.mark.slow
def test_mistakes_are_one_clear_line(run, tmp_path, capsys):
    said = {
        "posthoc_0.5": "ema=posthoc_0.5: the relative width must be in (0, 0.28]",
        "posthoc_0": "ema=posthoc_0: the relative width must be in (0, 0.28]",
        "posthoc_1e-300": "ema=posthoc_1e-300: the relative width must be in (0, 0.28]",
        "posthoc_0.0.1": "ema=posthoc_0.0.1: posthoc_<width> is meant",
        "posthoc": "ema=posthoc: posthoc_<width> is meant",
        "posthoc_0.1@last": "ema=posthoc_0.1@last: posthoc_<width> is meant",
        "posthoc_0.1@300": "snapshots of 20 moments, from 32 to 640 images, and none of 300; the nearest is @288",
        "posthoc_0.02@32": "cannot make this profile",
        "posthok_0.1": "has no such weights",
    }
    for ema, line in said.items():
        assert tiny_runs.main("sample", f"run={run}", f"ema={ema}", f"out={tmp_path}") == 2
        err = capsys.readouterr().err
        assert line in err and err.count("\n") == 1, (ema, err)
    assert (
        tiny_runs.main("sample", f"run={run}", "guidance=autoguidance", "guidance.weak.ema=posthoc_0.9") == 2
    )
    assert "guidance.weak.ema=posthoc_0.9: the relative width" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("snapshots"))
    with pytest.raises(
        UserError, match=r"has no snapshots .* averages=posthoc callbacks=\[default,ema_snapshots\]"
    ):
        read_weights(bare, "posthoc_0.1")


def test_an_inexact_profile_is_said(run, capsys):
    read_weights(run, "posthoc_0.03@320")
    assert re.fullmatch(
        r"ema=posthoc_0.03@320: its profile is off by \d+ %, for want of snapshots\n", capsys.readouterr().out
    )
    read_weights(run, "posthoc_0.075")
    assert capsys.readouterr().out == ""


def test_snapshots_of_two_networks_are_not_mixed(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    save_snapshot(
        copy / "snapshots", {"other": torch.ones(2)}, average="power_005", sigma_rel=0.05, images_seen=48,
        buffers=(), dtype="float32",
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"^ema=posthoc_0.1: .*snapshots: the snapshots are of different networks"
    ):
        read_weights(copy, "posthoc_0.1")


def test_buffers_are_those_of_the_moment(tmp_path):
    for k in (1, 2, 3, 4):
        for name, width in (("power_005", 0.05), ("power_010", 0.1)):
            state = {"w": torch.tensor([2.0]), "count": torch.tensor(k), "grid": torch.tensor([k / 3])}
            save_snapshot(
                tmp_path / "snapshots", state, average=name, sigma_rel=width, images_seen=8 * k,
                buffers=["count", "grid"], dtype="float16",
            )  # fmt: skip
    for ema, moment in (("posthoc_0.075", 4), ("posthoc_0.075@24", 3)):
        made, images = make(tmp_path, parse(ema), {}, 39)
        assert images == 8 * moment and int(made["count"]) == moment
        assert torch.equal(made["grid"], torch.tensor([moment / 3])) and made["w"].item() == pytest.approx(
            2.0
        )


def test_names_survive_being_read_again():
    for text in ("posthoc_0.075", "posthoc_0.1@320", "posthoc_0.0512345678", "posthoc_5e-2"):
        wanted = parse(text)
        assert parse(wanted.name) == wanted
        assert wanted.gamma == PowerFunction(sigma_rel=wanted.sigma_rel).gamma
    assert parse("ema") is parse(None) is parse("raw") is None


def test_snapshots_without_a_power_function_are_a_clear_line(tmp_path, capsys):
    words = [*tiny_runs.TINY, "callbacks=[default,ema_snapshots]", f"paths.runs={tmp_path}", "max_images=32"]
    assert tiny_runs.main("train", *words) != 0
    err = capsys.readouterr().err
    assert "EMASnapshots: no average has a power-function profile; choose averages=posthoc" in err
    assert err.count("\n") == 1
