"""Moment matching from the command line: trained, rewarded, and sampled in its ancestral steps by the usual path."""

import pytest
import tiny_runs
import torch

from diffusion_lab.app.build import load_denoiser
from diffusion_lab.app.config.choices import read_run

pytestmark = pytest.mark.slow

STUDENT = [
    "method.steps=2", "weighting=snr_plus_one", "optimizer=adam", "sampler=ddpm", "sampler.interpolation=0",
    "grid=uniform_u", "grid.steps=${method.steps}", "guidance=none", "modifiers=none", "averages=none", "name=student",
    "batch_size=16", "max_images=64", "trainer=cpu", "~callbacks.sample_grid", "~callbacks.throughput",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_runs.train(tmp_path_factory.mktemp("teachers"), max_images=16).resolve()


@pytest.mark.parametrize(
    "words",
    [
        ["method=moment_matching", "reward@method.rewarded.reward=digit", "method.rewarded.part=0.5"],
        ["method=moment_matching_instant"],
    ],
    ids=["alternating", "instant"],
)
def test_a_student_is_trained_and_sampled_by_the_usual_path(teacher, tmp_path, words):
    common = [f"paths.runs={tmp_path}", f"method.teacher.run={teacher}"]
    assert tiny_runs.main("train", *words, *STUDENT, *common) == 0
    folder = (tmp_path / "student" / "latest").resolve()
    config = read_run(folder)
    assert config["method"]["teacher"]["sha256"] == load_denoiser(teacher).sha256
    found, theirs = (load_denoiser(run).denoiser.state_dict() for run in (folder, teacher))
    # the student alone, not who learns beside it
    assert found.keys() == theirs.keys() and any(not torch.equal(v, theirs[k]) for k, v in found.items())
    names = ["raw", "unrewarded"] if "method=moment_matching" in words else ["raw"]
    images = []
    for name in names:
        out = tmp_path / name
        assert tiny_runs.main("sample", f"run={folder}", f"out={out}", "num_samples=4", f"ema={name}") == 0
        images.append(tiny_runs.images_of(out)[0])
    assert len(images) == 1 or (images[0] != images[1]).any()


def test_a_guided_teacher_is_not_offered_where_its_moments_are_those_of_no_data(teacher, tmp_path, capsys):
    words = ["method=moment_matching_instant", "+method.guidance=null", *STUDENT, f"paths.runs={tmp_path}"]
    assert tiny_runs.main("train", *words, f"method.teacher.run={teacher}") == 2
    error = capsys.readouterr().err
    assert "method.guidance" in error and error.count("\n") == 1
