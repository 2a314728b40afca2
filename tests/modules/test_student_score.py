"""The wiring of EM distillation and distribution matching: turns, who learns, no dropout, guidance, resume."""

from functools import partial

import pytest
import torch
from tiny_distillation import BATCH, SCHEDULE, denoiser, fit, state
from tiny_distillation import SHAPE as shape

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.losses import P2, DenoisingLoss, EpsMSE
from diffusion_lab.losses.distillation import DistributionMatchingLoss, EMLoss
from diffusion_lab.modules.distillation import StudentScoreModule
from diffusion_lab.rng import StepRNG

TOTAL = 7 * BATCH
TURNS = [{"score"}, {"score"}, {"denoiser"}] * 2 + [{"score"}]
METHODS = {
    "em": (EMLoss, {"langevin_steps": 3, "gamma_z": 1e-3}),
    "distribution_matching": (DistributionMatchingLoss, {"logsnrs": [-6.0, 0.0]}),
}
every_method = pytest.mark.parametrize("method", METHODS)


def student_score(method, **options):
    kind, settings = METHODS[method]
    loss = kind(
        schedule=SCHEDULE,
        weighting=P2(schedule=SCHEDULE, k=0.0),
        score=DenoisingLoss(schedule=SCHEDULE, weighting=EpsMSE(schedule=SCHEDULE)),
        **{"logsnrs": [-6.0], **settings},
    )
    options = {
        "optimizer": partial(torch.optim.Adam, lr=1e-2, betas=(0.0, 0.99)),
        "denoiser": denoiser(seed=1),
        "teacher": denoiser(seed=2),
        "score_steps": 2,
        **options,
    }
    return StudentScoreModule(loss=loss, seed=0, global_batch_size=BATCH, **options)


class Watch(StepCallback):
    """Which parts had a gradient, and which moved, at each step."""

    def __init__(self):
        self.gradients, self.moved, self.before = [], [], None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        parts = module.parts()
        self.gradients.append(
            {n for n, p in parts.items() if any(x.grad is not None for x in p.parameters())}
        )
        whole = {
            n for n, p in parts.items() if all(x.grad is not None and x.grad.any() for x in p.parameters())
        }
        # score and teacher agree until the score has learnt: the student has nothing to do before
        assert whole == self.gradients[-1]
        self.before = {n: [x.detach().clone() for x in p.parameters()] for n, p in parts.items()}

    def on_step(self, trainer, module):
        now = {n: list(p.parameters()) for n, p in module.parts().items()}
        pairs = {n: zip(self.before[n], now[n], strict=True) for n in now}
        self.moved.append({n for n in now if any(not torch.equal(a, b) for a, b in pairs[n])})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run of each method."""
    runs = {}
    for method in METHODS:
        module, watch, folder = student_score(method), Watch(), tmp_path_factory.mktemp(method)
        before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
        found = state(module, fit(folder, module, TOTAL, extra=[watch]))
        runs[method] = module, watch, before, found, folder
    return runs


@every_method
def test_score_and_student_take_turns_and_the_teacher_never_changes(whole, method):
    module, watch, before, *_ = whole[method]
    assert watch.gradients == TURNS and watch.moved == TURNS
    assert all(torch.equal(v, before[k]) for k, v in module.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
    assert {name.split(".")[0] for name in module.state_dict()} == {"denoiser", "score"}
    assert set(module.denoisers()) == {"raw"} and module.denoisers()["raw"] is module.denoiser


@every_method
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_resume_in_the_middle_of_a_turn_is_bitwise(tmp_path, whole, method, at):
    *_, expected, folder = whole[method]
    module, watch = student_score(method), Watch()
    checkpoint = folder / "checkpoints" / f"images-{at * BATCH:010d}.ckpt"
    got = state(module, fit(tmp_path, module, TOTAL, resume=checkpoint, extra=[watch]))
    assert watch.gradients == TURNS[at:]
    assert got.keys() == expected.keys() and len(got) > 20
    assert not [name for name in got if not torch.equal(got[name], expected[name])]


@every_method
def test_micro_batches_add_up_to_the_batch(tmp_path, whole, method):
    """Every number of Langevin's steps belongs to its example."""
    module = student_score(method)
    got = state(module, fit(tmp_path, module, TOTAL, accumulate=2))
    for name, value in whole[method][3].items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5)


def test_the_score_starts_from_the_teacher_and_learns_at_its_own_rate(tmp_path):
    module = student_score("em", groups={"score": {"lr": 3e-3}})
    for name, value in module.teacher.state_dict().items():
        assert torch.equal(value, module.score.state_dict()[name])
        assert torch.equal(value, module.denoiser.state_dict()[name])
    assert not {id(p) for p in module.score.parameters()} & {id(p) for p in module.denoiser.parameters()}
    rates = [x.p for part in (module.denoiser, module.score) for x in part.modules() if hasattr(x, "p")]
    assert rates == [0.0, 0.0]
    trainer = fit(tmp_path, module, BATCH)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-2, 3e-3]


def turn(module, step):
    """The losses of optimizer step `step`, without a trainer, and the parts that may learn in it."""
    module.images_seen = step * BATCH
    module.begin_step()
    rng = StepRNG(seed=0, step=step, positions=slice(None), total=BATCH)
    labels = {"label": torch.zeros(BATCH, dtype=torch.long)}
    return module.distil(torch.zeros(BATCH, *shape), labels, rng)


@every_method
def test_under_autocast_everything_learns(method):
    """Autocast keeps weights that it has cast; those of calls without gradient must not be used again."""
    module = student_score(method)
    module.parameters_to_train()
    torch.nn.init.normal_(module.score.network.layers[0].weight, generator=torch.Generator().manual_seed(0))
    for step, part in ((0, module.score), (2, module.denoiser)):
        with torch.autocast("cpu", torch.bfloat16):
            turn(module, step).total.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in part.parameters())


@every_method
def test_guidance_is_around_the_teacher_alone(method):
    module = student_score(method, guidance=lambda teacher: ClassifierFree(teacher, scale=2.0))
    heard = []
    module.loss.forward = lambda *parts: heard.append(parts[:3])
    turn(module, 2)
    assert heard == [(module.denoiser, module.guided, module.score)]
    assert isinstance(module.guided, ClassifierFree)


@every_method
def test_no_pixel_of_the_data_is_used(method):
    module = student_score(method)
    torch.nn.init.normal_(module.score.network.layers[0].weight, generator=torch.Generator().manual_seed(0))
    found = []
    for value in (0.0, 1.0):
        for step in (0, 2):
            rng = StepRNG(seed=0, step=step, positions=slice(None), total=BATCH)
            module.images_seen = step * BATCH
            found.append(module.distil(torch.full((BATCH, *shape), value), None, rng).per_example)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


def test_what_does_not_fit_is_one_line():
    with pytest.raises(ValueError, match="phase 'score' needs parts that learn, and steps >= 1") as error:
        student_score("em", score_steps=0)
    assert "\n" not in str(error.value)
