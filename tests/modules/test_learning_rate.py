from itertools import pairwise

import pytest

from diffusion_lab.modules.learning_rate import Constant, CosineDecay, InverseSquareRoot, LinearDecay


def test_constant_warms_up_and_stays():
    schedule = Constant(warmup_images=99)
    assert schedule(0) == 0.01
    assert schedule(49) == pytest.approx(0.5)
    assert schedule(99) == schedule(10**9) == 1.0
    assert Constant()(0) == 1.0


@pytest.mark.parametrize("schedule", [CosineDecay, LinearDecay])
def test_decays_have_their_ends_and_their_middle(schedule):
    decay = schedule(max_images=1100, warmup_images=100, final=0.2)
    assert decay(100) == 1.0
    assert decay(600) == pytest.approx(0.6)  # half way between 1 and 0.2 for both shapes
    assert decay(1100) == decay(5000) == pytest.approx(0.2)
    values = [decay(n) for n in range(100, 1101, 50)]
    assert all(a > b for a, b in pairwise(values))
    assert decay(0) == pytest.approx(1 / 101)


def test_cosine_is_a_cosine():
    # a quarter of the way down: (1 + cos(pi/4)) / 2
    assert CosineDecay(max_images=400)(100) == pytest.approx((1 + 2**-0.5) / 2)


def test_linear_is_a_line():
    # a quarter of the way from 1 to 0.2
    assert LinearDecay(max_images=400, final=0.2)(100) == pytest.approx(0.8)
    assert LinearDecay(max_images=500, warmup_images=100)(200) == pytest.approx(0.75)


def test_inverse_square_root_is_edm2s():
    # the paper: alpha(t) = alpha_ref / sqrt(max(t / t_ref, 1))
    schedule = InverseSquareRoot(reference_images=1000, warmup_images=100)
    assert schedule(49) == pytest.approx(50 / 101) and schedule(100) == schedule(1000) == 1.0
    assert schedule(4000) == pytest.approx(0.5) and schedule(9000) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: InverseSquareRoot(reference_images=0),
        lambda: InverseSquareRoot(reference_images=1, warmup_images=-1),
        lambda: Constant(warmup_images=-1),
        lambda: CosineDecay(max_images=10, warmup_images=10),
        lambda: LinearDecay(max_images=10, final=1.5),
        lambda: LinearDecay(max_images=10, warmup_images=-2),
    ],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(ValueError):
        make()
