"""The command line: help, completion, one-line errors, sweeps. The apps themselves are stand-ins."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from diffusion_lab.app import cli
from diffusion_lab.app.config.messages import unknown_key
from diffusion_lab.app.config.rules import check_precision
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.session import conf_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def app(monkeypatch, tmp_path):
    """Put a stand-in for `diffusion_lab.app.train`, sample and evaluate in place; it records its configs."""
    calls = []

    def run(cfg):
        calls.append(cfg)
        if cfg.seed == 13:
            raise UserError("thirteen is\nunlucky")
        if cfg.seed == 14:
            raise RuntimeError("a defect")
        return 0.5

    for name in ("train", "sample", "evaluate"):
        module = types.ModuleType(f"diffusion_lab.app.{name}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
    compare = types.ModuleType("diffusion_lab.app.scoring.compare")
    compare.finish = lambda session: None
    monkeypatch.setitem(sys.modules, compare.__name__, compare)
    monkeypatch.setattr("diffusion_lab.app.config.validate._nodes", lambda cfg, prefix: None)
    monkeypatch.delenv("DIFFUSION_LAB_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)
    return calls


def script(*arguments, name="train.py", **env):
    return subprocess.run(
        [sys.executable, str(ROOT / name), *arguments],
        capture_output=True, text=True, timeout=60, env={**os.environ, **env},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["train.py", "sample.py", "evaluate.py"])
def test_help_lists_groups_and_five_commands(name):
    done = script("--help", name=name)
    assert done.returncode == 0 and done.stderr == ""
    for group in ("schedule", "sampler", "guidance"):
        assert f"\n  {group} " in done.stdout
    assert ("dpmpp_2m" in done.stdout and "experiment=digits/quickstart" in done.stdout) or name != "train.py"
    commands = [line for line in done.stdout.splitlines() if line.startswith(f"  python {name} ")]
    assert len(commands) == 5
    taught = done.stdout.partition("method.teacher.run=<folder>, of")[2].partition("\n\n")[0]
    names = {word.strip(", ") for word in taught.split()}
    assert names >= {"progressive", "guided_stochastic", "em"} or name != "train.py"
    assert not names & {"diffusion", "shortcut_scratch", "vdm"}


def test_help_lists_the_groups_of_a_users_config_dir(tmp_path):
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / "mine.yaml").write_text("_target_: diffusion_lab.samplers.DDIM\n")
    assert "mine" in script("--help", "--config-dir", str(tmp_path)).stdout
    done = script("--config-dir", str(tmp_path / "none"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such folder" in done.stderr


def test_nothing_heavy_is_imported_for_help_composition_and_errors():
    code = (
        "import sys; from diffusion_lab.app.cli import main\n"
        "assert main('train', ['--cfg', 'job']) == 0\n"
        "assert main('train', ['--help']) == 0\n"
        "assert main('train', ['optimizer.lrr=1']) == 2\n"
        "assert main('train', ['+optimizer.lrr=1']) == 2\n"
        "assert main('train', ['--seed=1']) == 2\n"
        "assert main('train', ['resume=atuo']) == 2\n"
        "heavy = {'torch', 'lightning', 'wandb', 'numpy', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("samplr=heun", "samplr=heun: no group or key 'samplr'; did you mean 'sampler'?"),
        ("sampler=huen", "sampler=huen: no option 'huen' in group 'sampler'; did you mean 'heun'?"),
        (
            "sampler=dpm",
            "sampler=dpm: no option 'dpm' in group 'sampler'; "
            "did you mean 'dpm_solver', 'dpm_solver_v3', 'dpmpp_2m' or 'ddpm'?",
        ),
        ("learning_rate=1", "learning_rate=1: no group or key 'learning_rate'; did you mean 'optimizer.lr'?"),
        ("optimizer.lrr=1", "optimizer.lrr=1: no key 'lrr' in 'optimizer'; did you mean 'lr'?"),
        ("optmizer.lr=1", "optmizer.lr=1: no key 'optmizer.lr'; did you mean 'optimizer.lr'?"),
        ("lr=1", "lr=1: no group or key 'lr'; did you mean 'optimizer.lr'?"),
        (
            "guidance.scale=2",
            "guidance.scale=2: no key 'scale' in 'guidance', which has no settings; another is guidance=<option>",
        ),
        ("sed=1", "sed=1: no group or key 'sed'; did you mean 'seed'?"),
        (
            "trainer.precision=bf17",
            "trainer.precision=bf17: no such precision; choose one of 32-true, 64-true, bf16-mixed, 16-mixed",
        ),
        (
            "trainer.precision=bf16-true",
            "trainer.precision=bf16-true: weights and coefficients keep float32 or better; choose one of 32-true, "
            "64-true, bf16-mixed, 16-mixed",
        ),
        (
            "experiment=digits/quickstat",
            "experiment=digits/quickstat: no option 'digits/quickstat' in group 'experiment'; "
            "did you mean 'digits/quickstart'?",
        ),
        ("optimizer.lr=[1,", "optimizer.lr=[1,: malformed override: no viable alternative at input '[1,'"),
        ("heun", "heun: an override reads key=value (or ~key to drop one)"),
        (
            "~callbacks.progres",
            "~callbacks.progres: no key 'progres' in 'callbacks'; did you mean 'progress'?",
        ),
        ("seed=abc", "seed: expects int, got 'abc'"),
        ("batch_size=0", "batch_size: must be at least 1, got 0"),
        ("max_images=1e6", "max_images: expects int, got 1000000.0"),
        ("paths.runs=7", "paths.runs: expects str, got 7"),
        ("name=../elsewhere", "name: must be a plain name such as digits/quickstart"),
        ("+sede=1", "sede: no such key; did you mean 'seed'?"),
        ("+paths.rums=x", "paths.rums: no such key; did you mean 'runs'?"),
        (
            "dataset=image_folder",
            "dataset.root: a value is needed; add dataset.root=<value> to the command line",
        ),
        ("generation.shape=${shap}", "generation.shape: '${shap}' leads nowhere; did you mean 'shape'?"),
        ("+seed=1", "+seed=1: 'seed' exists already; write seed=1 to change it"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(app, capsys, override, expected):
    assert cli.main("train", [override]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.rstrip("\n").rstrip() == f"error: {expected}".rstrip()
    assert not app


def test_a_grid_without_steps_says_so():
    told = unknown_key("grid.steps", "grid.steps=4", [conf_folder()], ["grid._target_", "grid.logsnrs"])
    assert told == "grid.steps=4: this grid has its levels told one by one, logsnrs; another is grid=<option>"


def test_a_mistake_from_a_real_process():
    done = script("optimizer.lrr=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: optimizer.lrr=1: no key 'lrr' in 'optimizer'; did you mean 'lr'?\n"
    assert "Traceback" in script("optimizer.lrr=1", DIFFUSION_LAB_TRACEBACK="1").stderr


def test_a_broken_config_file_is_one_line(app, capsys, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bad.yaml").write_text("# @package _global_\nseed: [1\n")
    assert cli.main("train", ["--config-dir", str(tmp_path), "experiment=bad"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "bad.yaml" in err
    (tmp_path / "experiment" / "bad.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /samplr: heun\n"
    )
    assert cli.main("train", ["--config-dir", str(tmp_path), "experiment=bad"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "did you mean 'sampler'?" in err
    (tmp_path / "experiment" / "bad.yaml").write_text("# @package _global_\nmax_image: 5\n")
    assert cli.main("train", ["--config-dir", str(tmp_path), "experiment=bad"]) == 2
    assert capsys.readouterr().err == "error: max_image: no such key; did you mean 'max_images'?\n"


def test_the_app_gets_config_choices_overrides_and_name(app):
    assert cli.main("train", ["experiment=digits/quickstart", "sampler=heun", "seed=3"]) == 0
    (cfg,) = app
    assert cfg.name == "digits/quickstart" and cfg.seed == 3
    assert cfg.choices.sampler == "heun" and cfg.choices.dataset == "digits"
    assert not any(key.startswith("hydra") for key in cfg.choices)
    assert list(cfg.overrides) == ["experiment=digits/quickstart", "sampler=heun", "seed=3"]
    assert cli.main("train", []) == 0 and app[1].name == "unnamed"
    assert cli.main("train", ["name=mine"]) == 0 and app[2].name == "mine"


def test_errors_of_the_app(app, capsys):
    assert cli.main("train", ["seed=13"]) == 2
    assert capsys.readouterr().err == "error: thirteen is unlucky\n"
    assert cli.main("train", ["seed=14"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_object_that_refuses_its_arguments_is_one_line_with_its_key(app, capsys, monkeypatch):
    import hydra

    def run(cfg):
        hydra.utils.instantiate(cfg.schedule)

    monkeypatch.setattr(sys.modules["diffusion_lab.app.train"], "run", run)
    assert cli.main("train", ["schedule.logsnr_min=20"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and "logsnr_min < logsnr_max" in err


def test_a_sweep_goes_on_after_a_failed_job(app, capsys):
    assert cli.main("train", ["-m", "seed=1,13,14,2", "optimizer.lr=1e-3"]) == 1
    assert [cfg.seed for cfg in app] == [1, 13, 14, 2]
    assert not any("launcher" in cfg or "sweep" in cfg for cfg in app), "these are no part of a run"
    assert next(list(cfg.overrides) for cfg in app) == ["seed=1", "optimizer.lr=0.001"]
    out, err = capsys.readouterr()
    told = [line.split("  ")[0] for line in out.splitlines() if "of 4" in line]
    assert told == [f"job {k} of 4 (seed={seed})" for k, seed in enumerate((1, 13, 14, 2), 1)]
    assert "job 3 failed: RuntimeError: a defect" in out
    assert err.splitlines() == [
        "job 2 of 4 (seed=13): thirteen is unlucky",
        "job 3 of 4 (seed=14): RuntimeError: a defect",
        "2 of 4 jobs failed",
    ]
    assert cli.main("train", ["-m", "seed=1,2"]) == 0


def test_jobs_of_a_sweep_are_announced_with_what_varies(app, run_folder, capsys):
    a, b = run_folder("a"), run_folder("b c")
    assert cli.main("sample", ["-m", f"run={a},{b}", "num_samples=12", "grid.steps=range(5,7)"]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        f"job {k} of 4 (run={folder} grid.steps={steps})"
        for k, (folder, steps) in enumerate([(a, 5), (a, 6), (b, 5), (b, 6)], 1)
    ]
    assert cli.main("train", ["-m", "seed=3"]) == 0
    assert "\njob 1 of 1\n" in capsys.readouterr().out


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_a_warm_up_that_outlasts_the_run_is_refused_before_anything_is_read(app, capsys, decay):
    words = [f"lr_schedule={decay}", "max_images=1000"]
    assert cli.main("train", [*words, "lr_schedule.warmup_images=1000"]) == 2
    assert capsys.readouterr().err == (
        "error: lr_schedule.warmup_images=1000: the warm-up must be shorter than the run, max_images=1000; "
        "try lr_schedule.warmup_images=100\n"
    )
    assert not app
    assert cli.main("train", [*words, "lr_schedule.warmup_images=999"]) == 0
    # without an end there is nothing to reach
    assert (
        cli.main("train", ["lr_schedule=constant", "max_images=1000", "lr_schedule.warmup_images=5000"]) == 0
    )
    assert len(app) == 2


@pytest.mark.parametrize(
    "word", ["32", "64", "bf16", "16", "32-true", "64-true", "bf16-mixed", "16-mixed", "null"]
)
def test_precisions_that_there_are(word):
    check_precision(None if word == "null" else int(word) if word.isdigit() else word)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--experiment=digits/quickstart"], "did you mean experiment=digits/quickstart?"),
        (["--experiment", "digits/quickstart"], "did you mean experiment=digits/quickstart?"),
        (["--optimizer.lr=1e-3", "seed=1"], "did you mean optimizer.lr=1e-3?"),
        (["--run=runs/x"], "did you mean run=runs/x?"),
        (["--multirn", "seed=0,1"], "error: --multirn: no such option; did you mean '--multirun'?"),
        (["-x"], "error: -x: no such option; see --help"),
        (["--cfg", "jobb"], "invalid choice: 'jobb'"),
        (["seed=1", "--cfg"], "expected one argument"),
        (
            ["schedule=cosine,", "sigmoid"],
            "schedule=cosine, sigmoid: a list has no blanks: schedule=cosine,sigmoid",
        ),
        (
            ["-m", "seed=1", ",2,", "3", "max_images=9"],
            "error: seed=1 ,2, 3: a list has no blanks: seed=1,2,3\n",
        ),
        (["shape=[1,", "8,", "8]"], "error: shape=[1, 8, 8]: a list has no blanks: shape=[1,8,8]\n"),
        (["seed=1,", "max_images=9"], "error: seed=1,: a value is missing behind the comma\n"),
        (
            ["schedule=cosine,sigmoid"],
            "error: schedule=cosine,sigmoid: several values are a sweep, add --multirun; "
            "one value that is a list: 'schedule=[cosine,sigmoid]'\n",
        ),
        (["resume=atuo"], "error: resume=atuo: no such folder; did you mean 'auto'?"),
        (["resume=here/ther/x"], "error: resume=here/ther/x: no such folder; did you mean 'here/there/x'?"),
    ],
)
def test_dashes_and_resume_are_one_line(app, capsys, tmp_path, arguments, expected):
    (tmp_path / "here" / "there" / "x").mkdir(parents=True)
    assert cli.main("train", arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and expected in err
    assert not app


def test_a_misspelt_run_folder_is_recognised(app, capsys, run_folder):
    folder = run_folder("quickstart").parent
    assert cli.main("sample", [f"run={folder}/quickstrat"]) == 2
    assert f"no such folder; did you mean '{folder}/quickstart'?" in capsys.readouterr().err
    assert cli.main("sample", [f"run={folder.parent}/{folder.name[:-1]}x/quickstart"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_trial_is_called_debug(app):
    assert cli.main("train", ["experiment=digits/quickstart", "debug=fast"]) == 0
    assert cli.main("train", ["debug=overfit"]) == 0
    assert cli.main("train", ["debug=none"]) == 0
    assert cli.main("train", ["debug=fast", "name=mine"]) == 0
    assert [cfg.name for cfg in app] == ["debug/digits/quickstart", "debug/unnamed", "unnamed", "mine"]


def test_the_recorded_command_can_be_pasted(app, run_folder):
    import shlex

    from diffusion_lab.app.runs import record

    folder = run_folder("it's a run")
    for words in ([f"run={folder}", "labels=[1,2]"], ["-m", f"run={folder}", "labels=[1,2]"]):
        assert cli.main("evaluate", words) == 0
        command = record.command("evaluate", list(app[-1].overrides))
        assert shlex.split(command) == ["python", "evaluate.py", f"run={folder}", "labels=[1,2]"]
    plain = run_folder("plain")
    assert cli.main("evaluate", [f"run={plain}"]) == 0
    assert record.command("evaluate", list(app[-1].overrides)) == f"python evaluate.py run={plain}"


def test_a_misspelt_option_of_a_sweep_stops_it_before_the_first_job(app, capsys):
    assert cli.main("train", ["-m", "sampler=heun,dimm"]) == 2
    assert "no option 'dimm' in group 'sampler'; did you mean 'ddim'?" in capsys.readouterr().err
    assert not app


@pytest.mark.slow
def test_no_folder_of_hydras_is_left(app, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main("train", []) == 0
    assert list(tmp_path.iterdir()) == []
    assert cli.main("train", ["-m", "seed=1,2", "paths.runs=here"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    (sweep,) = (tmp_path / "here" / "sweeps").glob("[0-9]*")
    found = {path.name for path in sweep.iterdir() if not path.name.startswith(".")}
    assert found == {"multirun.yaml", "sweep.json", "sweep.html", "jobs"}


def test_completion_answers_and_the_scripts_carry_hydras_mark():
    for name in ("train.py", "sample.py", "evaluate.py"):
        assert "@hydra.main" in (ROOT / name).read_text()
    line = "train.py sampler=d"
    done = script("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    answers = done.stdout.split()
    assert {"sampler=ddim", "sampler=ddpm", "sampler=dpmpp_2m"} <= set(answers)
    assert all(answer.startswith("sampler=d") for answer in answers)


def test_bash_completion_end_to_end(tmp_path):
    program = f"""
        eval "$({sys.executable} train.py -sc install=bash)"
        PATH={Path(sys.executable).parent}:$PATH
        COMP_LINE="python train.py schedule=lin"; COMP_POINT=${{#COMP_LINE}}; COMP_CWORD=2; COMP_WORDS=($COMP_LINE)
        hydra_bash_completion; echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.split() == ["schedule=linear_beta", "schedule=linear_logsnr"], done.stderr


def test_the_configs_are_found_in_an_installed_package(tmp_path):
    import shutil

    shutil.copytree(
        ROOT / "diffusion_lab",
        tmp_path / "diffusion_lab",
        ignore=shutil.ignore_patterns("weights", "__pycache__"),
    )
    shutil.copytree(ROOT / "conf", tmp_path / "diffusion_lab" / "conf")
    code = (
        "from diffusion_lab.app.cli import main; from diffusion_lab.app.session import conf_folder; "
        "print(conf_folder()); main('train', ['--cfg', 'job'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.stdout.startswith(str(tmp_path / "diffusion_lab" / "conf")) and "max_images" in done.stdout


# ---- sample.py and evaluate.py ----------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with only a config.yaml, as the app writes it."""

    def make(name="a", **changes):
        from omegaconf import OmegaConf

        schedule = {"_target_": "diffusion_lab.process.Cosine", "logsnr_min": -12.0, "logsnr_max": 9.0}
        config = {
            "shape": [1, 8, 8],
            "num_classes": 10,
            "schedule": schedule,
            "sampler": {"_target_": "diffusion_lab.process.Cosine", "logsnr_min": 0.25},
            "grid": {"_target_": "diffusion_lab.process.Cosine", "schedule": schedule, "steps": 25},
            "guidance": {"_target_": "diffusion_lab.process.Cosine", "scale": 3.0},
            "metrics": {"_target_": "diffusion_lab.process.Cosine"},
            "choices": {"sampler": "ddim", "grid": "uniform_u", "guidance": "cfg", "schedule": "cosine"},
            **changes,
        }
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
        return folder

    return make


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_what_the_run_recorded_is_the_default(app, run_folder, name):
    folder = run_folder("with = and, comma")
    assert cli.main(name, [f"run={folder}", "grid.steps=7", "num_samples=12"]) == 0
    (cfg,) = app
    assert cfg.run == str(folder) and cfg.num_samples == 12
    assert cfg.sampler.logsnr_min == 0.25 and cfg.guidance.scale == 3.0
    assert cfg.grid.steps == 7 and cfg.grid.schedule == cfg.schedule and cfg.schedule.logsnr_max == 9.0
    assert list(cfg.shape) == [1, 8, 8] and cfg.num_classes == 10 and list(cfg.generation.shape) == [1, 8, 8]
    assert cfg.choices.sampler == "ddim" and cfg.choices.guidance == "cfg"
    assert list(cfg.overrides)[1:] == ["grid.steps=7", "num_samples=12"]


def test_a_group_chosen_now_replaces_the_recorded_one(app, run_folder):
    folder = run_folder()
    assert (
        cli.main(
            "sample",
            ["sampler=heun", f"run={folder}", "schedule=sigmoid", "guidance=cfg", "guidance.scale=1.5"],
        )
        == 0
    )
    (cfg,) = app
    assert cfg.sampler._target_.endswith("Heun") and "logsnr_min" not in cfg.sampler
    assert cfg.grid.schedule._target_.endswith("Sigmoid"), "the recorded grid follows the schedule chosen now"
    assert cfg.guidance._target_.endswith("ClassifierFree") and cfg.guidance.scale == 1.5
    assert cfg.choices.sampler == "heun" and cfg.choices.grid == "uniform_u"


@pytest.mark.slow
def test_a_sweep_over_groups_and_over_runs(app, run_folder, capsys):
    a, b = run_folder("a"), run_folder("b")
    assert cli.main("sample", ["-m", f"run={a},{b}", "sampler=heun,ddim", "grid.steps=5,6"]) == 0
    assert len(app) == 8
    assert {(Path(cfg.run).name, cfg.choices.sampler, cfg.grid.steps) for cfg in app} == {
        (run, sampler, steps) for run in "ab" for sampler in ("heun", "ddim") for steps in (5, 6)
    }
    c = run_folder("c", guidance={"_target_": "diffusion_lab.process.Cosine", "scale": 1.0})
    assert cli.main("sample", ["-m", f"run={a},{c}"]) == 2
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1 and "differ in their guidance; choose one for all with guidance=<option>" in err
    )
    assert cli.main("sample", ["-m", f"run={a},{c}", "guidance=none"]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "run=<folder> is needed"),
        (["run=nowhere/at/all"], "run=nowhere/at/all: no such folder"),
        (["run=."], "run=.: not a run folder or an export, it has no config.yaml"),
    ],
)
def test_no_run_is_one_line(app, capsys, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert cli.main("sample", arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and expected in err


def test_a_hostile_or_broken_run_is_refused(app, capsys, run_folder):
    hostile = run_folder("hostile", sampler={"_target_": "os.system", "command": "true"})
    assert cli.main("sample", [f"run={hostile}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "sampler._target_ = 'os.system' is not among the targets" in err
    (hostile / "config.yaml").write_text("a: [1\n")
    assert cli.main("sample", [f"run={hostile}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "not readable as YAML" in err
    assert not app
