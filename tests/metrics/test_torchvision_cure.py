"""The import cure: needed, not needed, absent, and any other error. Each in a process of its own."""

import importlib.util
import subprocess
import sys
import textwrap

import pytest

COUNT = """
import builtins
from . import extension
builtins.runs = getattr(builtins, "runs", 0) + 1
"""
FAKE_BROKEN = f"""{COUNT}
import torch
try:
    torch._C._get_schema("torchvision::nms", "")
except RuntimeError:
    raise RuntimeError("operator torchvision::nms does not exist") from None
"""
FAKE_HEALTHY = COUNT


def run(script, *, first_on_path=None):
    prelude = f"import sys; sys.path.insert(0, {str(first_on_path)!r})\n" if first_on_path else ""
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)], capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stdout.strip(), done.stderr


def fake(folder, init):
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(init)
    (package / "extension.py").write_text(
        "import builtins\nbuiltins.loads = getattr(builtins, 'loads', 0) + 1\n"
    )
    return folder


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_everything_imports_after_diffusion_lab():
    code, out, err = run("""
        import sys, diffusion_lab
        assert not {"torch", "torchvision"} & set(sys.modules), "importing the package must be light"
        import lightning, torchmetrics, torch_fidelity, torchvision, torch
        assert torchvision.extension is sys.modules["torchvision.extension"]
        assert type(torchvision.__loader__).__module__ != "diffusion_lab._torchvision"
        assert torchvision.utils.make_grid(torch.zeros(2, 3, 4, 4)).shape == (3, 8, 14)
        print("fine")
    """)
    assert code == 0 and out == "fine", err


def test_a_broken_torchvision_is_run_a_second_time(tmp_path):
    code, out, err = run(
        """
        import diffusion_lab, torchvision, builtins, sys
        print(builtins.runs, builtins.loads, torchvision.extension is sys.modules["torchvision.extension"])
        """,
        first_on_path=fake(tmp_path, FAKE_BROKEN),
    )
    assert code == 0, err
    assert out == "2 2 True"  # the half-imported submodule was dropped and imported anew


@pytest.mark.slow
def test_the_broken_one_does_fail_without_the_cure(tmp_path):
    code, _, err = run("import torchvision", first_on_path=fake(tmp_path, FAKE_BROKEN))
    assert code != 0 and "torchvision::nms" in err


def test_a_healthy_torchvision_is_run_once_and_nothing_is_declared(tmp_path):
    code, out, err = run(
        """
        import builtins, diffusion_lab, torchvision
        from diffusion_lab import _torchvision
        print(builtins.runs, _torchvision._declared, "torch" in __import__("sys").modules)
        """,
        first_on_path=fake(tmp_path, FAKE_HEALTHY),
    )
    assert code == 0, err
    assert out == "1 [] False"


def test_an_absent_torchvision_stays_absent():
    code, out, err = run("""
        import sys, diffusion_lab
        sys.path[:] = []
        sys.path_importer_cache.clear()
        import importlib.util
        print(importlib.util.find_spec("torchvision"))
        try:
            import torchvision
        except ModuleNotFoundError as error:
            print(error.name)
    """)
    assert code == 0, err
    assert out.split() == ["None", "torchvision"]


def test_other_errors_are_passed_on(tmp_path):
    code, _, err = run(
        "import diffusion_lab, torchvision",
        first_on_path=fake(tmp_path, "raise RuntimeError('disk on fire')"),
    )
    assert code != 0 and "disk on fire" in err and "nms" not in err


def test_installing_twice_lays_one_hook():
    code, out, err = run("""
        import sys, diffusion_lab
        from diffusion_lab import _torchvision
        _torchvision.install()
        print(sum(isinstance(finder, _torchvision.Finder) for finder in sys.meta_path))
    """)
    assert code == 0 and out == "1", err
