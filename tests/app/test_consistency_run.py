"""Multistep consistency from the command line: trained, and sampled in as many DDIM steps as it has segments."""

import tiny_runs
import torch

from diffusion_lab.app.build import load_denoiser
from diffusion_lab.app.config.choices import read_run

STUDENT = [
    "method=consistency", "method.steps=2", "method.teacher_steps.first=4", "method.teacher_steps.last=16",
    "weighting=snr_plus_one", "sampler=ddim", "grid=uniform_u", "grid.steps=${method.steps}", "guidance=none",
    "modifiers=none", "averages=none", "name=student", "batch_size=16", "max_images=32", "trainer=cpu",
    "~callbacks.sample_grid", "~callbacks.throughput",
]  # fmt: skip


def test_a_student_is_trained_and_sampled_by_the_usual_path(tmp_path):
    teacher = tiny_runs.train(tmp_path / "teachers", max_images=16).resolve()
    words = [*STUDENT, f"paths.runs={tmp_path}", f"method.teacher.run={teacher}"]
    assert tiny_runs.main("train", *words) == 0
    folder = (tmp_path / "student" / "latest").resolve()
    config = read_run(folder)
    assert config["method"]["teacher"]["sha256"] == load_denoiser(teacher).sha256
    found, theirs = (load_denoiser(run).denoiser.state_dict() for run in (folder, teacher))
    assert found.keys() == theirs.keys() and any(not torch.equal(v, theirs[k]) for k, v in found.items())
    assert config["grid"]["steps"] == 2
    images = []
    for more in ([], ["grid.steps=1"]):
        out = tmp_path / f"images{len(images)}"
        assert tiny_runs.main("sample", f"run={folder}", f"out={out}", "num_samples=4", *more) == 0
        images.append(tiny_runs.images_of(out)[0])
    assert (images[0] != images[1]).any()
