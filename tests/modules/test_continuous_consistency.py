"""The wiring of continuous-time consistency: who learns, the same dropout twice, a ramp by the clock, resume."""

from functools import partial

import pytest
import torch
from tiny_distillation import BATCH, SCHEDULE, denoiser, fit, state

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.losses import SNRPlusOne
from diffusion_lab.losses.distillation import ContinuousConsistencyLoss
from diffusion_lab.modules.distillation import ContinuousConsistencyModule
from diffusion_lab.networks import UNet
from diffusion_lab.rng import StepRNG

TOTAL = 6 * BATCH


def module_of(**options):
    loss = ContinuousConsistencyLoss(
        schedule=SCHEDULE, weighting=SNRPlusOne(schedule=SCHEDULE), uncertainty=4
    )
    options = {
        "loss": loss,
        "optimizer": partial(torch.optim.Adam, lr=1e-2),
        "denoiser": denoiser(seed=1),
        "teacher": denoiser(seed=2),
        "ramp_images": 4 * BATCH,
        **options,
    }
    return ContinuousConsistencyModule(seed=0, global_batch_size=BATCH, **options)


class Watch(StepCallback):
    """The ramp, and what had a gradient."""

    def __init__(self):
        self.ramps, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.ramps.append(module.ramp)
        self.gradients.append([p.grad is not None and bool(p.grad.any()) for p in module.parameters()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    module, watch, folder = module_of(), Watch(), tmp_path_factory.mktemp("whole")
    before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    found = state(module, fit(folder, module, TOTAL, extra=[watch]))
    return module, watch, before, found, folder


def test_student_and_balance_learn_while_the_ramp_rises(whole):
    module, watch, before, _, _ = whole
    assert watch.ramps == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(all(gradients) for gradients in watch.gradients)
    assert all(torch.equal(v, before[k]) for k, v in module.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in module.denoiser.state_dict().items())
    assert {name.split(".")[0] for name in module.state_dict()} == {"denoiser", "loss"}


@pytest.mark.parametrize("at", [1, 3])
def test_a_resume_in_the_middle_of_the_ramp_is_bitwise(tmp_path, whole, at):
    *_, expected, folder = whole
    module, watch = module_of(), Watch()
    checkpoint = folder / "checkpoints" / f"images-{at * BATCH:010d}.ckpt"
    got = state(module, fit(tmp_path, module, TOTAL, resume=checkpoint, extra=[watch]))
    assert watch.ramps == whole[1].ramps[at:]
    assert got.keys() == expected.keys() and len(got) > 12
    assert not [name for name in got if not torch.equal(got[name], expected[name])]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_student_has_the_same_dropout_in_both_its_calls_and_another_in_the_next(tmp_path, accumulate):
    module, found = module_of(), []
    (layer,) = [x for x in module.denoiser.modules() if isinstance(x, torch.nn.Dropout)]

    def note(layer, inputs, output):
        # in forward mode the output is wrapped: its value is what counts
        while torch._C._functorch.is_functorch_wrapped_tensor(output):
            output = torch._C._functorch.get_unwrapped(output)
        found.append(torch.autograd.forward_ad.unpack_dual(output).primal.detach() == 0)

    layer.register_forward_hook(note)
    fit(tmp_path, module, 2 * BATCH, accumulate=accumulate)
    first, second = found[0::2], found[1::2]
    assert len(first) == len(second) == 2 * accumulate and bool(first[0].any())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


def step_of(module, shape=(1, 2, 2)):
    """The losses of one step, without a trainer."""
    module._trainer, module._micro = type("Alone", (), {"global_rank": 0}), 1
    x0 = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(3))
    rng = StepRNG(seed=0, step=0, positions=slice(None), total=BATCH)
    return module.distil(x0, {"label": torch.zeros(BATCH, dtype=torch.long)}, rng)


def test_under_autocast_and_with_a_network_of_ours_the_student_learns():
    def unet(seed):
        made = denoiser()
        made.network = UNet(
            in_channels=1, size=8, channels=8, multipliers=[1, 1], blocks=1, attention=[8], head_channels=8,
            num_classes=3, dropout=0.1,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        for p in made.parameters():
            torch.nn.init.normal_(p, std=0.2, generator=generator)
        return made

    module = module_of(denoiser=unet(0), teacher=unet(1), ramp_images=0)
    assert module.ramp == 1.0
    plain = step_of(module, (1, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        terms = step_of(module, (1, 8, 8))
    terms.total.backward()
    missing = [n for n, p in module.denoiser.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    assert float(terms.per_example.mean()) == pytest.approx(float(plain.per_example.mean()), rel=0.1)


def test_guidance_is_around_the_teacher_and_from_data_it_is_not_asked():
    module = module_of(guidance=lambda teacher: ClassifierFree(teacher, scale=2.0))
    heard = []
    module.loss.forward = lambda *_, **options: heard.append(options)
    step_of(module)
    assert isinstance(heard[0]["teacher"], ClassifierFree) and heard[0]["ramp"] == 0.0
    module = module_of(from_data=True)
    module.teacher.network.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    step_of(module).total.backward()
    assert all(p.grad is not None for p in module.denoiser.parameters())
    own = module.denoiser.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in module.teacher.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ramp_images": -1}, "method.ramp_images must not be negative"),
        ({"from_data": True, "guidance": lambda teacher: ClassifierFree(teacher, scale=2.0)}, "no teacher to guide"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(options, words):
    with pytest.raises(ValueError, match=words) as error:
        module_of(**options)
    assert "\n" not in str(error.value)
