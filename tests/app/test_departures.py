"""A student that is sampled otherwise than it learnt is told of: in other steps, by another sampler, too early."""

import pytest

from diffusion_lab.app.sampling.departures import departures

DDIM = {"_target_": "diffusion_lab.samplers.DDIM", "eta": 0.0}
# 8 -> 4 -> 2 -> 1, the last two twice as long: borders at 32, 96 and 160 images
HALVED = {
    "teacher": {"run": "t"},
    "loss": {"_target_": "ProgressiveLoss"},
    "steps_from": 8,
    "steps_to": 1,
    "longer": {2: 2.0, 1: 2.0},
    "max_images": 160,
    "global_batch_size": 16,
}


def told(method, steps=None, *, sampler=DDIM, weights="raw", images=160):
    grid = {"logsnrs": [0.0]} if steps is None else {"_target_": "uniform_u", "steps": steps}
    config = {"method": method, "sampler": DDIM}
    return departures(config, {"sampler": sampler, "grid": grid}, weights=weights, images_seen=images)


def test_a_student_of_one_number_of_steps():
    student = {"teacher": {"run": "t"}, "steps": 4}
    assert told(student, 4) == told(student) == []
    assert told({"steps": 4}, 8) == told({}, 8) == told({"teacher": {}}, 8) == []
    assert told(student, 8, sampler={**DDIM, "eta": 1.0}) == [
        "grid.steps=8: this student was trained for 4",
        "sampler DDIM(eta=1.0): this student was trained for DDIM(eta=0.0)",
    ]


@pytest.mark.parametrize(
    ("weights", "images", "steps", "expected"),
    [
        ("raw", 160, 1, []),
        ("raw", 160, None, []),
        ("raw", 160, 4, ["grid.steps=4: this student, raw, was trained for 1; ema=steps_4 is for 4"]),
        ("steps_4", 32, 4, []),
        ("steps_4", 32, 5, ["grid.steps=5: this student, steps_4, was trained for 4"]),
        ("steps_4", 32, 2, ["grid.steps=2: this student, steps_4, was trained for 4; ema=steps_2 is for 2"]),
        # an interrupted run
        ("raw", 16, 1, ["raw at 16 images: a student that is still learning 4 steps"]),
        ("raw", 32, 4, []),
        (
            "raw",
            80,
            1,
            [
                "raw at 80 images: a student that is still learning 2 steps; ema=steps_4 is the last that has learnt "
                "its own"
            ],
        ),
    ],
)
def test_students_of_halvings(weights, images, steps, expected):
    assert told(HALVED, steps, weights=weights, images=images) == expected


def test_the_student_of_two_double_steps_may_take_one():
    double = {**HALVED, "loss": {"_target_": "x.DoubleStepLoss"}, "steps_to": 2}
    assert told(double, 1, weights="steps_2") == told(double, 2, weights="steps_2") == []
    assert told(double, 1, weights="steps_4") != [] != told(HALVED, 1, weights="steps_2")
