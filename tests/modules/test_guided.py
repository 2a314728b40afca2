"""The wiring of guided distillation: a student begins as its teacher, both hear the same scales, resume is bitwise."""

from functools import partial

import pytest
import torch
from tiny_distillation import BATCH, SCHEDULE, Hearing, fit, hearing_teacher, state
from torch import nn

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.denoisers import GUIDANCE_SCALE, GuidedDenoiser, NetworkDenoiser, V
from diffusion_lab.losses import TruncatedSNR
from diffusion_lab.losses.distillation import DoubleStepLoss, EncoderLoss, GuidedLoss, ProgressiveLoss
from diffusion_lab.modules.distillation import GuidedModule, GuidedProgressiveModule
from diffusion_lab.networks import UNet
from diffusion_lab.networks.edm2 import EDM2
from diffusion_lab.process import VariancePreserving

SCALES = (1.0, 4.0)
TOTAL = 6 * BATCH


def student_of(seed=1, scales=SCALES):
    return GuidedDenoiser(
        network=Hearing(seed, scalars=[GUIDANCE_SCALE]),
        interpolant=VariancePreserving(),
        prediction=V(),
        scales=scales,
    )


class Labelled:
    """The tiny data have no labels: the sign of an image's sum is its class."""

    def losses(self, x0, cond, rng):
        return super().losses(x0, {"label": (x0.flatten(1).sum(1) > 0).long()}, rng)


class First(Labelled, GuidedModule):
    pass


class Second(Labelled, GuidedProgressiveModule):
    pass


def options_of(loss):
    return {
        "loss": loss(schedule=SCHEDULE, weighting=TruncatedSNR(schedule=SCHEDULE)),
        "optimizer": partial(torch.optim.Adam, lr=1e-2),
        "seed": 0,
        "global_batch_size": BATCH,
    }


def first(**options):
    return First(
        **{"denoiser": student_of(), "teacher": hearing_teacher(), **options_of(GuidedLoss), **options}
    )


def second(loss=ProgressiveLoss, **options):
    given = {
        "denoiser": student_of(), "teacher": student_of(seed=2), "steps_from": 4, "max_images": TOTAL,
        **options_of(loss), **options,
    }  # fmt: skip
    return Second(**given)


class Watch(StepCallback):
    """What had a gradient at each step."""

    def __init__(self):
        self.gradients = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append(
            {n for n, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
        )


def asked(denoiser, scale, n=5):
    x = torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(7))
    cond = {"label": torch.arange(n) % 2}
    if scale is not None:
        cond[GUIDANCE_SCALE] = torch.full((n,), scale)
    denoiser.eval()
    return denoiser(x, torch.linspace(-3, 3, n), cond)


def test_the_student_begins_as_its_teacher_whatever_scale_it_is_told():
    module = first()
    for scale in (1.0, 2.2, 4.0):
        assert torch.equal(asked(module.denoiser, scale), asked(module.teacher, None))
    # and not because nothing was there to be silenced
    assert not torch.equal(asked(student_of(), 1.0), asked(student_of(), 4.0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    module, watch, folder = first(), Watch(), tmp_path_factory.mktemp("whole")
    before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    found = state(module, fit(folder, module, TOTAL, extra=[watch]))
    return module, watch, before, found, folder


def test_the_student_alone_learns_all_of_it_and_in_time_to_tell_scales_apart(whole):
    module, watch, before, _, _ = whole
    # the silenced layer first, then what is below it; the vector for a scale that is not given never
    heard = {n for n, _ in module.named_parameters() if not n.endswith("null")}
    below = {n for n in heard if ".scalar_embeddings." in n and ".layers.0." in n}
    assert len(below) == 2 and watch.gradients[0] == heard - below
    assert watch.gradients[1:] == [heard] * 5
    assert all(torch.equal(v, before[k]) for k, v in module.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
    assert not torch.allclose(asked(module.denoiser, 1.0), asked(module.denoiser, 4.0), atol=1e-4)
    assert {name.split(".")[0] for name in module.state_dict()} == {"denoiser"}


@pytest.mark.parametrize("at", [1, 4])
def test_a_resume_of_the_first_stage_is_bitwise(tmp_path, whole, at):
    *_, expected, folder = whole
    module = first()
    checkpoint = folder / "checkpoints" / f"images-{at * BATCH:010d}.ckpt"
    got = state(module, fit(tmp_path, module, TOTAL, resume=checkpoint))
    assert got.keys() == expected.keys() and len(got) > 20
    assert not [name for name in got if not torch.equal(got[name], expected[name])]


def heard_by(network, into):
    def note(module, inputs, output):
        into.append(inputs[2][GUIDANCE_SCALE].clone())

    network.register_forward_hook(note)


@pytest.mark.parametrize("loss", [ProgressiveLoss, DoubleStepLoss, EncoderLoss])
def test_in_the_second_stage_student_and_teacher_hear_the_same_scales_in_every_halving(tmp_path, loss):
    module, student, teacher, previous = second(loss), [], [], []
    for part, into in ((module.denoiser, student), (module.teacher, teacher), (module.previous, previous)):
        heard_by(part.network, into)
    fit(tmp_path, module, TOTAL)
    # four steps to two by three steps of training, then to one
    assert [len(student), len(teacher), len(previous)] == [6, 6, 6]
    for step, heard in enumerate(student):
        first, again = (teacher if step < 3 else previous)[2 * (step % 3) :][:2]
        assert torch.equal(first, heard) and torch.equal(again, heard)
        # one an example, about unit size
        assert len(heard.unique()) == BATCH and float(heard.abs().max()) <= 3**0.5
    assert not torch.equal(student[0], student[1])
    kept = {p.stem for p in (tmp_path / "kept").iterdir()}
    assert kept == {"steps_2", "steps_1"}


@pytest.mark.parametrize(
    "loss",
    [ProgressiveLoss, *(pytest.param(x, marks=pytest.mark.slow) for x in (DoubleStepLoss, EncoderLoss))],
)
def test_a_resume_of_the_second_stage_is_bitwise_within_a_halving(tmp_path, loss):
    module = second(loss)
    before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    expected = state(module, fit(tmp_path / "whole", module, TOTAL))
    assert all(torch.equal(v, before[k]) for k, v in module.teacher.state_dict().items())
    for at in (2, 4):
        again = second(loss)
        checkpoint = tmp_path / "whole" / "checkpoints" / f"images-{at * BATCH:010d}.ckpt"
        got = state(again, fit(tmp_path / f"again{at}", again, TOTAL, resume=checkpoint))
        assert got.keys() == expected.keys() and len(got) > 20
        assert not [name for name in got if not torch.equal(got[name], expected[name])]


def unet(kind, scalars, **options):
    return kind(
        in_channels=1, size=8, channels=8, multipliers=[1], blocks=1, attention=[], head_channels=8, num_classes=3,
        scalars=scalars, **options,
    )  # fmt: skip


def test_a_network_of_ours_begins_as_its_teacher_and_one_that_keeps_magnitudes_is_refused():
    def module_of(make):
        networks = [make([GUIDANCE_SCALE]), make([])]
        parts = {"interpolant": VariancePreserving(), "prediction": V()}
        student = GuidedDenoiser(network=networks[0], scales=SCALES, **parts)
        return first(denoiser=student, teacher=NetworkDenoiser(network=networks[1], **parts))

    make = partial(unet, UNet)
    module = module_of(make)
    for p in module.teacher.parameters():
        # its last layer is zero at initialisation
        nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(0))
    module = first(denoiser=module.denoiser, teacher=module.teacher)
    x, cond = torch.ones(2, 1, 8, 8), {"label": torch.arange(2)}
    told = {**cond, GUIDANCE_SCALE: torch.tensor([1.0, 3.0])}
    logsnr = torch.zeros(2)
    assert torch.equal(module.denoiser(x, logsnr, told), module.teacher(x, logsnr, cond))
    assert bool(module.teacher(x, logsnr, cond).any())
    with pytest.raises(ValueError, match="magnitude-preserving"):
        module_of(partial(unet, EDM2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: first(teacher=student_of(seed=2)), "told a guidance scale already: method=guided_progressive"),
        (lambda: second(teacher=hearing_teacher()), "told no guidance scale: train a run of method=guided"),
        (lambda: second(denoiser=student_of(scales=(1.0, 3.0))), r"\[1.0, 3.0\], the teacher's \[1.0, 4.0\]"),
        (
            lambda: GuidedDenoiser(network=Hearing(), interpolant=VariancePreserving(), prediction=V(), scales=SCALES),
            r"model.scalars=\[guidance_scale\]",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
