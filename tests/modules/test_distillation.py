"""What every method of distillation stands on: a teacher outside, a student from it, phases that take turns exactly."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from tiny_distillation import BATCH, OPTIMIZER, denoiser, fit, state, two_parts

from diffusion_lab.callbacks import LossByNoiseLevel
from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.modules import RunError
from diffusion_lab.modules.distillation import Phase, inherit


class Watch(StepCallback):
    """Which parts had a gradient, and which moved, at each step."""

    def __init__(self):
        self.gradients, self.moved, self.before = [], [], None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        parts = module.parts()
        self.gradients.append(
            {n for n, p in parts.items() if any(x.grad is not None for x in p.parameters())}
        )
        whole = {n for n, p in parts.items() if all(x.grad is not None for x in p.parameters())}
        assert whole == self.gradients[-1]
        self.before = {n: [x.detach().clone() for x in p.parameters()] for n, p in parts.items()}

    def on_step(self, trainer, module):
        now = {n: list(p.parameters()) for n, p in module.parts().items()}
        self.moved.append(
            {
                n
                for n in now
                if any(not torch.equal(a, b) for a, b in zip(self.before[n], now[n], strict=True))
            }
        )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_only_the_parts_of_the_phase_get_gradients_and_move(tmp_path, accumulate):
    watch, module = Watch(), two_parts()
    fit(tmp_path, module, 7 * BATCH, extra=[watch], accumulate=accumulate)
    turns = [{"auxiliary"}, {"auxiliary"}, {"denoiser"}] * 2 + [{"auxiliary"}]
    assert watch.gradients == turns and watch.moved == turns


class Gradients(StepCallback):
    """The gradients of every step, as they are applied."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps.append([None if p.grad is None else p.grad.clone() for p in module.parameters()])


def test_one_optimizer_with_groups_is_one_optimizer_a_part(tmp_path):
    """The very numbers of two Adams, each stepped in its own turns alone."""
    gradients, own = Gradients(), {"lr": 3e-3, "betas": (0.0, 0.9), "eps": 1e-12}
    module, by_hand = two_parts(groups={"auxiliary": own}), two_parts()
    trainer = fit(tmp_path, module, 9 * BATCH, extra=[gradients])
    student = OPTIMIZER(by_hand.denoiser.parameters())
    auxiliary = torch.optim.Adam(by_hand.auxiliary.parameters(), **own)
    for step, found in enumerate(gradients.steps):
        for parameter, gradient in zip(by_hand.parameters(), found, strict=True):
            parameter.grad = gradient
        (student if step % 3 == 2 else auxiliary).step()
    assert len(gradients.steps) == 9
    for a, b in zip(by_hand.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-2, 3e-3]


def test_the_teacher_stands_outside_and_never_changes(tmp_path):
    teacher = denoiser(seed=2)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    module = two_parts(teacher=teacher)
    fit(tmp_path, module, 6 * BATCH)
    assert module.teacher is teacher and not teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    inside = {id(p) for p in module.parameters()}
    assert not inside & {id(p) for p in teacher.parameters()}
    assert {k.split(".")[0] for k in module.state_dict()} == {"denoiser", "auxiliary"}
    checkpoint = torch.load(tmp_path / "checkpoints" / "images-0000000048.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(module.state_dict())


def test_the_student_starts_from_the_teacher_and_the_guidance_is_around_it():
    module = two_parts(guidance=lambda teacher: ClassifierFree(teacher, scale=2.0))
    for name, value in module.teacher.state_dict().items():
        assert torch.equal(value, module.denoiser.state_dict()[name])
    assert isinstance(module.guided, ClassifierFree) and module.guided.denoiser is module.teacher


def test_new_layers_keep_their_initialisation_and_all_else_must_fit():
    student, teacher = denoiser(seed=1, further=True), denoiser(seed=2)
    own = {k: v.clone() for k, v in student.state_dict().items() if "further" in k}
    assert inherit(student, teacher) == list(own) and len(own) == 2
    for name, value in student.state_dict().items():
        assert torch.equal(value, own[name] if name in own else teacher.state_dict()[name])
    for a, b, words in (
        (denoiser(), denoiser(further=True), "has no network.further.weight, which its teacher has"),
        (denoiser(width=8), denoiser(), r"network.layers.0.weight is \[8, 5\], the teacher's \[16, 5\]"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            inherit(a, b)
        assert "\n" not in str(error.value)


class Rows(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


def test_the_log_tells_the_turns_apart_also_after_a_resume_between_two_rows(tmp_path):
    def rows(folder, **options):
        module, seen = two_parts(), []

        class Watch(StepCallback):
            def on_step(self, trainer, module):
                seen.append((module.turn, float(module.step_loss())))

        extra, logger = [Watch()], Rows()
        fit(folder, module, 8 * BATCH, extra=extra, logged=4 * BATCH, logger=logger, **options)
        return [row for _, row in logger.rows if "loss" in row], seen

    whole, seen = rows(tmp_path / "whole")
    assert [turn for turn, _ in seen] == ["auxiliary", "auxiliary", "student"] * 2 + ["auxiliary"] * 2
    for row, part in zip(whole, (seen[:4], seen[4:]), strict=True):
        for turn in ("auxiliary", "student"):
            own = [loss for name, loss in part if name == turn]
            assert row[f"loss_{turn}"] == pytest.approx(sum(own) / len(own), rel=1e-6)
        assert row["loss"] == pytest.approx(sum(loss for _, loss in part) / 4, rel=1e-6)
    checkpoint = tmp_path / "whole" / "checkpoints" / f"images-{6 * BATCH:010d}.ckpt"
    again, _ = rows(tmp_path / "again", resume=checkpoint)
    assert again == whole[1:]


def test_losses_by_noise_level_are_of_the_students_turns_alone(tmp_path):
    class Watch(StepCallback):
        def __init__(self):
            self.own = []

        def on_step(self, trainer, module):
            if module.turn == "student":
                self.own += [terms.per_example for terms in module.terms]

    watch, levels = Watch(), LossByNoiseLevel(every_images=6 * BATCH, bins=1, dirpath=str(tmp_path))
    fit(tmp_path, two_parts(), 6 * BATCH, extra=[watch, levels])
    own = torch.cat(watch.own).double()
    assert len(own) == levels.last[0]["count"] == 2 * BATCH
    assert levels.last[0]["loss"] == pytest.approx(float(own.mean()), rel=1e-12)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_resumed_run_goes_on_in_its_phase_bitwise(tmp_path, at):
    whole = two_parts()
    expected = state(whole, fit(tmp_path / "whole", whole, 7 * BATCH))
    part = two_parts()
    fit(tmp_path / "part", part, at * BATCH)
    again = two_parts()
    last = tmp_path / "part" / "checkpoints" / f"images-{at * BATCH:010d}.ckpt"
    got = state(again, fit(tmp_path / "again", again, 7 * BATCH, resume=last))
    assert got.keys() == expected.keys() and len(got) > 20
    assert not [name for name in got if not torch.equal(got[name], expected[name])]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": {"axuiliary": {"lr": 1.0}}}, "groups: there is no part 'axuiliary'; there are: denoiser, aux"),
        ({"teacher": {"run": None, "ema": None}}, "needs a teacher: method.teacher.run="),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(tmp_path, change, words):
    with pytest.raises((RunError, ValueError), match=words) as error:
        fit(tmp_path, two_parts(**change), BATCH)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="needs parts that learn"):
        Phase(name="none", parts=())


def test_a_phase_of_a_part_that_is_not_there_is_refused(tmp_path):
    module = two_parts()
    module.parts = lambda: {"denoiser": module.denoiser}
    with pytest.raises(RunError, match="phase 'auxiliary': there is no part 'auxiliary'"):
        fit(tmp_path, module, BATCH)


@pytest.mark.slow
def test_two_processes_take_the_same_turns(tmp_path):
    script = str(Path(__file__).with_name("tiny_distillation.py"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(tmp_path)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
                p.communicate()
    assert [p.returncode for p in processes] == [0, 0], outputs
    two = torch.load(tmp_path / "state.pt", weights_only=True)
    alone = two_parts()
    alone.denoiser.network.layers[2].p = alone.auxiliary.network.layers[2].p = 0.0
    one = state(alone, fit(tmp_path / "one", alone, 7 * BATCH))
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
