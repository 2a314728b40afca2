"""A guidance that builds on another: the inner one is chosen and set on the command line."""

import pytest
import tiny_runs

from diffusion_lab.app.session import conf_folder

STUB = '''
from diffusion_lab.guidance import unguided


class Shrink:
    """The guidance below, made shorter."""

    def __init__(self, denoiser, factor=1.0, inner=unguided):
        self.denoiser = inner(denoiser)
        self.interpolant, self.factor = denoiser.interpolant, factor

    def __call__(self, x, logsnr, cond=None):
        return self.factor * self.denoiser(x, logsnr, cond)
'''
YAML = """
defaults:
  - /guidance@inner: none
  - _self_
_target_: stub_inner.Shrink
_partial_: true
factor: 1.0
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "stub_inner.py").write_text(STUB)
    (folder / "conf" / "guidance").mkdir(parents=True)
    (folder / "conf" / "guidance" / "shrink.yaml").write_text(YAML)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield f"--config-dir={folder / 'conf'}"


def sample(out, run, *more, code=0):
    # Hydra wants its own options first
    own, words = ([more[0]], more[1:]) if more and more[0].startswith("--") else ([], more)
    assert tiny_runs.main("sample", *own, f"run={run}", f"out={out}", "num_samples=20", *words) == code
    return tiny_runs.images_of(out)[0] if code == 0 else None


def test_the_inner_guidance_is_chosen_and_set(trained, own, tmp_path):
    plain = sample(tmp_path / "plain", trained)
    cfg = sample(tmp_path / "cfg", trained, "guidance=cfg", "guidance.scale=3")
    assert (plain != cfg).any()
    assert (sample(tmp_path / "a", trained, own, "guidance=shrink") == plain).all()
    words = ["guidance=shrink", "guidance@guidance.inner=cfg", "guidance.inner.scale=3"]
    assert (sample(tmp_path / "b", trained, own, *words) == cfg).all()
    settings = tiny_runs.record_of(tmp_path / "b")["settings"]["generation"]["guidance"]
    assert settings["inner"]["_target_"] == "diffusion_lab.guidance.ClassifierFree"
    assert tiny_runs.record_of(tmp_path / "b")["nfe"] == 6
    assert "guidance@guidance.inner=cfg" in tiny_runs.record_of(tmp_path / "b")["command"]
    both = sample(tmp_path / "c", trained, own, *words, "guidance.factor=0.5")
    assert (both != cfg).any()


def test_a_sweep_over_the_inner_guidance(trained, own, tmp_path, capsys):
    words = [own, f"run={trained}", "num_samples=4", "guidance=shrink", "guidance@guidance.inner=none,cfg"]
    assert tiny_runs.main("sample", *words, "--multirun") == 0
    told = capsys.readouterr().out
    assert (
        "job 1 of 2 (guidance@guidance.inner=none)" in told
        and "job 2 of 2 (guidance@guidance.inner=cfg)" in told
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["guidance=shrink", "guidance@guidance.inner=cfgg"], "no option 'cfgg' in group 'guidance'; did you mean 'c"),
        (
            ["guidance=shrink", "guidance@guidance.inner=cfg", "guidance.inner.scal=2"],
            "guidance.inner.scal=2: no key 'scal' in 'guidance.inner'; did you mean 'scale'?",
        ),
        (["guidance=shrink", "guidance.inner.scale=2"], "guidance.inner.scale=2: no key 'scale' in 'guidance.inner'"),
        (
            ["guidance=cfg", "guidance@guidance.inner=cfg"],
            "guidance@guidance.inner=cfg: guidance=cfg builds on no other guidance",
        ),
        (
            ["guidance@guidance.inner=cfg"],
            "guidance@guidance.inner=cfg: the guidance that the run recorded is taken as it is; name it, guidance=",
        ),
        (
            ["guidance=shrink", "guidance@guidance.outer=cfg"],
            "guidance@guidance.outer=cfg: no such place in guidance=shrink; did you mean 'guidance.inner'?",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(trained, own, tmp_path, capsys, words, message):
    sample(tmp_path / "s", trained, own, *words, code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_a_run_remembers_what_it_was_trained_with(own, tmp_path, monkeypatch):
    """Recorded with train.py, taken by sample.py, and the inner settings can still be changed."""
    monkeypatch.setenv("DIFFUSION_LAB_TRUST", "stub_inner")
    words = [own, "guidance=shrink", "guidance@guidance.inner=cfg", "guidance.inner.scale=3"]
    given = [*tiny_runs.TINY, *tiny_runs.NO_PICTURES, f"paths.runs={tmp_path}", "max_images=64"]
    assert tiny_runs.main("train", own, *given, *words[1:]) == 0
    run = (tmp_path / "digits" / "quickstart" / "latest").resolve()
    a = sample(tmp_path / "a", run)
    assert tiny_runs.record_of(tmp_path / "a")["settings"]["generation"]["guidance"]["inner"]["scale"] == 3
    b = sample(tmp_path / "b", run, "guidance.inner.scale=1")
    assert (a != b).any()


def builders():
    """The guidances of the house that build on another one, and can be used without a measurement."""
    for file in sorted((conf_folder() / "guidance").glob("*.yaml")):
        text = file.read_text()
        if "@inner" in text and "${measurement" not in text and "run: null" not in text:
            yield file.stem


@pytest.mark.parametrize("option", builders())
def test_those_that_come_with_the_house(trained, tmp_path, option):
    words = [f"guidance={option}", "sampler=ddpm", "guidance@guidance.inner=cfg", "guidance.inner.scale=2"]
    sample(tmp_path / "s", trained, *words)
    settings = tiny_runs.record_of(tmp_path / "s")["settings"]["generation"]["guidance"]
    assert settings["inner"]["scale"] == 2


def test_every_inner_guidance_can_be_overridden():
    """`none@inner` in a defaults list is a file, not a choice: Hydra refuses to override it."""
    for file in (conf_folder() / "guidance").glob("*.yaml"):
        assert "none@" not in file.read_text(), f"{file.name}: write `- /guidance@inner: none`"
