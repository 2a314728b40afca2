"""Guided distillation from the command line: both stages, sampled at a scale that is typed, and what is refused."""

import shutil

import pytest
import tiny_runs
from omegaconf import OmegaConf

from diffusion_lab.app.build import load_denoiser
from diffusion_lab.app.config.choices import read_run
from diffusion_lab.denoisers import GuidedDenoiser

# three runs are trained for them
pytestmark = pytest.mark.slow
COMMON = [
    "model.scalars=[guidance_scale]", "weighting=truncated_snr", "sampler=ddim", "grid=uniform_u", "grid.steps=2",
    "guidance=distilled", "guidance.scale=2", "modifiers=none", "batch_size=16", "trainer=cpu", "optimizer.lr=3e-2",
    "lr_schedule.warmup_images=0", "averages=none", "~callbacks.sample_grid",
]  # fmt: skip
FIRST = ["method=guided", "method.denoiser.scales=[1,3]", "name=first", "max_images=64", *COMMON]
NO_SCALE = [word for word in FIRST if word != "guidance.scale=2"]
SECOND = ["method=guided_progressive", "method.steps_from=4", "name=second", "max_images=64", *COMMON]


def train(root, words, *more, code=0):
    assert tiny_runs.main("train", *words, f"paths.runs={root}", *more) == code
    name = next(word for word in words if word.startswith("name=")).removeprefix("name=")
    return (root / name / "latest").resolve() if code == 0 else None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("guided")
    teacher = tiny_runs.train(root / "teachers", max_images=16).resolve()
    first = train(root, FIRST, f"method.teacher.run={teacher}")
    return root, teacher, first, train(root, SECOND, f"method.teacher.run={first}")


def sample(out, run, *more, code=0):
    assert tiny_runs.main("sample", f"run={run}", f"out={out}", "num_samples=4", *more) == code
    return None if code else tiny_runs.images_of(out)[0]


def test_the_second_stage_takes_over_the_scales_of_the_first(runs):
    _, teacher, first, second = runs
    for folder in (first, second):
        found = load_denoiser(folder).denoiser
        assert isinstance(found, GuidedDenoiser) and found.scales == (1.0, 3.0)
    assert read_run(second)["method"]["teacher"]["sha256"] == load_denoiser(first).sha256
    assert not hasattr(load_denoiser(teacher).denoiser, "scales")


def test_the_python_in_its_card_runs(runs):
    for folder in runs[2:]:
        code = (folder / "export" / "README.md").read_text().split("```python\n")[1].split("```")[0]
        names = {}
        exec(code.replace("<this folder>", str(folder / "export")), names)
        assert names["x0"].shape == (1, 1, 8, 8) and names["cond"].keys() == {"label", "guidance_scale"}


def test_a_student_is_sampled_at_the_scale_that_is_typed_and_costs_a_call_a_step(runs, tmp_path):
    _, _, first, second = runs
    for number, folder in enumerate((first, second)):
        images = [
            sample(tmp_path / f"{number}-{k}", folder, *words)
            for k, words in enumerate((["guidance.scale=1"], [], ["guidance.scale=2"], ["guidance.scale=3"]))
        ]
        # untyped it is the one recorded
        assert (images[1] == images[2]).all()
        assert (images[0] != images[1]).any() and (images[2] != images[3]).any()
        assert tiny_runs.record_of(tmp_path / f"{number}-0")["nfe"] == 2
    double = sample(tmp_path / "double", second, "sampler=double_step")
    assert (double != images[1]).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["guidance.scale=3.5"], "this student was trained for scales 1.0 to 3.0"),
        (["guidance=none"], "guidance=distilled guidance.scale=<number>"),
    ],
)  # fmt: skip
def test_a_scale_it_does_not_know_or_none_is_refused_in_a_line(runs, tmp_path, capsys, words, message):
    sample(tmp_path / "out", runs[2], *words, code=2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1], lines


def test_a_model_that_is_told_no_scale_is_refused_too(runs, tmp_path, capsys):
    sample(tmp_path / "out", runs[1], "guidance=distilled", code=2)
    assert "this model is told no guidance scale: guidance=cfg" in capsys.readouterr().err


def without_label_dropout(teacher, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    config = OmegaConf.load(folder / "config.yaml")
    config.method.loss.label_dropout = 0.0
    OmegaConf.save(config, folder / "config.yaml")
    return folder


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        (NO_SCALE, ["guidance=none"], "guidance: this student is told its guidance scale: guidance=distilled"),
        (FIRST, ["guidance.scale=9"], "guidance.scale=9: this student learns the scales 1 to 3"),
        (FIRST, ["model.scalars=[]"], "model.scalars=[guidance_scale]"),
        (FIRST, ["dropout"], "trained with method.loss.label_dropout=0"),
        (SECOND, [], "told no guidance scale: train a run of method=guided"),
    ],
)  # fmt: skip
def test_what_cannot_be_taught_is_refused_in_a_line(runs, tmp_path, capsys, words, more, message):
    teacher = without_label_dropout(runs[1], tmp_path) if more == ["dropout"] else runs[1]
    more = [word for word in more if word != "dropout"]
    train(tmp_path, words, *more, f"method.teacher.run={teacher}", code=2)
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0], lines


def test_a_teacher_of_other_scales_is_refused(runs, tmp_path, capsys):
    train(tmp_path, SECOND, "method.denoiser.scales=[1,5]", f"method.teacher.run={runs[2]}", code=2)
    assert "its denoiser.scales is" in capsys.readouterr().err
