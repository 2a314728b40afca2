"""Sweeps without training: what is skipped, claimed, told apart and tried again. The app is a stand-in."""

import html
import json
import os
import re
import subprocess
import sys
import textwrap
import types
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from diffusion_lab.app import cli
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.report.sweep import Axis, write_up
from diffusion_lab.app.runs import record, resume
from diffusion_lab.app.runs.run import identity
from diffusion_lab.app.session import Session, conf_folder
from diffusion_lab.app.sweep import settings as sweep_settings
from diffusion_lab.app.sweep.check import COLUMNS, check, varied
from diffusion_lab.app.sweep.context import Context, claims_of
from diffusion_lab.app.sweep.journal import (
    Entry,
    Job,
    Journal,
    config_hash,
    find_sweep,
    new_sweep,
    short,
    sweep_key,
    trains,
)
from diffusion_lab.app.sweep.run import _settings, last_wins, look_ahead
from diffusion_lab.app.sweep.table import Pace, cells, collect
from diffusion_lab.claims import claim

ROOT = Path(__file__).parents[2]


@pytest.fixture
def app(monkeypatch, tmp_path):
    """A stand-in for training: it makes or takes up the run folder, writes its record, and lists what it trained."""
    state = types.SimpleNamespace(seeds=[], fail=set(), stop=None, resumed=[])

    def run(cfg):
        if cfg.seed in state.fail:
            raise UserError(f"{cfg.seed} is\nunlucky")
        config = OmegaConf.to_container(cfg, resolve=True)
        folder = resume.decide(config, tell=lambda line: None).folder
        state.resumed.append(cfg.resume)
        cfg.run_id, cfg.paths.run, cfg.resume = folder.path.name, str(folder.path), None
        config = OmegaConf.to_container(cfg, resolve=True)
        folder.config.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
        folder.report.write_text("a report")
        folder.metrics_csv.write_text(f"images_seen,loss\n10,9.0\n20,{0.5 + cfg.seed}\n")
        ended = {"status": "running"}
        try:
            if cfg.seed == state.stop:
                raise KeyboardInterrupt
            state.seeds.append(cfg.seed)
            ended = {"status": "finished", "sessions": [{"images_seen": cfg.max_images}]}
        finally:
            record.write(folder.record, {"identity": identity(config), **ended})
        return folder.path

    module = types.ModuleType("diffusion_lab.app.train")
    module.run = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("diffusion_lab.app.config.validate._nodes", lambda cfg, prefix: None)
    monkeypatch.setattr("diffusion_lab.app.sweep.job.ORPHANS_S", 0.0)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)
    return state


def rows(text):
    """The cells of the page's first table."""
    body = text.split("<tbody>")[1].split("</tbody>")[0]
    lines = re.findall(r"<tr[^>]*>(.*?)</tr>", body)
    return [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<td.*?</td>", line)] for line in lines]


def page():
    (path,) = Path("runs/sweeps").glob("*/sweep.html")
    return path


# ---- a sweep that is sent again ------------------------------------------------------------------------------


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(app, capsys):
    words = ["-m", "seed=1,2,3", "max_images=100"]
    app.fail = {2}
    assert cli.main("train", words) == 1
    assert app.seeds == [1, 3]
    out, err = capsys.readouterr()
    assert "job 2 failed: 2 is unlucky" in out and err.endswith("1 of 3 jobs failed\n")
    assert [row[0] for row in rows(page().read_text())] == ["1", "3", "2"], "best first, failures last"

    app.fail = set()
    assert cli.main("train", [*words, "resume=auto"]) == 0
    assert app.seeds == [1, 3, 2]
    out = capsys.readouterr().out
    assert out.count("finished already, ") == 2 and "job 1 of 3 (seed=1): finished already, " in out
    found = rows(page().read_text())
    assert [row[:2] for row in found] == [["1", "1"], ["2", "2"], ["3", "3"]], "one sweep, and each job once"
    assert "Why" not in page().read_text()


@pytest.mark.slow
def test_without_resume_all_begins_anew(app):
    assert cli.main("train", ["-m", "seed=1,2"]) == 0
    assert cli.main("train", ["-m", "seed=1,2"]) == 0
    assert app.seeds == [1, 2, 1, 2] and app.resumed == [None] * 4
    assert len(list(Path("runs/sweeps").glob("*/sweep.html"))) == 2


@pytest.mark.slow
def test_the_same_config_twice_is_trained_once(app, capsys):
    assert cli.main("train", ["-m", "seed=1,1", "optimizer.lr=1e-3,0.0010,2e-3"]) == 0
    assert app.seeds == [1, 1]
    assert "job 1 of 2" in capsys.readouterr().out
    # other intervals of callbacks that only look, but asked for as two jobs
    assert cli.main("train", ["-m", "callbacks.progress.plain_s=1.0,2.0", "seed=7"]) == 0
    assert app.seeds == [1, 1, 7, 7]
    assert cli.main("train", ["-m", "experiment=digits/quickstart,digits/quickstart", "seed=8"]) == 0
    assert app.seeds.count(8) == 1


@pytest.mark.slow
def test_runs_of_another_sweep_or_of_none_count_as_done(app, capsys):
    assert cli.main("train", ["seed=1", "max_images=100"]) == 0
    assert cli.main("train", ["-m", "seed=1,2", "max_images=100", "resume=auto"]) == 0
    assert cli.main("train", ["-m", "seed=2,3,1", "max_images=100", "resume=auto"]) == 0
    assert app.seeds == [1, 2, 3]
    # longer than it was: taken up, not begun again
    assert cli.main("train", ["-m", "seed=1,2", "max_images=200", "resume=auto"]) == 0
    assert app.seeds == [1, 2, 3, 1, 2] and app.resumed[-2:] != [None, None]
    assert len(list(Path("runs/unnamed").glob("[0-9]*"))) == 3


@pytest.mark.slow
def test_lengths_and_samplers_are_jobs_of_their_own(app):
    """Neither changes what is trained, but the sweep asks for each."""
    assert cli.main("train", ["-m", "max_images=100,200", "sampler=ddim,heun", "resume=auto"]) == 0
    assert len(app.seeds) == 4 and len(list(Path("runs/unnamed").glob("[0-9]*"))) == 4
    assert cli.main("train", ["-m", "max_images=100,200", "sampler=ddim,heun", "resume=auto"]) == 0
    assert len(app.seeds) == 4


def test_an_interrupted_sweep_ends_in_its_table_and_goes_on(app, capsys):
    app.stop = 2
    words = ["-m", "seed=1,2,3", "resume=auto"]
    assert cli.main("train", words) == 130
    assert [(row[0], row[-1]) for row in rows(page().read_text())] == [
        ("1", "finished"), ("2", "interrupted"), ("3", "not started"),
    ]  # fmt: skip
    app.stop = None
    assert cli.main("train", words) == 0
    assert app.seeds == [1, 2, 3]
    assert len(list(Path("runs/unnamed").glob("[0-9]*"))) == 3, "the run that was interrupted was taken up"
    assert app.resumed[2] is not None and Path(app.resumed[2]).is_dir()


@pytest.mark.slow
def test_what_another_process_trains_is_left_to_it(app, capsys):
    """Two sweeps at once, which share a job: the second one leaves it alone, and says who has it."""
    assert cli.main("train", ["-m", "seed=1,2", "resume=auto"]) == 0
    (folder,) = Path("runs/sweeps").glob("[0-9]*/")
    job = Journal(folder).plan()[1]
    (folder / "jobs" / f"{job.config}.json").unlink()
    for run in Path("runs/unnamed").glob("[0-9]*/record.json"):
        run.write_text(json.dumps({"status": "running"}))
    lock = Path("runs/sweeps/.claims") / f"{job.trains}.lock"
    code = f"""
        from pathlib import Path
        from diffusion_lab.claims import claim
        with claim(Path({str(lock)!r})) as held:
            print(held, flush=True)
            input()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "True\n"
        capsys.readouterr()
        assert cli.main("train", ["-m", "seed=1,2", "resume=auto"]) == 0
        assert app.seeds == [1, 2]
        out = capsys.readouterr().out
        assert f"is being trained by process {process.pid} on" in out and "elsewhere" in out
    finally:
        process.communicate("\n", timeout=30)
    assert cli.main("train", ["-m", "seed=1,2", "resume=auto"]) == 0
    assert app.seeds == [1, 2, 2]


def test_a_search_goes_on_after_a_failed_job(app, capsys):
    app.fail = {2, 3}
    assert (
        cli.main("train", ["-m", "sweep=random", "sweep.trials=2", "seed=2,3", "optimizer.lr=interval(1,2)"])
        == 1
    )
    err = capsys.readouterr().err
    assert err.endswith("2 of 2 jobs failed\n") and "Traceback" not in err
    assert [row[-1] for row in rows(page().read_text())] == ["failed", "failed"]


@pytest.mark.parametrize(
    "words",
    [
        ["sweep.objective=fd", "callbacks=[default,frechet]"],
        ["sweep.objective=fd@500/a/ema", "callbacks=[default,frechet]"],
        ["sweep.objective=images_per_s"],
        ["sweep.objective=mine", "+callbacks.mine={_target_:my.Callback}"],
        ["sweep.objective=mine", "callbacks=default,none"],
    ],
)
def test_objectives_that_may_be_measured_are_not_refused(words):
    session = Session("train", [conf_folder()], overrides=["seed=1,2", *words])
    cfg = look_ahead(session)
    check(session, cfg, _settings(cfg)[1], varied(session, cfg))


# ---- the page ------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """The table of a sweep of six jobs whose journal is written by hand: two failed, one never started."""
    journal, jobs = Journal(tmp_path / "sweeps" / "one"), []
    for seed, lr in [(3, "0.0001"), (3, "0.01"), (1, "0.0001"), (1, "0.01"), (2, "0.0001"), (2, "0.01")]:
        values = {"seed": str(seed), "optimizer.lr": lr}
        jobs.append(Job(number=0, overrides=[], varied=values, config=f"{seed}{lr}", trains=f"{seed}{lr}"))
    jobs = journal.add(jobs)
    journal.tell({"command": "python train.py -m seed=3,1,2", "created": "2026-01-02T03:04:05"})
    for job in jobs[:5]:
        run, seed = tmp_path / "a&b" / str(job.number), int(job.varied["seed"])
        run.mkdir(parents=True)
        (run / "report.html").write_text("a report")
        made = {"config": job.config, "overrides": job.overrides, "seconds": 61.0}
        if seed == 3:
            journal.write(Entry(status="failed", reason="3 is <unlucky>", **made))
        else:
            value = seed + 0.5 + (job.number % 2) / 10
            metrics = {"loss": value, "learning_rate": 1.0, "images_seen": 1000.0}
            journal.write(Entry(status="finished", run=str(run), metrics=metrics, objective=value, **made))
    context = Context(
        folder=journal.folder, claims=tmp_path / ".claims", auto=False, varied=["seed", "optimizer.lr"],
        objective=None, seeks=False, here=True, logs=False,
    )  # fmt: skip
    return collect(context, "minimize"), context


def test_the_page_sorts_links_and_needs_nothing_else(written):
    found, folder = written[0], written[1].folder
    text = write_up(found, folder)
    assert "<th>seed</th><th>optimizer.lr</th>" in text and '<th class="right">loss</th>' in text
    cells = rows(text)
    assert [row[0] for row in cells] == ["4", "3", "5", "1", "2", "6"], "best first, then by number"
    assert [row[3].removeprefix("best&ensp;") for row in cells[:3]] == ["1.500", "1.600", "2.600"]
    assert cells[0][3].startswith("best") and text.count('<span class="best">') == 1
    assert cells[0][4:] == ["1,000", "0:01:01", "finished"] and cells[5][-1] == "not started"
    links = re.findall(r'<a href="([^"]+)"', text)
    assert len(links) == 3 and all((folder / html.unescape(link)).is_file() for link in links)
    assert "a&b" not in text and "3 is &lt;unlucky&gt;" in text
    assert not re.search(r'https?://|src="(?!data:)|@import|<link', text), "no network"
    assert text.count('<path class="job') == 6 and text.count('class="job best"') == 1
    assert text.count('class="job open"') == 3, "these end before the last axis"
    assert "python train.py -m seed=3,1,2" in text
    values = re.findall(r'<tr data-job="4">.*?data-v="4".*?data-v="1".*?data-v="0.01".*?data-v="1.5"', text)
    assert len(values) == 1, "what the script sorts by"


def test_a_column_has_one_meaning(written):
    """Jobs with a distance are compared by it; one that was interrupted before it was measured has a loss only."""
    _, context = written
    journal = context.journal
    for job in journal.plan()[2:5]:
        entry = journal.read(job.config)
        distances = {"fd@500/cnn/ema": 40.0 - job.number}
        journal.write(replace(entry, metrics={**entry.metrics, **distances}, objective=40.0 - job.number))
    for job in journal.plan()[:2]:
        entry = journal.read(job.config)
        journal.write(replace(entry, status="interrupted", metrics={"loss": 0.001}, objective=0.001))
    found = collect(context, "minimize")
    assert found.objective == "fd@500/cnn/ema" and found.columns[0] == "loss"
    assert [row.objective for row in found.rows] == [35.0, 36.0, 37.0, None, None, None]
    assert [cells(found, row)[1] for row in found.rows[3:5]] == ["0.001000"] * 2
    # two losses against one distance: still the distance
    for job in journal.plan()[3:5]:
        journal.write(replace(journal.read(job.config), metrics={"loss": 1.0}, objective=1.0))
    assert collect(context, "minimize").objective == "fd@500/cnn/ema"


def test_the_columns_that_callbacks_write_are_known():
    """Every name given to `log_metrics` in the callbacks, but those made of settings, is in the table of the check."""
    texts = {path.stem: path.read_text() for path in (ROOT / "diffusion_lab" / "callbacks").glob("*.py")}
    for path in (ROOT / "conf" / "callbacks").glob("*.yaml"):
        for name in re.findall(r"_target_: \S*\.(\w+)", path.read_text()):
            assert name in COLUMNS, f"{path.name}: say in app/sweep/check.py what {name} logs"
            (text,) = [text for text in texts.values() if f"class {name}(" in text]
            found = {*re.findall(r'metrics(?:\["|: .*= |\s*= )\{?"?(\w+)"', text)}
            found |= {
                word
                for line in re.findall(r"metrics = \{(.*)\}", text)
                for word in re.findall(r'"(\w+)":', line)
            }
            found |= {*re.findall(r'log_metrics\([^{\n]*\{"(\w+)"', text)}
            assert found == {*COLUMNS[name]} - {"fd"}, name


def test_the_other_end_may_be_the_good_one(written):
    found, context = written
    assert [row.number for row in found.rows[:3]] == [4, 3, 5]
    assert [row.number for row in collect(context, "maximize").rows[:3]] == [5, 3, 4]


def test_axes_of_numbers_of_words_and_of_one_value():
    axis = Axis("lr", ["1e-4", "1e-2", "0.001"])
    assert axis.log and [axis.height(v) for v in ("1e-4", "1e-3", "1e-2")] == pytest.approx([0, 0.5, 1])
    axis = Axis("steps", ["5", "10", "20", None])
    assert not axis.log and axis.height("10") == pytest.approx(1 / 3)
    axis = Axis("schedule", ["cosine", "sigmoid", "1"])
    assert [axis.height(word) for word in ("cosine", "sigmoid", "1")] == [1.0, 0.5, 0.0]
    assert Axis("one", ["3", "3"]).height("3") == 0.5
    assert Axis("many", [str(k) for k in range(30)]).labels()[-1] == (1.0, "29")


# ---- the journal ---------------------------------------------------------------------------------------------


def test_a_broken_entry_is_one_that_was_never_written(tmp_path):
    journal = Journal(tmp_path)
    entry = Entry(config="a", overrides=["seed=1"], status="finished", metrics={"loss": 1.0}, objective=1.0)
    journal.write(entry)
    assert journal.read("a") == entry and entry.done
    assert journal.read("b") is None
    (tmp_path / "jobs" / "a.json").write_text('{"config"')
    assert journal.read("a") is None
    (tmp_path / "jobs" / "a.json").write_text("{}")
    assert journal.read("a") is None


def test_jobs_keep_their_numbers_from_call_to_call(tmp_path):
    def job(seed, *more):
        return Job(
            number=0, overrides=[f"seed={seed}", *more], varied={"seed": str(seed)}, config="c", trains="t"
        )

    journal = Journal(tmp_path)
    assert [one.number for one in journal.add([job(4), job(5), job(4)])] == [1, 2, 1]
    assert [one.number for one in journal.add([job(6), job(5, "resume=auto")])] == [3, 2]
    assert [one.varied["seed"] for one in journal.plan()] == ["4", "5", "6"]


def test_the_same_command_finds_its_sweep(tmp_path):
    words = ["seed=1,2", "optimizer.lr=1e-3"]
    key = sweep_key("train", words)
    for more in (
        "resume=auto",
        "launcher=joblib",
        "launcher.n_jobs=3",
        "sweep.trials=9",
        "hydra/launcher=joblib",
    ):
        assert sweep_key("train", [more, *words]) == key, more
    for other in (["seed=1,2,3", "optimizer.lr=1e-3"], [*words, "sweep=optuna"], [*words, "sweep.seed=1"]):
        assert sweep_key("train", other) != key, other
    assert find_sweep(tmp_path, key) is None
    first, second = new_sweep(tmp_path, key), new_sweep(tmp_path, key)
    assert first != second
    for folder in (first, second):
        Journal(folder).tell({"command": "x"})
    assert find_sweep(tmp_path, key) == max(first, second)


def test_what_tells_jobs_apart():
    config = {
        "optimizer": {"lr": 1},
        "sampler": {"a": 1},
        "max_images": 10,
        "name": "x",
        "trainer": {"devices": 1},
    }
    other = {**config, "sampler": {"a": 2}, "trainer": {"devices": 2}, "logger": {"csv": 1}}
    assert trains(config, ["seed"]) == trains(other, ["seed"])
    assert trains(config, ["sampler"]) != trains(other, ["sampler"])
    assert trains(config, ["trainer.devices"]) != trains(other, ["trainer.devices"])
    longer = {**config, "max_images": 20}
    assert trains(config, []) == trains(longer, []) and config_hash(config, []) != config_hash(longer, [])
    # what a weight depends on needs no mention
    assert trains(config, ["optimizer.lr"]) == trains(config, [])


def test_a_claim_is_held_once_and_ends_with_its_process(tmp_path):
    code = (
        "from pathlib import Path; from diffusion_lab.claims import claim\n"
        f"with claim(Path({str(tmp_path / 'x')!r})) as held: print(held)"
    )

    def elsewhere():
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env
        )
        return done.stdout.strip()

    with claim(tmp_path / "x") as held:
        assert held and elsewhere() == "False"
    assert elsewhere() == "True"


def test_the_last_value_given_wins():
    """Hydra's search takes a fixed value before an interval, whichever comes first."""
    words = [
        "seed=1",
        "+a=2",
        "~callbacks.progress",
        "seed=interval(1,2)",
        "callbacks.progress.plain_s=1",
        "a=3",
    ]
    assert last_wins(words) == [
        "~callbacks.progress",
        "seed=interval(1,2)",
        "callbacks.progress.plain_s=1",
        "a=3",
    ]


def test_values_are_shown_short():
    assert short("0.0012520653814999472") == "0.001252" and short("1.5e-05") == "1.5e-05"
    assert (
        short("0.25") == "0.25"
        and short("123456789") == "123456789"
        and short("digits/quickstart") == "digits/quickstart"
    )


def test_time_left_counts_the_jobs_beside_each_other():
    pace = Pace(parallel=2)
    assert pace.left(5) == ""
    pace.seconds += [50.0, 70.0]
    assert pace.left(5) == "  0:03:00 left for all" and pace.left(0) == ""


# ---- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["launcher=joblib", "seed=1"], "launcher=joblib: this is for a sweep; add --multirun"),
        (["sweep.objective=loss"], "sweep.objective=loss: this is for a sweep; add --multirun"),
        (["-m", "launcher=joblib,basic"], "a sweep has one launcher"),
        (["-m", "launcher=jolib"], "no option 'jolib' in group 'launcher'; did you mean 'joblib'?"),
        (["-m", "launcher=joblib", "launcher.n_jobs=0"], "launcher.n_jobs: at least 1 is needed, got 0"),
        (["-m", "launcher=joblib", "launcher.n_job=2"], "no key 'n_job' in 'launcher'; did you mean 'n_jobs'?"),
        (["-m", "launcher=joblib", "launcher.n_jobs=two"], "launcher.n_jobs: Joblib expects int, got 'two'"),
        (["-m", "sweep.direction=up"], "sweep.direction"),
        (["-m", "sweep=optuna", "sweep.trials=0"], "trials >= 1"),
        (["-m", "seed=1,2", "resume=."], "resume=.: the jobs of a sweep are several runs; resume=auto"),
        (["-m", "paths.runs=a,b"], "paths.runs: must be the same for all jobs"),
        (["-m", "optimizer.lr=interval(1,2)"], "sweep=optuna"),
        (["-m", "sweep=optuna"], "this sweep draws values, but nothing varies; say what: 'optimizer.lr=tag(log"),
        (["-m", "sweep=random", "seed=3"], "this sweep draws values, but nothing varies"),
        (["-m", "sweep=optuna", "seed=1,2", "callbacks=none"], "neither training_log nor frechet"),
        (["-m", "seed=1,2", "sweep.objective=los"], "sweep.objective=los: no job measures that; did you mean 'loss'?"),
        (["-m", "seed=1,2", "sweep.objective=zz"], "there are: gradient_norm, images_per_s, images_seen"),
        (["-m", "seed=1,2", "sweep.objective=fd"], "no job measures it; add callbacks=[default,frechet]"),
        (["-m", "seed=1,2", "launcher=submitit"], "launcher=submitit: there is no SLURM on this machine (no sbatch"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(app, capsys, arguments, expected):
    assert cli.main("train", arguments) == 2
    out, err = capsys.readouterr()
    assert expected in err and err.count("\n") == 1 and err.startswith("error: ") and out == ""
    assert not app.seeds and not Path("runs").exists()


@pytest.mark.parametrize(
    "words", [["launcher=joblib"], ["launcher=submitit_local"], ["sweep=optuna"], ["sweep=random"]]
)
def test_a_missing_plugin_is_one_line_that_says_what_to_install(app, capsys, monkeypatch, words):
    monkeypatch.setattr(sweep_settings, "installed", lambda package: False)
    assert cli.main("train", ["-m", "seed=1,2", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install 'diffusion_lab[sweep]'" in err and words[0] in err
    assert not app.seeds


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"},
    ],
)
def test_processes_started_together_may_not_plan_a_sweep_each(app, capsys, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main("train", ["-m", "seed=1,2"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--multirun under torchrun or srun" in err
    assert not app.seeds


def test_threads_are_shared_by_jobs(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep_settings, "_cores", lambda: 8)
    assert sweep_settings.Joblib(n_jobs=3).environment()["OMP_NUM_THREADS"] == "2"
    assert sweep_settings.Joblib(n_jobs=3, threads=5).environment()["MKL_NUM_THREADS"] == "5"
    assert sweep_settings.Submitit(cpus=6).environment()["OMP_NUM_THREADS"] == "6"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert sweep_settings.Joblib(n_jobs=3).environment()["OMP_NUM_THREADS"] == "1"
    assert sweep_settings.Basic().environment() == {}


def test_the_slurm_launcher_reads_our_knobs():
    from hydra import compose, initialize_config_dir

    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        words = [
            "launcher=submitit",
            "launcher.partition=gpu",
            "launcher.gpus=2",
            "launcher.time_min=90",
            "launcher.n_jobs=3",
        ]
        found = compose("train", overrides=words, return_hydra_config=True).hydra.launcher
    told = {
        key: found[key]
        for key in ("partition", "gpus_per_node", "timeout_min", "array_parallelism", "tasks_per_node")
    }
    assert told == {
        "partition": "gpu",
        "gpus_per_node": 2,
        "timeout_min": 90,
        "array_parallelism": 3,
        "tasks_per_node": 1,
    }


# ---- W&B -----------------------------------------------------------------------------------------------------


def test_the_wandb_sweep_file_is_a_valid_command():
    import yaml
    from hydra import compose, initialize_config_dir

    from diffusion_lab.app.config.schema import SCHEMAS
    from diffusion_lab.app.config.validate import validate

    told = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    assert told["command"][:3] == ["${env}", "${interpreter}", "${program}"]
    assert told["command"][-1] == "${args_no_hyphens}" and (ROOT / told["program"]).is_file()
    fixed = [word for word in told["command"][3:-1]]
    first = [
        f"{key}={item['value'] if 'value' in item else item['values'][0] if 'values' in item else item['min']}"
        for key, item in told["parameters"].items()
    ]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", overrides=[*fixed, *first])
    assert "WandB" in cfg.logger.wandb._target_
    cfg.name = "x"
    validate(cfg, SCHEMAS["train"])


def test_values_behind_a_plus_sign_and_whole_experiments_tell_jobs_apart():
    one = {"trainer": {"max_steps": 1}, "choices": {"experiment": "a", "sampler@other": "ddim"}}
    two = {"trainer": {"max_steps": 2}, "choices": {"experiment": "a", "sampler@other": "ddim"}}
    for key in ("trainer.max_steps", "+trainer.max_steps", "++trainer.max_steps"):
        assert config_hash(one, [key]) != config_hash(two, [key])
        assert config_hash(one, [key]) == config_hash(one, ["trainer.max_steps"])
    for key in ("experiment", "sampler@other", "+sampler@other"):
        other = {**one, "choices": {**one["choices"], key.lstrip("+"): "another"}}
        assert config_hash(one, [key]) != config_hash(other, [key])


def test_a_call_that_takes_up_a_sweep_meets_the_claims_of_the_one_that_began_it(tmp_path):
    plan = Job(number=1, overrides=["seed=1"], varied={"seed": "1"}, config="c", trains="t")
    options = dict(
        folder=tmp_path / "sweep", varied=["seed"], objective=None, seeks=False, here=True, logs=False
    )
    began = Context(claims=None, auto=False, **options)
    took_up = Context(claims=tmp_path / ".claims", auto=True, **options)
    assert set(claims_of(began, plan)) < set(claims_of(took_up, plan))


def test_what_refuses_every_job_is_said_once_and_leaves_no_sweep(app, capsys):
    words = ["-m", "experiment=digits/quickstart", "seed=0,1"]
    assert cli.main("train", [*words, "max_images=1280"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: lr_schedule.warmup_images=") and err.count("\n") == 1 and not out
    assert not list(Path("runs/sweeps").glob("[!.]*")) and app.seeds == []
    # one that is refused where others are not is a failed job of a sweep
    assert cli.main("train", ["-m", "experiment=digits/quickstart", "seed=0", "max_images=1280,89600"]) == 1
    out, err = capsys.readouterr()
    assert app.seeds == [0] and "job 1 failed: lr_schedule.warmup_images=" in out
    assert err.endswith("1 of 2 jobs failed\n")


def test_the_best_run_is_named_at_the_end(app, capsys):
    assert cli.main("train", ["-m", "seed=3,1,2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("best   runs/")
    assert (Path(last.split()[1]) / "metrics.csv").read_text().endswith("20,1.5\n"), "that of seed 1"
