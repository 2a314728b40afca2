"""What benchmarks/distillation.py trains: the students of each method, and how each is trained and asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from common import ROOT

STEPS = (1, 2, 4, 8)
MANY = 256
SCALE = 2


@dataclass(frozen=True)
class Method:
    """Students of a teacher.

    Attributes:
        experiment: Folder and file of conf/experiment; `{data}` is the data set's.
        steps: Numbers of steps that it has students for.
        words: More words to train a student of N steps, `{steps}`.
        asked: Words to sample that student by.
        one_run: Whether one run has all students.
        of: The method whose student is the teacher; "" for the teacher itself.
        guided: Whether it is compared with the guided teacher.
    """

    experiment: str
    steps: Sequence[int] = STEPS
    words: Sequence[str] = ()
    asked: Sequence[str] = ()
    one_run: bool = False
    of: str = ""
    guided: bool = False


HALVED = ("ema=steps_{steps}", "grid.steps={steps}")
AT_SCALE = f"guidance.scale={SCALE}"
METHODS = {
    "progressive": Method("progressive/{data}", asked=HALVED, one_run=True),
    "progressive, short": Method("progressive/{data}", asked=HALVED, one_run=True),
    "consistency": Method("consistency/{data}", words=("method.steps={steps}",)),
    "consistency training": Method(
        "consistency/{data}", steps=(1, 4), words=("method.steps={steps}", "method.from_data=true")
    ),
    "moment matching": Method("moment_matching/{data}", words=("method.steps={steps}",)),
    "moment matching, instant": Method("moment_matching/{data}_instant", steps=(8,)),
    "EM, K = 16": Method("em/{data}", steps=(1,), words=("method.loss.langevin_steps=16",)),
    "EM, K = 1": Method(
        "em/{data}", steps=(1,), words=("method.loss.langevin_steps=1", "method.loss.gamma_z=0")
    ),
    "distribution matching": Method("distribution_matching/{data}", steps=(1,)),
    "sCM": Method("scm/{data}", asked=("grid.steps={steps}",), one_run=True),
    "shortcut": Method("shortcut/{data}", asked=("grid.steps={steps}",), one_run=True),
    "reflow": Method("reflow/{data}", asked=("grid.steps={steps}",), one_run=True),
    "reflow, one step": Method("reflow/{data}_one_step", steps=(1,), of="reflow"),
    "guided": Method(
        "guided_distillation/{data}", steps=(MANY,), asked=(AT_SCALE, "grid.steps={steps}"), guided=True
    ),
    "guided, progressive": Method(
        "guided_distillation/{data}_steps", asked=(AT_SCALE, *HALVED), one_run=True, of="guided", guided=True
    ),
    "guided, stochastic": Method(
        "guided_distillation/{data}_stochastic",
        steps=(2, 4, 8),
        asked=(AT_SCALE, *HALVED),
        one_run=True,
        of="guided",
        guided=True,
    ),
}
SHORT = {"digits": 51_200, "mnist": 76_800}
"""As many images as cost no more than to train the teacher."""
TELLING = {"consistency": (4,), "consistency training": (4,), "moment matching": (8,)}
"""On MNIST, for methods with a run for each number of steps: the most telling one."""


def methods(data: str) -> dict[str, Method]:
    """The methods that have a recipe for a data set, with the numbers of steps that are tried there."""
    found = {
        name: method
        for name, method in METHODS.items()
        if (ROOT / "conf" / "experiment" / f"{method.experiment.format(data=data)}.yaml").is_file()
    }
    if data == "mnist":
        found |= {name: replace(found[name], steps=steps) for name, steps in TELLING.items()}
    short = f"max_images={SHORT[data]}"
    return found | {"progressive, short": replace(found["progressive, short"], words=(short,))}
