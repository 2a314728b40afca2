"""The house stands on its layers: mathematics imports no framework, and imports point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import diffusion_lab

PACKAGE = Path(diffusion_lab.__file__).parent
PURE = [
    "process",
    "denoisers",
    "losses",
    "guidance",
    "measurements",
    "posterior",
    "rewards",
    "samplers",
    "networks",
    "metrics",
    "likelihood",
    "ema",
    "ema_posthoc",
    "sharded",
    "rng",
    "typing",
    "images",
    "forward_mode",
]
FRAMEWORKS = ["lightning", "pytorch_lightning", "hydra", "omegaconf", "wandb"]

# who may import whom inside the house; typing, rng, images and forward_mode are for everybody
FLOORS = {
    "process": set(),
    "networks": set(),
    "denoisers": {"process"},
    "losses": {"process", "denoisers"},
    "guidance": {"process", "denoisers", "networks", "samplers"},
    "measurements": {"process"},
    "posterior": {"process", "denoisers", "guidance", "samplers", "measurements", "rewards"},
    "rewards": {"measurements", "metrics"},
    "samplers": {"process", "denoisers"},
    "metrics": {"files"},
    "likelihood": {"process", "denoisers", "losses", "samplers"},
    "ema": {"sharded"},
    "ema_posthoc": set(),
    "sharded": set(),
}


def modules_of(name):
    path = PACKAGE / name
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_pure_layer_runs_without_frameworks():
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for part in PURE
        for path in modules_of(part)
        if path.exists()
    ]
    assert len(names) > 20
    script = (
        "import importlib, sys\n"
        f"for name in {FRAMEWORKS!r}: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_imports_point_one_way():
    wrong = []
    for part, allowed in FLOORS.items():
        for path in modules_of(part):
            for name in imports_of(path):
                parts = name.split(".")
                if parts[0] == "diffusion_lab" and len(parts) > 1:
                    inside = parts[1] in allowed | {part, "typing", "rng", "images", "forward_mode"}
                    if not inside:
                        wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, wrong


def test_no_file_needs_one_that_needs_it():
    """Those inside functions and for types alone count too; what a file does when it is run as a program does not."""
    needs = {}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        tree.body = [
            node
            for node in tree.body
            if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))
        ]
        needs[path] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusion_lab"):
                for name in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]:
                    file = PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py")
                    # the faces of packages are left out: who imports a name there means the file behind it
                    needs[path] |= {file} if file.is_file() and file != path else set()
    while free := {path for path, files in needs.items() if not files & needs.keys()}:
        needs = {path: files for path, files in needs.items() if path not in free}
    rest = {path for files in needs.values() for path in files & needs.keys()}
    assert not rest, sorted(str(path.relative_to(PACKAGE)) for path in rest)


def test_importing_the_package_is_light():
    script = "import sys, diffusion_lab; print([m for m in ('torch', 'torchvision', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_public_function_takes_arbitrary_keywords():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.args.kwarg and not node.name.startswith("_"):
                wrong.append(f"{path.relative_to(PACKAGE)}: {node.name}(**{node.args.kwarg.arg})")
    assert not wrong, wrong


def test_library_code_never_draws_from_the_global_random_state():
    drawing = {
        "randn",
        "rand",
        "randint",
        "randperm",
        "randn_like",
        "rand_like",
        "randint_like",
        "bernoulli",
        "multinomial",
    }
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in drawing
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "torch"
                and not any(keyword.arg == "generator" for keyword in node.keywords)
            ):
                wrong.append(
                    f"{path.relative_to(PACKAGE)}:{node.lineno} torch.{node.func.attr} without a generator"
                )
    assert not wrong, wrong
