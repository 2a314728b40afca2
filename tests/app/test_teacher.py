"""A student's run from the command line: it takes over from its teacher's run, names it, and does without it later."""

import json
import shutil

import pytest
import tiny_runs
import torch
from omegaconf import OmegaConf

from diffusion_lab.app.build import load_denoiser
from diffusion_lab.app.config.choices import complete as sampling
from diffusion_lab.app.config.choices import read_run
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.runs.run import identity
from diffusion_lab.app.runs.weights import metadata
from diffusion_lab.app.session import conf_folder
from diffusion_lab.app.teacher import complete

# two halvings, three steps each
STUDENT = [
    "method=progressive", "method.steps_from=4", "name=student", "batch_size=16", "max_images=96", "sampler=ddim",
    "grid=uniform_u", "grid.steps=1", "guidance=none", "averages=none", "optimizer=adam", "weighting=truncated_snr",
    "trainer=cpu", "~callbacks.sample_grid", "~callbacks.throughput", "callbacks.checkpoints.every_images=16",
    "callbacks.checkpoints.keep=9",
]  # fmt: skip


def slow(words, message):
    return pytest.param(words, message, marks=pytest.mark.slow)


def train(runs, *more, code=0):
    assert tiny_runs.main("train", *STUDENT, f"paths.runs={runs}", *more) == code
    return (runs / "student" / "latest").resolve() if code == 0 else None


def sample(out, run, *more, code=0):
    words = [f"run={run}", f"out={out}", "num_samples=8", *more]
    assert tiny_runs.main("sample", *words) == code
    return tiny_runs.images_of(out)[0] if code == 0 else None


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    # a schedule and a size that are no defaults
    return tiny_runs.train(root, "schedule=cosine_10", "dataset.size=16", max_images=64).resolve()


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    # a copy, so that it can be taken away
    away = tmp_path_factory.mktemp("away") / "teacher"
    shutil.copytree(teacher, away)
    folder = train(tmp_path_factory.mktemp("runs"), f"method.teacher.run={away}")
    assert read_run(folder)["method"]["teacher"]["run"] == str(away)
    shutil.rmtree(away)
    return folder


def test_the_student_takes_over_what_its_teacher_recorded(teacher, student):
    theirs, own = read_run(teacher), read_run(student)
    for key in ("dataset", "model", "interpolant", "prediction", "schedule", "shape", "num_classes"):
        assert theirs[key] == own[key], key
    assert own["shape"] == [1, 16, 16] and own["model"]["channels"] == 8
    assert own["method"]["denoiser"] == theirs["method"]["denoiser"]
    assert own["choices"]["schedule"] == "cosine_10" and own["choices"]["dataset"] == "digits"
    assert own["method"]["loss"]["schedule"]["logsnr_max"] == 10.0


def test_config_record_export_and_card_name_the_teacher(teacher, student):
    loaded = load_denoiser(teacher)
    node = read_run(student)["method"]["teacher"]
    assert (
        node["ema"] == "ema" == loaded.ema
        and node["sha256"] == loaded.sha256
        and set(node) == {"run", "ema", "sha256"}
    )
    assert tiny_runs.record_of(student)["teacher"] == node
    told = tiny_runs.record_of(student)["sessions"][0]["command"]
    assert "method.teacher.run=" in told and "from_run" not in told and "sigma_data" not in told
    export = read_run(student / "export")
    assert export["method"]["teacher"] == {**node, "run": "teacher"}
    assert node["sha256"][:16] in (student / "export" / "README.md").read_text()


def test_it_is_sampled_without_the_teachers_folder(student, tmp_path):
    one = sample(tmp_path / "one", student)
    assert one.shape == (8, 16, 16, 1)
    two = sample(tmp_path / "two", student, "ema=steps_2", "grid.steps=2")
    assert (one != two).any()
    assert load_denoiser(student).ema == load_denoiser(student / "export").ema == "raw"


@pytest.mark.slow
def test_its_export_and_its_scores_do_without_it_too(student, tmp_path):
    one = sample(tmp_path / "one", student)
    two = sample(tmp_path / "two", student, "ema=steps_2", "grid.steps=2")
    # the last student is the run itself
    assert (sample(tmp_path / "last", student, "ema=steps_1") == one).all()
    again = sample(tmp_path / "export", student / "export", "ema=steps_2", "grid.steps=2")
    assert (again == two).all()
    facts = metadata(student / "export" / "steps_2.safetensors")
    assert facts["images_seen"] == "48" and facts["average"] == "steps_2"
    words = [
        f"run={student}",
        "num_samples=16",
        "metrics=pixels",
        "ema=steps_2",
        f"out={tmp_path / 'scores'}",
    ]
    assert tiny_runs.main("evaluate", *words) == 0


def test_a_name_that_is_not_there_is_one_line(student, tmp_path, capsys):
    capsys.readouterr()
    sample(tmp_path / "s", student, "ema=steps_3", code=2)
    error = capsys.readouterr().err
    assert (
        error.endswith("has no such weights; there are: raw, steps_1, steps_2\n") and error.count("\n") == 1
    )


def test_an_unfinished_teacher_and_what_comes_next_are_told(teacher, tmp_path, capsys):
    place = tmp_path / "teacher"
    shutil.copytree(teacher, place)
    record = json.loads((place / "record.json").read_text())
    (place / "record.json").write_text(json.dumps({**record, "status": "preempted"}))
    capsys.readouterr()
    folder = train(tmp_path / "runs", f"method.teacher.run={place}")
    told = " ".join(capsys.readouterr().out.split())
    assert f"taught by {place}, ema: not through with its own training (preempted)" in told
    assert f"python sample.py run={folder}" in told.replace("│", "") and "ema=steps_" in told


@pytest.mark.slow
def test_resume_goes_on_bitwise_and_a_teacher_trained_further_is_another_run(teacher, tmp_path, capsys):
    place = tmp_path / "teacher"
    shutil.copytree(teacher, place)
    words = [f"method.teacher.run={place}", "resume=auto"]
    whole = train(tmp_path / "runs", *words)
    expected = tiny_runs.state(whole)
    # as a kill within the second halving leaves it
    for images in (80, 96):
        (whole / "checkpoints" / f"images-{images:010d}.ckpt").unlink()
    moved = tmp_path / "moved"
    place.rename(moved)
    words[0] = f"method.teacher.run={moved}"
    assert train(tmp_path / "runs", *words) == whole
    tiny_runs.assert_same(tiny_runs.state(whole), expected)
    record = tiny_runs.record_of(whole)
    assert len(record["sessions"]) == 2 and record["resumed_from"] == "images-0000000064.ckpt"
    # the teacher's newest checkpoint goes: other weights under the same name
    newest = max((moved / "checkpoints").iterdir())
    checkpoint = torch.load(newest, weights_only=True)
    key = next(key for key in checkpoint["callbacks"] if key.startswith("EMACallback"))
    next(iter(checkpoint["callbacks"][key]["ema"].values())).add_(1.0)
    torch.save(checkpoint, newest)
    capsys.readouterr()
    train(tmp_path / "runs", f"method.teacher.run={moved}", f"resume={whole}", code=2)
    error = capsys.readouterr().err
    assert "this is another run: method.teacher.sha256 (was" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "method.teacher.run=<folder> is needed"),
        (["method.teacher=nowhere"], "method.teacher=nowhere: a teacher is named by method.teacher.run=<folder>"),
        (["method.teacher.run={teacher}/.."], "not a run folder or an export, it has no config.yaml; did you"),
        slow(["method.teacher.run=nowhere"], "method.teacher.run=nowhere: no such folder"),
        slow(["method.teacher.run={teacher}", "method.teacher.ema=emma"], "method.teacher.ema=emma: "),
        slow(["method.teacher.run={teacher}", "dataset=toy"], "its shape is [1, 16, 16], that of this run is [2]"),
        slow(["method.teacher.run={teacher}", "num_classes=3"], "its num_classes is 10, that of this run is 3"),
        slow(["method.teacher.run={teacher}", "prediction=x0"], "its denoiser.prediction is V, that of this run is X0"),
        (["method.teacher.run={teacher}", "interpolant=ve"],
         "its denoiser.interpolant is VariancePreserving, that of this run is VarianceExploding"),
        slow(["method.teacher.run={teacher}", "model.channels=16"], "their networks differ"),
        slow(["method.teacher.run={teacher}", "method.steps_from=6"], "halving does not lead from steps_from=6"),
        slow(["method.teacher.run={teacher}", "method.steps_from=4096"], "do not fit into 6 steps"),
        slow(["method.teacher.run={teacher}", "guidance@method.guidance=autoguidance"],
         "method.guidance.weak: a stored network guides samples"),
        slow(["method.teacher.run={teacher}", "sampler@method.sampler=heun"], "DDIM with eta=0, or ADDIM"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(teacher, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "runs", *(word.format(teacher=teacher) for word in words), code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list((tmp_path / "runs").glob("student/2*"))


def test_what_is_chosen_is_not_completed_and_teachers_of_a_sweep_must_agree(teacher, tmp_path):
    found = complete([f"method.teacher.run={teacher}", "schedule=cosine", "method=progressive"])
    assert "schedule=from_run" not in found.argv and "model=from_run" in found.argv
    assert found.argv.index("model=from_run") < found.argv.index("schedule=cosine")
    assert complete(["experiment=digits/quickstart"]).argv == ["experiment=digits/quickstart"]
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    config = OmegaConf.load(other / "config.yaml")
    config.schedule.logsnr_max = 11.0
    OmegaConf.save(config, other / "config.yaml")
    with pytest.raises(Exception, match="differ in their schedule"):
        complete(["-m", f"method.teacher.run={teacher},{other}"])


def test_a_recipe_for_other_data_is_refused_unless_data_are_named(teacher):
    words = [f"method.teacher.run={teacher}", "experiment=reflow/cifar10_one_step"]
    # which takes its data from the experiment that it builds on
    with pytest.raises(
        UserError, match="is a recipe for cifar10, and the teacher's data are digits"
    ) as error:
        complete(words, [conf_folder()])
    assert "dataset=digits" in str(error.value) and "\n" not in str(error.value)
    for more in (["dataset=digits"], ["dataset=cifar10"]):
        assert "dataset=from_run" not in complete([*words, *more], [conf_folder()]).argv
    own = complete([words[0], "experiment=progressive/digits"], [conf_folder()])
    assert "dataset=from_run" in own.argv


def test_a_kept_student_is_sampled_in_its_own_number_of_steps(student):
    def injected(*more):
        return [word for word in sampling("sample", [f"run={student}", *more]).injected if "steps" in word]

    assert injected("ema=steps_2") == ["grid.steps=2"]
    assert injected("ema=steps_2", "grid.steps=5") == injected("ema=raw") == injected() == []
    # another grid has its own number, or none
    assert injected("ema=steps_2", "grid=from_logsnrs") == injected("ema=steps_1,steps_2", "-m") == []


def test_an_encoder_is_not_sampled(student, tmp_path, capsys):
    encoder = tmp_path / "encoder"
    shutil.copytree(student, encoder)
    config = OmegaConf.load(encoder / "config.yaml")
    config.method.loss._target_ = "diffusion_lab.losses.distillation.EncoderLoss"
    OmegaConf.save(config, encoder / "config.yaml")
    sample(tmp_path / "out", encoder, code=2)
    error = capsys.readouterr().err
    assert "this student is an encoder" in error and error.count("\n") == 1


def test_the_identity_is_the_teachers_weights_not_its_place():
    config = {"method": {"_target_": "x", "teacher": {"run": "/a", "ema": "ema", "sha256": "1"}}}
    moved = {"method": {"_target_": "x", "teacher": {"run": "/b", "ema": "ema", "sha256": "1"}}}
    other = {"method": {"_target_": "x", "teacher": {"run": "/a", "ema": "ema", "sha256": "2"}}}
    assert identity(config) == identity(moved) != identity(other)
