"""The run folder: names, `latest`, identity, locks, the record, and the folder of a real tiny run."""

import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_runs
import yaml

from diffusion_lab.app.errors import UserError
from diffusion_lab.app.runs import record, resume, run
from diffusion_lab.files import write_atomically

CONFIG = {
    "name": "digits/quickstart",
    "run_id": None,
    "resume": None,
    "seed": 0,
    "max_images": 100,
    "paths": {"runs": "runs", "run": "x", "data": "data"},
    "dataset": {"_target_": "diffusion_lab.data.digits.Digits", "seed": 0, "num_workers": 0},
    "trainer": {"devices": 1, "precision": "32-true"},
    "optimizer": {"lr": 1e-3},
    "callbacks": {
        "ema": {
            "_target_": "diffusion_lab.callbacks.EMACallback",
            "profiles": {"ema": {"half_life_images": 5}},
        },
        "checkpoints": {"_target_": "diffusion_lab.callbacks.Checkpoints", "every_images": 5, "dirpath": "a"},
        "gradient_norm": {"_target_": "diffusion_lab.callbacks.GradientNorm", "every_images": 5, "clip": 1.0},
    },
}


def changed(path, value):
    config = json.loads(json.dumps(CONFIG))
    node = config
    *inner, last = path.split(".")
    for key in inner:
        node = node[key]
    node[last] = value
    return config


def test_jobs_of_one_second_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: run.create(tmp_path, "a/b").path, range(24)))
    assert len(set(made)) == 24 and all(path.parent == tmp_path / "a" / "b" for path in made)
    assert (tmp_path / "a" / "b" / "latest").resolve() in made
    assert not (tmp_path / "a" / "b" / "latest").readlink().is_absolute()


def test_latest_is_the_newest(tmp_path):
    for run_id in ("one", "two"):
        folder = run.create(tmp_path, "a", run_id)
        assert (tmp_path / "a" / "latest").resolve() == folder.path.resolve()


def test_a_taken_run_id_is_refused_and_the_folder_left_alone(tmp_path):
    folder = run.create(tmp_path, "a", "mine")
    (folder.path / "kept").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        run.create(tmp_path, "a", "mine")
    assert (folder.path / "kept").read_text() == "x"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("max_images", 7),
        ("run_id", "other"),
        ("paths.run", "elsewhere"),
        ("dataset.num_workers", 4),
        ("trainer.devices", 2),
        ("callbacks.checkpoints.every_images", 9),
        ("callbacks.gradient_norm.every_images", 9),
    ],
)
def test_what_does_not_change_the_trajectory_is_not_identity(path, value):
    assert run.identity(changed(path, value)) == run.identity(CONFIG)
    assert run.difference(CONFIG, changed(path, value)) is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("optimizer.lr", 2e-3),
        ("trainer.precision", "bf16-mixed"),
        ("callbacks.ema.profiles.ema.half_life_images", 6),
        ("callbacks.gradient_norm.clip", 0.5),
        ("dataset.seed", 1),
    ],
)
def test_what_changes_the_trajectory_is_identity_and_is_named(path, value):
    assert run.identity(changed(path, value)) != run.identity(CONFIG)
    assert path in run.difference(CONFIG, changed(path, value))


def _claim(path, answer):
    try:
        with run.claimed(run.RunFolder(path)):
            answer.put("claimed")
    except UserError as error:
        answer.put(str(error))


def test_a_run_belongs_to_one_process_at_a_time(tmp_path):
    answer = multiprocessing.get_context("fork").Queue()

    def other():
        process = multiprocessing.get_context("fork").Process(target=_claim, args=(tmp_path, answer))
        process.start()
        process.join()
        return answer.get()

    with run.claimed(run.RunFolder(tmp_path)):
        assert "is being trained by another process" in other()
    assert other() == "claimed"


def test_writing_aside_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomically(path, "old")

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_record_has_one_session_for_each_start(tmp_path):
    path = tmp_path / "record.json"
    for status in ("preempted", "finished"):
        record.start(path, command="python train.py seed=1", facts={"seed": 1})
        assert record.read(path)["status"] == "running"
        record.finish(path, status, {"images_seen": 5})
    told = record.read(path)
    assert [s["status"] for s in told["sessions"]] == ["preempted", "finished"] and told[
        "status"
    ] == "finished"
    assert told["sessions"][0]["versions"]["torch"] and told["sessions"][0]["hardware"]["cores"] >= 1
    assert record.training_seconds(told) >= 0.0


def test_the_command_can_be_pasted_into_a_shell():
    assert record.command("train", ["model.multipliers=[1,2]", "name=a b"]) == (
        "python train.py 'model.multipliers=[1,2]' 'name=a b'"
    )


def test_resume_of_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^resume=.*no such folder"):
        resume.decide({**CONFIG, "resume": str(tmp_path / "nowhere")})


def test_a_tiny_run_leaves_the_whole_folder(tmp_path, capsys):
    folder = tiny_runs.train(tmp_path, pictures=True).resolve()
    printed = capsys.readouterr().out
    for name in (
        "config.yaml",
        "record.json",
        "metrics.csv",
        "report.html",
        "export/ema.safetensors",
        "export/config.yaml",
    ):
        assert (folder / name).is_file(), name
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (
        config["choices"]["sampler"]
        and config["run_id"] == folder.name
        and "${" not in (folder / "config.yaml").read_text()
    )
    told = tiny_runs.record_of(folder)
    assert told["status"] == "finished" and told["command"].startswith(
        "python train.py name=digits/quickstart"
    )
    assert told["sessions"][0]["images_seen"] == 320 and "commit" in (
        told["sessions"][0]["git"] or {"commit": ""}
    )
    assert str(folder / "report.html") in printed or "report.html" in printed
    assert list((folder / "samples").glob("grid-*.png"))


def test_jobs_of_a_sweep_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        *tiny_runs.TINY,
        *tiny_runs.NO_PICTURES,
        f"paths.runs={tmp_path}",
        "max_images=32",
        "seed=0,1",
        "-m",
    ]
    assert tiny_runs.main("train", *words) == 0
    folders = [path for path in (tmp_path / "digits" / "quickstart").iterdir() if not path.is_symlink()]
    seeds = {yaml.safe_load((path / "config.yaml").read_text())["seed"] for path in folders}
    assert len(folders) == 2 and seeds == {0, 1}


def test_a_run_that_never_began_leaves_nothing(tmp_path, capfd):
    from diffusion_lab.app import cli

    home = tmp_path / "digits" / "quickstart"
    first = run.create(tmp_path, "digits/quickstart")
    write_atomically(first.config, "name: digits/quickstart\n")
    words = ["experiment=digits/quickstart", f"paths.runs={tmp_path}", "model.attention=[3]"]
    assert cli.main("train", words) == 2
    assert "attention" in capfd.readouterr().err
    assert (home / "latest").resolve() == first.path.resolve()
    assert [p.name for p in home.iterdir() if not p.is_symlink()] == [first.path.name]


@pytest.mark.parametrize("words", [["callbacks=none", "debug=fast"]])
def test_a_run_without_checkpoints_ends_in_a_table(tmp_path, capfd, words):
    from diffusion_lab.app import cli

    assert cli.main("train", ["experiment=digits/quickstart", f"paths.runs={tmp_path}", *words]) == 0
    assert "none kept" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=image_folder", "dataset.root=nowhere", "name=deep/er"], "there is no folder nowhere"),
        (["experiment=digits/quickstart", "model.attention=[3]"], "choose another model="),
    ],
)
def test_a_failed_first_run_leaves_no_folder_at_all(tmp_path, capfd, words, message):
    from diffusion_lab.app import cli

    assert cli.main("train", [*words, f"paths.runs={tmp_path / 'runs'}"]) == 2
    out, error = capfd.readouterr()
    assert message in error and error.count("\n") == 1
    # nor the name of one
    assert not (tmp_path / "runs").exists() and str(tmp_path) not in out


def test_a_bare_command_says_what_it_trains(tmp_path, capsys, monkeypatch):
    from diffusion_lab.app import cli, train

    def stop(*_):
        raise UserError("far enough")

    monkeypatch.setattr(train, "fit", stop)
    line = "no experiment was chosen: the defaults train unet_tiny on digits for 1,000,000 images"
    assert cli.main("train", [f"paths.runs={tmp_path}"]) == 2
    assert capsys.readouterr().out.startswith(line)
    for words in (["experiment=toy/quickstart"], ["max_images=1000"], ["debug=fast"]):
        assert cli.main("train", [f"paths.runs={tmp_path}", *words]) == 2
        assert "no experiment" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method=iddpm"], "set model.out_channels=2"),
        (["method=multiscale"], "set method.loss.base"),
        (["dataset.size=16", "callbacks=[default,frechet]"], "digits-cnn takes images (N, 1, 8, 8)"),
    ],
)
def test_what_does_not_fit_together_is_one_line_and_leaves_no_folder(tmp_path, capsys, words, told):
    code = tiny_runs.main("train", *tiny_runs.TINY, f"paths.runs={tmp_path}", *words)
    error = capsys.readouterr().err
    assert code != 0 and told in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not list(tmp_path.rglob("config.yaml"))
