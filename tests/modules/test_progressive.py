"""Halvings on the clock: teacher, optimizer and learning rate change at the borders; a resume is bitwise anywhere."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from tiny_distillation import BATCH, denoiser, fit, progressive, state

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.modules import RunError
from diffusion_lab.modules.distillation import LinearPerHalving, halvings
from diffusion_lab.samplers import DDIM
from diffusion_lab.samplers.addim import ADDIM

# 8 -> 4 (3 steps) -> 2 (3 steps) -> 1 (6 steps, twice as long)
TOTAL = 12 * BATCH


def test_a_run_is_shared_out_in_whole_steps():
    stages = halvings(steps_from=64, steps_to=1, max_images=1000, global_batch_size=8, longer={2: 2, 1: 2.0})
    assert [stage.steps for stage in stages] == [32, 16, 8, 4, 2, 1]
    lengths = [(stage.stop - stage.start) // 8 for stage in stages]
    assert lengths == [16, 15, 16, 15, 32, 31] and sum(lengths) == 125
    assert stages[0].start == 0 and all(a.stop == b.start for a, b in pairwise(stages))
    assert [s.steps for s in halvings(steps_from=24, steps_to=3, max_images=9, global_batch_size=1)] == [
        12,
        6,
        3,
    ]
    # the paper's, 50,000 steps each and 100,000 for the last two
    paper = halvings(
        steps_from=8192, steps_to=1, max_images=96_000_000, global_batch_size=128, longer={2: 2, 1: 2}
    )
    assert [(s.stop - s.start) // 128 for s in paper] == [50_000] * 11 + [100_000] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps_from": 48, "steps_to": 5}, "halving does not lead from steps_from=48 to steps_to=5: take e.g. "),
        ({"steps_from": 4, "steps_to": 4}, "halving does not lead"),
        ({"steps_from": 8, "steps_to": 0}, "halving does not lead"),
        ({"max_images": 16}, r"6 halvings do not fit into 2 steps \(max_images=16, batches of 8\)"),
        ({"longer": {1: 0.0}}, "shares must be positive"),
    ],
)  # fmt: skip
def test_what_cannot_be_halved_is_one_line(change, words):
    given = {"steps_from": 64, "steps_to": 1, "max_images": 1000, "global_batch_size": 8, **change}
    with pytest.raises(ValueError, match=words) as error:
        halvings(**given)
    assert "\n" not in str(error.value)
    if change == {"steps_from": 48, "steps_to": 5}:
        halvings(**{**given, "steps_from": int(str(error.value).rpartition("=")[2])})


def test_the_learning_rate_falls_to_zero_in_every_halving():
    schedule = LinearPerHalving(stages=halvings(steps_from=8, steps_to=2, max_images=64, global_batch_size=8))
    assert [schedule(8 * n) for n in range(8)] == [1, 0.75, 0.5, 0.25] * 2
    assert schedule(64) == 0.0 and schedule(1000) == 0.0


class Watch(StepCallback):
    """The optimizer's step counts, learning rates and teachers as the steps are done."""

    def __init__(self):
        self.rows = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        counts = {int(slots["step"]) for slots in optimizer.state.values()}
        stage = module.halving.steps
        weight = module.stage_teacher.network.layers[0].weight.clone()
        self.rows.append([stage, counts, weight, module.denoiser.network.layers[0].weight.detach().clone()])

    def on_step(self, trainer, module):
        self.rows[-1].append(trainer.optimizers[0].param_groups[0]["lr"])


def test_each_halving_has_its_teacher_a_fresh_optimizer_and_a_fresh_rate(tmp_path):
    watch, module = Watch(), progressive()
    original = module.teacher.network.layers[0].weight.clone()
    fit(tmp_path, module, TOTAL, extra=[watch])
    stages, counts, teachers, students, rates = zip(*watch.rows, strict=True)
    assert list(stages) == [4] * 3 + [2] * 3 + [1] * 6
    # nothing behind a first step, one step behind a second
    assert list(counts) == [set(), {1}, {2}] * 2 + [set(), {1}, {2}, {3}, {4}, {5}]
    torch.testing.assert_close(
        list(rates), [1e-2 * f for f in [1, 2 / 3, 1 / 3] * 2 + [n / 6 for n in range(6, 0, -1)]]
    )
    assert all(torch.equal(t, original) for t in teachers[:3])
    # the student at the border, and no other
    assert all(torch.equal(t, students[3]) for t in teachers[3:6])
    assert all(torch.equal(t, students[6]) for t in teachers[6:])
    assert not torch.equal(students[3], students[0]) and not torch.equal(students[6], students[3])
    assert torch.equal(module.teacher.network.layers[0].weight, original)
    assert set(module.state_dict()) == {f"denoiser.{name}" for name in module.denoiser.state_dict()}


def test_the_student_of_each_halving_is_kept(tmp_path):
    watch, module = Watch(), progressive()
    fit(tmp_path, module, TOTAL, extra=[watch])
    kept = {p.stem: load_file(p)["network.layers.0.weight"] for p in (tmp_path / "kept").iterdir()}
    assert set(kept) == {"steps_4", "steps_2", "steps_1"}
    assert torch.equal(kept["steps_4"], watch.rows[3][3]) and torch.equal(kept["steps_2"], watch.rows[6][3])
    assert torch.equal(kept["steps_1"], module.denoiser.network.layers[0].weight)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    module, folder = progressive(), tmp_path_factory.mktemp("whole")
    return state(module, fit(folder, module, TOTAL)), folder


@pytest.mark.parametrize("at", [2, 3, 5, 6, 7])
def test_a_resume_within_a_halving_and_at_its_border_is_bitwise(tmp_path, whole, at):
    expected, folder = whole
    module = progressive()
    checkpoint = folder / "checkpoints" / f"images-{at * BATCH:010d}.ckpt"
    inside = "previous_student" in torch.load(checkpoint, weights_only=True)
    assert inside == (at in (5, 7))
    got = state(module, fit(tmp_path, module, TOTAL, resume=checkpoint))
    assert got.keys() == expected.keys() and len(got) > 12
    assert not [name for name in got if not torch.equal(got[name], expected[name])]


def test_the_test_can_fail_and_a_checkpoint_of_another_method_is_refused(tmp_path, whole):
    expected, folder = whole
    checkpoint = torch.load(folder / "checkpoints" / f"images-{5 * BATCH:010d}.ckpt", weights_only=True)
    checkpoint["previous_student"]["network.layers.0.weight"] += 1e-3
    torch.save(checkpoint, tmp_path / "images-0000000040.ckpt")
    module = progressive()
    got = state(module, fit(tmp_path / "a", module, TOTAL, resume=tmp_path / "images-0000000040.ckpt"))
    assert not torch.equal(
        got["denoiser.network.layers.0.weight"], expected["denoiser.network.layers.0.weight"]
    )
    del checkpoint["previous_student"]
    torch.save(checkpoint, tmp_path / "images-0000000040.ckpt")
    with pytest.raises(RunError, match="has no previous student"):
        fit(tmp_path / "b", progressive(), TOTAL, resume=tmp_path / "images-0000000040.ckpt")


def test_accumulation_changes_no_border(tmp_path, whole):
    module = progressive()
    got = state(module, fit(tmp_path, module, TOTAL, accumulate=2))
    for name, value in got.items():
        torch.testing.assert_close(value, whole[0][name], rtol=1e-4, atol=1e-5)


def test_guidance_and_addim_are_of_the_first_teacher_only():
    module = progressive(
        guidance=lambda teacher: ClassifierFree(teacher, scale=2.0), sampler=ADDIM(fraction=0.5)
    )
    heard = []
    module.loss.forward = lambda student, teacher, *rest, x_var, steps: heard.append((teacher, x_var, steps))
    for images in (0, 2 * BATCH, 3 * BATCH, 11 * BATCH):
        module.images_seen = images
        module.distil(torch.zeros(1, 1, 2, 2), None, None)
    assert [type(teacher) for teacher, _, _ in heard[:2]] == [ClassifierFree] * 2
    assert [teacher for teacher, _, _ in heard[2:]] == [module.previous] * 2
    assert [x_var is None for _, x_var, _ in heard] == [False, False, True, True]
    assert [steps for _, _, steps in heard] == [4, 4, 2, 1]


def test_dropout_is_off_in_student_and_teacher():
    module = progressive()
    module.train()
    rates = {layer.p for layer in module.denoiser.modules() if isinstance(layer, torch.nn.Dropout)}
    assert rates == {0.0} and not module.teacher.training and not module.previous.training


@pytest.mark.parametrize("sampler", [DDIM(eta=0.5), ADDIM(adjust_last=True)])
def test_a_teacher_that_draws_noise_is_refused(sampler):
    with pytest.raises(ValueError, match="DDIM with eta=0, or ADDIM with adjust_last=false"):
        progressive(sampler=sampler)


def test_another_process_than_the_teachers_is_refused():
    from diffusion_lab.process import RectifiedFlow

    teacher = denoiser(seed=2)
    teacher.interpolant = RectifiedFlow()
    with pytest.raises(
        ValueError, match="the student's process is VariancePreserving, its teacher's RectifiedFlow"
    ):
        progressive(teacher=teacher)
