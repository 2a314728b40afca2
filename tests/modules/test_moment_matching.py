"""The wiring of moment matching: turns, the same dropout for two, rewards from a point of the clock, resume."""

from functools import partial

import pytest
import torch
from tiny_distillation import BATCH, SCHEDULE, denoiser, fit, state

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.losses import SNRPlusOne
from diffusion_lab.losses.distillation import AlternatingLoss, InstantLoss, Rewarded
from diffusion_lab.losses.distillation.rewarded import own_samples
from diffusion_lab.modules import RunError
from diffusion_lab.modules.distillation import InstantMomentMatchingModule, MomentMatchingModule
from diffusion_lab.rewards import Brightness, NoReward

TOTAL = 8 * BATCH
ADAM = partial(torch.optim.Adam, lr=1e-2)
FREE = {"betas": (0.0, 0.99), "eps": 1e-12}


def matching(kind=MomentMatchingModule, **options):
    loss, second = (
        (AlternatingLoss, "auxiliary") if kind is MomentMatchingModule else (InstantLoss, "moments")
    )
    options = {
        "loss": loss(schedule=SCHEDULE, weighting=SNRPlusOne(schedule=SCHEDULE)),
        "optimizer": ADAM,
        "groups": {"denoiser": FREE, second: FREE},
        "denoiser": denoiser(seed=1),
        "teacher": denoiser(seed=2),
        "steps": 4,
        **({"max_images": TOTAL} if kind is MomentMatchingModule else {}),
        **options,
    }
    return kind(seed=0, global_batch_size=BATCH, **options)


def rewarded(**options):
    # the last four of eight steps
    return matching(rewarded=Rewarded(reward=Brightness(), strength=50.0, part=0.5, **options))


instant = partial(matching, InstantMomentMatchingModule)


class Watch(StepCallback):
    """Which parts had a gradient, and which moved, at each step."""

    def __init__(self):
        self.gradients, self.moved, self.before = [], [], None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        parts = {n: list(p.parameters()) for n, p in module.parts().items()}
        self.gradients.append(
            {n for n, p in parts.items() if any(x.grad is not None and x.grad.any() for x in p)}
        )
        self.before = {n: [x.detach().clone() for x in p] for n, p in parts.items()}

    def on_step(self, trainer, module):
        now = {n: list(p.parameters()) for n, p in module.parts().items()}
        self.moved.append(
            {n for n, p in now.items() if any(not torch.equal(a, b) for a, b in zip(self.before[n], p, strict=True))}
        )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "turns", "accumulate"),
    [
        (matching, ["auxiliary", "denoiser"], 2),
        (partial(matching, auxiliary_steps=2), ["auxiliary", "auxiliary", "denoiser"], 1),
        (rewarded, ["auxiliary", "denoiser"], 1),
        (instant, ["moments", "denoiser"], 2),
        (partial(instant, moment_steps=2), ["moments", "moments", "denoiser"], 1),
    ],
    ids=["alternating", "two", "rewarded", "instant", "instant_two"],
)
def test_they_take_turns_and_the_teacher_stands_still(tmp_path, make, turns, accumulate):
    watch, module = Watch(), make()
    before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    fit(tmp_path, module, 6 * BATCH, extra=[watch], accumulate=accumulate)
    expected = [{turns[i % len(turns)]} for i in range(6)]
    assert watch.gradients == expected and watch.moved == expected
    assert all(torch.equal(v, before[k]) for k, v in module.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
    assert {name.split(".")[0] for name in module.state_dict()} == set(turns)


@pytest.mark.parametrize(
    ("make", "at"),
    [(matching, 1), (rewarded, 4), (rewarded, 5), (instant, 3)],
)
def test_a_resume_between_the_turns_is_bitwise(tmp_path, make, at):
    whole = make()
    expected = state(whole, fit(tmp_path / "whole", whole, TOTAL))
    part = make()
    fit(tmp_path / "part", part, at * BATCH)
    again = make()
    last = tmp_path / "part" / "checkpoints" / f"images-{at * BATCH:010d}.ckpt"
    got = state(again, fit(tmp_path / "again", again, TOTAL, resume=last))
    assert got.keys() == expected.keys() and len(got) > 24
    assert not [name for name in got if not torch.equal(got[name], expected[name])]


class Masks:
    """What dropout lets through in each call of teacher, auxiliary and student."""

    def __init__(self, module):
        self.found = {"teacher": [], "auxiliary": [], "denoiser": []}
        for name, found in self.found.items():
            (layer,) = [x for x in getattr(module, name).modules() if isinstance(x, torch.nn.Dropout)]
            layer.register_forward_hook(lambda layer, x, y, found=found: found.append((x[0] != 0) & (y == 0)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_teacher_and_auxiliary_have_the_same_dropout_and_another_in_the_next_step(tmp_path, accumulate):
    module = matching()
    masks = Masks(module)
    fit(tmp_path, module, 4 * BATCH, accumulate=accumulate)
    teacher, auxiliary, student = masks.found.values()
    assert len(teacher) == 4 * accumulate and all(bool(mask.any()) for mask in teacher)
    assert all(torch.equal(a, b) for a, b in zip(teacher, auxiliary, strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(teacher) for b in teacher[:i])
    assert all(bool(mask.any()) for mask in student)
    assert not any(torch.equal(a, b) for a, b in zip(teacher, student, strict=True))


def test_without_dropout_neither_has_any_and_the_student_keeps_its_own(tmp_path):
    # guidance asks for two branches in one call, whose rows cannot have the auxiliary's dropout
    guided = matching(guidance=lambda teacher: ClassifierFree(teacher, scale=2.0))
    for k, module in enumerate((matching(dropout=False), guided, instant())):
        if isinstance(module, InstantMomentMatchingModule):
            module.auxiliary = module.teacher
        masks = Masks(module)
        fit(tmp_path / str(k), module, 2 * BATCH)
        teacher, auxiliary, student = masks.found.values()
        assert not any(bool(mask.any()) for mask in teacher + auxiliary) and teacher
        assert all(bool(mask.any()) for mask in student)


def test_the_auxiliary_starts_as_the_teacher_and_hears_the_guided_one(tmp_path):
    module = matching(guidance=lambda teacher: ClassifierFree(teacher, scale=2.0))
    for name, value in module.teacher.state_dict().items():
        assert torch.equal(value, module.auxiliary.state_dict()[name])
    heard = []
    original = module.loss.forward

    def forward(student, auxiliary, teacher, *rest, **options):
        heard.append((student, auxiliary, teacher.denoiser, options["learner"], options["steps"]))
        return original(student, auxiliary, teacher, *rest, **options)

    module.loss.forward = forward
    fit(tmp_path, module, 2 * BATCH)
    common = (module.denoiser, module.auxiliary, module.guided)
    assert heard == [(*common, "auxiliary", 4), (*common, "student", 4)]


def test_adam_makes_the_moments_and_they_are_forgotten(tmp_path):
    module, found = instant(moment_steps=2), []

    class See(StepCallback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            before = [p.detach().clone() for p in module.moments.parameters()]
            found.append((before, [p.grad for p in module.moments.parameters()]))

    fit(tmp_path, module, 4 * BATCH, extra=[See()])
    zero, first, used, again = found
    for before, _ in (zero, again):
        assert not any(p.any() for p in before)
    # Adam's first step is its learning rate, against the sign of the gradient; the second is added to it
    for p, gradient in zip(first[0], zero[1], strict=True):
        torch.testing.assert_close(p, -1e-2 * torch.sign(gradient), rtol=1e-4, atol=1e-9)
    assert any((a != b).any() and b.any() for a, b in zip(first[0], used[0], strict=True))
    assert all(gradient is None for gradient in used[1])


def test_a_reward_is_the_last_part_of_the_run(tmp_path):
    plain, module = matching(), rewarded()
    assert module.rewarded_from == 4 * BATCH
    given, references = [], []
    original = module.loss.forward

    def forward(student, auxiliary, teacher, x0, cond, rng, **options):
        given.append((x0, options["rewarded"] is not None))
        references.append(options["reference"])
        if options["rewarded"] is not None:
            # its own samples, without dropout
            own = own_samples(student.eval(), x0, cond, rng, schedule=SCHEDULE, steps=4)
            assert torch.equal(own, x0)
            student.train()
        return original(student, auxiliary, teacher, x0, cond, rng, **options)

    module.loss.forward = forward
    fit(tmp_path / "rewarded", module, TOTAL)
    fit(tmp_path / "plain", plain, 4 * BATCH)
    assert [on for _, on in given] == [False] * 4 + [True] * 4
    # the student as it was when the stage began, kept under a name of its own
    for name, value in plain.denoiser.state_dict().items():
        assert torch.equal(references[-1].state_dict()[name], value)
        assert not torch.equal(module.denoiser.state_dict()[name], value)
    assert [path.name for path in (tmp_path / "rewarded" / "kept").iterdir()] == ["unrewarded.safetensors"]
    assert not any(x0.requires_grad for x0, _ in given)
    # without a reward there is no such stage
    assert matching(rewarded=Rewarded(reward=NoReward())).rewarded_from is None
    assert matching(rewarded=Rewarded()).rewarded_from is None


def test_a_checkpoint_without_the_student_as_it_was_is_refused(tmp_path):
    fit(tmp_path / "plain", matching(), 6 * BATCH)
    last = tmp_path / "plain" / "checkpoints" / f"images-{6 * BATCH:010d}.ckpt"
    with pytest.raises(RunError, match="no unrewarded student"):
        fit(tmp_path / "rewarded", rewarded(), TOTAL, resume=last)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: matching(steps=0), "method.steps and method.auxiliary_steps must be at least 1, got 0 and 1"),
        (lambda: matching(auxiliary_steps=0), "got 4 and 0"),
        (lambda: instant(moment_steps=0), "method.steps and method.moment_steps must be at least 1"),
        (lambda: matching(rewarded=Rewarded(reward=Brightness(), part=0.01)), "leaves one of the stages without"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
