"""The wiring of multistep consistency: who learns, the same dropout twice, a clock for the teacher's steps, resume."""

from functools import partial

import pytest
import torch
from tiny_distillation import BATCH, SCHEDULE, denoiser, fit, state

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.losses import SNRPlusOne
from diffusion_lab.losses.distillation import ConsistencyLoss, TeacherSteps
from diffusion_lab.modules.distillation import ConsistencyModule

TOTAL = 6 * BATCH


def consistency(**options):
    options = {
        "loss": ConsistencyLoss(schedule=SCHEDULE, weighting=SNRPlusOne(schedule=SCHEDULE), huber=0.1),
        "optimizer": partial(torch.optim.Adam, lr=1e-2),
        "denoiser": denoiser(seed=1),
        "teacher": denoiser(seed=2),
        "steps": 2,
        "teacher_steps": TeacherSteps(first=4, last=64, max_images=TOTAL, part=5 / 6),
        **options,
    }
    return ConsistencyModule(seed=0, global_batch_size=BATCH, **options)


class Watch(StepCallback):
    """The teacher's steps, and what had a gradient."""

    def __init__(self):
        self.steps, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps.append(module.teacher_steps(module.images_seen, module.steps))
        self.gradients.append([p.grad is not None and bool(p.grad.any()) for p in module.parameters()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    module, watch, folder = consistency(), Watch(), tmp_path_factory.mktemp("whole")
    before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    found = state(module, fit(folder, module, TOTAL, extra=[watch]))
    return module, watch, before, found, folder


def test_the_student_alone_learns_while_the_teachers_steps_grow(whole):
    module, watch, before, _, _ = whole
    assert watch.steps == [4, 6, 12, 22, 36, 64]
    assert all(all(gradients) for gradients in watch.gradients)
    assert all(torch.equal(v, before[k]) for k, v in module.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in module.denoiser.state_dict().items())
    assert {name.split(".")[0] for name in module.state_dict()} == {"denoiser"}


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_resume_in_the_middle_of_the_annealing_is_bitwise(tmp_path, whole, at):
    *_, expected, folder = whole
    module, watch = consistency(), Watch()
    checkpoint = folder / "checkpoints" / f"images-{at * BATCH:010d}.ckpt"
    got = state(module, fit(tmp_path, module, TOTAL, resume=checkpoint, extra=[watch]))
    assert watch.steps == whole[1].steps[at:]
    assert got.keys() == expected.keys() and len(got) > 12
    assert not [name for name in got if not torch.equal(got[name], expected[name])]


class Masks:
    """What dropout lets through, in each call of the student."""

    def __init__(self, module):
        self.found = []
        (layer,) = [x for x in module.denoiser.modules() if isinstance(x, torch.nn.Dropout)]
        layer.register_forward_hook(lambda layer, inputs, output: self.found.append(output == 0))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_student_has_the_same_dropout_in_both_its_calls_and_another_in_the_next(tmp_path, accumulate):
    module = consistency()
    masks = Masks(module)
    fit(tmp_path, module, 2 * BATCH, accumulate=accumulate)
    first, second = masks.found[0::2], masks.found[1::2]
    assert len(first) == 2 * accumulate and bool(first[0].any())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


def step_of(module, x0=None):
    """The losses of one step, without a trainer."""
    from diffusion_lab.rng import StepRNG

    module._trainer, module._micro = type("Alone", (), {"global_rank": 0}), 1
    x0 = torch.randn(BATCH, 1, 2, 2, generator=torch.Generator().manual_seed(3)) if x0 is None else x0
    rng = StepRNG(seed=0, step=0, positions=slice(None), total=BATCH)
    return module.distil(x0, {"label": torch.zeros(BATCH, dtype=torch.long)}, rng)


def test_under_autocast_the_student_still_learns():
    """Autocast keeps the weights that it has cast; those of the call without gradient must not be used again."""
    module = consistency()
    with torch.autocast("cpu", torch.bfloat16):
        step_of(module).total.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.denoiser.parameters())


def test_guidance_is_around_the_teacher_and_its_variance_without_it():
    module = consistency(guidance=lambda teacher: ClassifierFree(teacher, scale=2.0))
    heard = []
    module.loss.forward = lambda *_, **options: heard.append(options)
    step_of(module)
    consistent = consistency()
    consistent.loss.forward = module.loss.forward
    step_of(consistent)
    guided, unguided = heard
    assert isinstance(guided["teacher"], ClassifierFree) and guided["plain"] is module.teacher
    assert unguided["teacher"] is consistent.teacher and unguided["plain"] is None
    assert guided["segments"] == 2 and guided["steps"] == 4


def test_from_data_the_teacher_is_not_asked():
    module = consistency(from_data=True)
    module.teacher.network.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    step_of(module).total.backward()
    assert all(p.grad is not None for p in module.denoiser.parameters())
    own = {name: value for name, value in module.denoiser.state_dict().items()}
    assert all(torch.equal(v, own[k]) for k, v in module.teacher.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "method.steps must be at least 1"),
        ({"from_data": True, "guidance": lambda teacher: ClassifierFree(teacher, scale=2.0)}, "no teacher to guide"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(options, words):
    with pytest.raises(ValueError, match=words) as error:
        consistency(**options)
    assert "\n" not in str(error.value)
