"""The schedule of docs/process.md runs and passes what every schedule must."""

import re
from pathlib import Path

import torch

from diffusion_lab.process import Schedule

PAGE = Path(__file__).parents[2] / "docs" / "process.md"


def test_write_your_own_schedule():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict = {"__name__": "docs"}
    exec(compile(code, str(PAGE), "exec", dont_inherit=True), names)
    schedule = names["UniformFlowTime"]()
    assert isinstance(schedule, Schedule)
    u = torch.linspace(0, 1, 101, dtype=torch.float64)[1:-1].requires_grad_()
    logsnr = schedule(u)
    (slope,) = torch.autograd.grad(logsnr.sum(), u)
    torch.testing.assert_close(schedule.inverse(logsnr), u, rtol=0, atol=1e-12)
    torch.testing.assert_close(schedule.log_density(logsnr), -torch.log(-slope), rtol=0, atol=1e-9)
