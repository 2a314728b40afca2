"""sCM, shortcut models and reflow from the command line: trained, sampled in their steps, and what is refused."""

import pytest
import tiny_runs
import torch

from diffusion_lab.app.build import load_denoiser
from diffusion_lab.app.config.choices import read_run
from diffusion_lab.denoisers import NetworkDenoiser, ShortcutDenoiser

# several runs are trained for them
pytestmark = pytest.mark.slow
COMMON = [
    "weighting=snr_plus_one", "grid=uniform_u", "guidance=none", "modifiers=none", "batch_size=16", "max_images=64",
    "trainer=cpu", "optimizer.lr=3e-2", "lr_schedule.warmup_images=0", "~callbacks.sample_grid",
]  # fmt: skip
SHORTCUT = [
    "method=shortcut",
    "method.denoiser.finest=4",
    "model.scalars=[steps]",
    "sampler=shortcut",
    "grid.steps=2",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("flow_maps")
    return root, tiny_runs.train(root / "teachers", max_images=16).resolve()


def train(root, name, teacher, *words, code=0):
    given = [*COMMON, f"name={name}", f"paths.runs={root}", f"method.teacher.run={teacher}", *words]
    assert tiny_runs.main("train", *given) == code
    return None if code else (root / name / "latest").resolve()


def sample(out, run, *more, code=0):
    assert tiny_runs.main("sample", f"run={run}", f"out={out}", "num_samples=4", *more) == code
    return None if code else tiny_runs.images_of(out)[0]


def learnt(folder, teacher):
    found, theirs = (load_denoiser(run).denoiser.state_dict() for run in (folder, teacher))
    assert read_run(folder)["method"]["teacher"]["sha256"] == load_denoiser(teacher).sha256
    return found.keys() == theirs.keys() and any(not torch.equal(v, theirs[k]) for k, v in found.items())


def test_continuous_consistency_and_its_sampler(runs, tmp_path):
    root, teacher = runs
    for more in ([], ["method.from_data=true", "method.loss.uncertainty=null"]):
        folder = train(
            root,
            "scm",
            teacher,
            "method=scm",
            "method.ramp_images=32",
            "sampler=renoise",
            "grid.steps=2",
            *more,
        )
        assert learnt(folder, teacher)
    one, two = (sample(tmp_path / str(n), folder, f"grid.steps={n}") for n in (1, 2))
    assert (one != two).any() and tiny_runs.record_of(tmp_path / "2")["nfe"] == 2


def test_a_shortcut_model_in_any_of_its_steps_by_any_sampler_and_as_a_teacher(runs, tmp_path, capsys):
    root, teacher = runs
    folder = train(root, "shortcut", teacher, *SHORTCUT, "method.target=ema")
    found = load_denoiser(folder).denoiser
    assert isinstance(found, ShortcutDenoiser) and found.finest == 4
    images = {n: sample(tmp_path / f"s{n}", folder, f"grid.steps={n}") for n in (1, 2, 4)}
    plain = {n: sample(tmp_path / f"d{n}", folder, f"grid.steps={n}", "sampler=ddim") for n in (2, 4)}
    # in the most steps it is an ordinary denoiser, in fewer it is not
    assert (images[4] == plain[4]).all() and (images[2] != plain[2]).any()
    sample(tmp_path / "out", folder, "grid.steps=3", code=2)
    assert "grid.steps=3: this shortcut model knows 1, 2, 4 steps" in capsys.readouterr().err
    sample(tmp_path / "other", teacher, "sampler=shortcut", "grid=uniform_u", "guidance=none", code=2)
    assert "told no number of steps: sampler=ddim" in capsys.readouterr().err
    # its export is one too, and its students go on from the denoiser that it is in most steps
    exported = load_denoiser(folder / "export").denoiser
    assert isinstance(exported, ShortcutDenoiser) and exported.finest == 4
    words = ["method=progressive", "method.steps_from=2", "averages=none", "sampler=ddim", "grid.steps=1"]
    student = train(root, "halved", folder, *words)
    assert learnt(student, folder) and load_denoiser(student).denoiser.finest == 4


def test_a_shortcut_model_from_nothing(tmp_path):
    words = [word for word in SHORTCUT if word != "method=shortcut"]
    given = [*COMMON, *words, "method=shortcut_scratch", "name=scratch", f"paths.runs={tmp_path}"]
    assert tiny_runs.main("train", *given) == 0
    folder = (tmp_path / "scratch" / "latest").resolve()
    assert isinstance(load_denoiser(folder).denoiser, ShortcutDenoiser)
    assert (
        sample(tmp_path / "1", folder, "grid.steps=1") != sample(tmp_path / "4", folder, "grid.steps=4")
    ).any()


def test_reflow_then_one_step_of_its_student(runs, tmp_path):
    root, teacher = runs
    words = ["method=reflow", "method.grid.steps=2", "sampler=ddim", "grid.steps=1"]
    second = train(root, "second", teacher, *words, "method.pairs=32")
    assert learnt(second, teacher) and type(load_denoiser(second).denoiser) is NetworkDenoiser
    last = train(root, "last", second, *words, "method.one_step=true", "sampler@method.sampler=heun")
    assert learnt(last, second)
    assert (sample(tmp_path / "a", second) != sample(tmp_path / "b", last)).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=shortcut", "sampler=shortcut"], "model.scalars=[steps]"),
        ([*SHORTCUT, "method.denoiser.finest=6"], "method.denoiser.finest must be a power of two above 1"),
        ([*SHORTCUT, "method.target=slow"], "method.target=slow: there is no such average; there are: ema"),
        (["method=reflow", "sampler@method.sampler=ddpm"], "must solve the teacher's ODE"),
        (["method=scm", "schedule=adaptive"], "AdaptiveSchedule changes as it is trained"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(runs, tmp_path, capsys, words, message):
    train(tmp_path, "student", runs[1], *words, code=2)
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0], lines
