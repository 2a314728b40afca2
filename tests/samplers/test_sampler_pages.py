"""The code of docs/samplers.md and docs/guidance.md runs and does what the pages say."""

import math
import re
from functools import partial
from pathlib import Path

import torch
from problems import INTERPOLANTS, mixture_1d, solve

from diffusion_lab.process import Cosine
from diffusion_lab.samplers import DDIM, Generation
from diffusion_lab.samplers.grids import uniform_u

DOCS = Path(__file__).parents[2] / "docs"


def run_page(name):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.S)
    names: dict = {"__name__": "docs_page"}
    exec(compile(code, name, "exec", dont_inherit=True), names)
    return names, code


def test_write_your_own_sampler():
    names, code = run_page("samplers.md")
    body = code[code.index("class Ralston") :]
    assert len(body.strip().splitlines()) <= 22
    sampler, reference = names["Ralston"](), solve(names["Ralston"](), INTERPOLANTS["vp"], 4000)
    for interpolant in INTERPOLANTS.values():
        errors = [float((solve(sampler, interpolant, n) - reference).abs().max()) for n in (80, 160)]
        assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.35


def test_write_your_own_guidance():
    names, _ = run_page("guidance.md")
    guidance = partial(names["Quantised"], strength=1.0)
    grid = uniform_u(Cosine(logsnr_min=-12, logsnr_max=12), 20)
    samples = Generation(sampler=DDIM(), grid=grid, guidance=guidance, shape=(1,))(
        mixture_1d(INTERPOLANTS["vp"]), seeds=range(20)
    )
    levels = (samples + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-4) and len(samples.unique()) > 5
