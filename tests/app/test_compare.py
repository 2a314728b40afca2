"""A sweep of sample.py or evaluate.py ends in one page."""

import json
import re
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from omegaconf import OmegaConf

from diffusion_lab.app.report import sortable
from diffusion_lab.app.report.comparison import write_up
from diffusion_lab.app.report.comparison_text import variant
from diffusion_lab.app.scoring.sheet import First, Row, Sheet, differing, grouped
from diffusion_lab.metrics.protocol import Protocol, Record, Source

pytestmark = pytest.mark.usefixtures("no_cache")

N = 20
LABEL = f"FD@{N} (digits-cnn)"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tiny_runs.train(tmp_path_factory.mktemp("runs"), max_images=160).resolve()


@pytest.fixture
def sweep(capsys):
    """Run a sweep; return the page's file and text, None if none was written, and what was printed."""

    def run(app, *words, code=0):
        assert tiny_runs.main(app, f"num_samples={N}", *words, "--multirun") == code
        out, err = capsys.readouterr()
        found = re.fullmatch(r"comparison  (\S+\.html)", out.splitlines()[-1]) if out else None
        path = Path(found[1]) if found else None
        return types.SimpleNamespace(path=path, text=path and path.read_text(), out=out, err=err)

    return run


def rows(text):
    """The cells of the table of scores, tags left out."""
    lines = re.findall(r"<tr[^>]*>(<td.*?)</tr>", text)
    return [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<td.*?</td>", line)] for line in lines]


def as_printed(cell):
    """A number and half a unit of its last digit: what rounding may have moved it by."""
    digits = cell.replace(",", "")
    return float(digits), 0.5 / 10 ** len(digits.partition(".")[2])


def test_the_variants_of_a_run_side_by_side(trained, sweep):
    page = sweep("sample", f"run={trained}", "sampler=ddim,heun", "grid.steps=2,3")
    assert page.path.parent == trained / "comparisons" and page.path.name.endswith("-sample.html")
    assert "<th>sampler</th><th>grid.steps</th>" in page.text and f">{LABEL}</th>" in page.text
    *table, floor = rows(page.text)
    told = {(cells[0].lstrip("●"), cells[1]): cells[2:] for cells in table}
    assert {key: cells[1] for key, cells in told.items()} == {
        ("ddim", "2"): "2", ("ddim", "3"): "3", ("heun", "2"): "3", ("heun", "3"): "5",
    }  # fmt: skip
    distances = [float(cells[2].removeprefix("best&ensp;")) for cells in table]
    assert (
        distances == sorted(distances)
        and table[0][2].startswith("best")
        and page.text.count('class="best"') == 2
    )
    assert floor[0].startswith("real training data") and 0 < float(floor[1]) < distances[0]
    (seconds, s_half), (per_1000, p_half) = (as_printed(cell) for cell in told["ddim", "2"][2:4])
    assert abs(per_1000 - 1000 / N * seconds) <= 1.001 * (p_half + 1000 / N * s_half)
    assert page.text.count("data:image/png;base64,") == 5, "four variants and real images"
    assert "the same seed and the same class" in page.text and "num_samples=20" in page.text
    shown = page.out.splitlines()
    assert (
        LABEL in shown[-7]
        and shown[-2].startswith("real data")
        and table[0][2].removeprefix("best&ensp;") in shown[-6]
    )


@pytest.mark.slow
def test_the_page_needs_nothing_else(trained, sweep):
    text = sweep("sample", f"run={trained}", "sampler=ddim,heun").text.replace(sortable.SCRIPT, "")
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text) and not re.search(
        r"url\((?!#)|@import|<script|<link", text
    )
    assert set(re.findall(r'(\S+?)="?https?:', text)) <= {"xmlns", "xmlns:xlink"}
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)
    assert "var(--series-2)" in text and "#a1000" not in text


def test_sample_and_evaluate_give_the_same_distance(trained, sweep):
    words = (f"run={trained}", "sampler=ddim,heun")
    sampled, scored = sweep("sample", *words), sweep("evaluate", *words)
    evaluations = json.loads((trained / "metrics.json").read_text())["evaluations"]
    values = sorted(item["records"][0]["value"] for item in evaluations[-2:])
    for page in (sampled, scored):
        assert [float(cells[1].removeprefix("best&ensp;")) for cells in rows(page.text)[:2]] == pytest.approx(
            values, rel=1e-3
        )
    assert scored.path.name.endswith("-evaluate.html") and "scoring the samples in" in scored.out


@pytest.mark.slow
def test_a_failed_job_is_listed_and_alone_makes_no_page(trained, sweep):
    page = sweep("sample", f"run={trained}", "labels=7,11", code=1)
    assert "there are the classes 0 to 9, and no 11" in page.text and "labels 11" in page.text
    assert "1 of 2 jobs" in page.text and "1 of 2 jobs failed" in page.err and 'class="best"' not in page.text
    before = set((trained / "comparisons").iterdir())
    assert sweep("sample", f"run={trained}", "labels=11,12", code=1).path is None
    assert set((trained / "comparisons").iterdir()) == before


@pytest.mark.slow
def test_what_cannot_be_scored_is_a_dash_with_a_reason(trained, sweep, tmp_path):
    page = sweep("sample", f"run={trained}", "sampler=ddim", f"num_samples=1,{N}")
    assert "not scored: these samples cannot be scored: a distance needs at least two images" in page.text
    assert "–<sup>1</sup>" in page.text and "– (1)" in page.out and "(1) not scored" in page.out
    other = tmp_path / "run"
    shutil.copytree(trained, other)
    config = OmegaConf.load(trained / "config.yaml")
    config.metrics.weights_path = str(tmp_path / "nowhere.safetensors")
    OmegaConf.save(config, other / "config.yaml")
    page = sweep("sample", f"run={other}", "sampler=ddim,heun")
    assert "nowhere.safetensors" in page.text and "<sup>1</sup>" in page.text and page.err == ""


@pytest.mark.slow
def test_several_runs_share_a_page_among_the_runs(trained, sweep, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    page = sweep("sample", f"run={trained},{other}", f"paths.runs={tmp_path}/runs")
    assert page.path.parent == tmp_path / "runs" / "comparisons"
    assert {cells[0].lstrip("●").rpartition("/")[2] for cells in rows(page.text)[:2]} == {
        trained.name,
        "other",
    }


@pytest.mark.slow
def test_points_of_the_plane(sweep, tmp_path):
    words = [
        "experiment=toy/quickstart", "model.width=8", "model.depth=1", "batch_size=32", "max_images=640",
        "dataset.num_examples=500", "trainer=cpu", "callbacks=none", "callbacks=[checkpoints]",
        "lr_schedule=constant", f"paths.runs={tmp_path}",
    ]  # fmt: skip
    assert tiny_runs.main("train", *words[:7], *words[8:]) == 0
    run = tmp_path / "toy" / "quickstart" / "latest"
    page = sweep("sample", f"run={run}", "sampler=ddim,heun", "grid.steps=2")
    assert f"FD@{N} (coordinates)" in page.text and "on the same axes" in page.text
    assert (
        page.text.count("data:image/png;base64,") == 3 and page.path.parent == run.resolve() / "comparisons"
    )


@pytest.mark.slow
def test_jobs_that_run_elsewhere_make_no_page(trained, sweep, monkeypatch):
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher
    from hydra.core.plugins import Plugins

    plugin = types.ModuleType("hydra_plugins.elsewhere")
    plugin.Elsewhere = type("Elsewhere", (BasicLauncher,), {"__module__": plugin.__name__})
    package = types.ModuleType("hydra_plugins")
    package.elsewhere = plugin
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    known = Plugins.instance().class_name_to_class
    monkeypatch.setitem(known, f"{plugin.__name__}.Elsewhere", plugin.Elsewhere)
    before = len(list(trained.glob("comparisons/*")))
    target = "hydra.launcher._target_=hydra_plugins.elsewhere.Elsewhere"
    page = sweep("sample", f"run={trained}", "sampler=ddim,heun", target)
    assert page.path is None and "holds these samples already" in page.out
    assert len(list(trained.glob("comparisons/*"))) == before


# ---- rows without runs -----------------------------------------------------------------------------------


def distance(value, n=100):
    return Record(
        metric="frechet", value=value, real=0.1, real_n=n, n=n, features="pixels", features_sha256="0",
        protocol=Protocol(name="p", features="pixels", n=100), resize="none", quantisation="q",
        reference="test", reference_sha256="0", reference_n=9, source=Source(),
    )  # fmt: skip


def row(record, **varied):
    first = First(np.zeros((12, 4, 4, 1), np.uint8), np.full(12, -1))
    told = {"nfe": 4, "seconds": 2.0, "made": 50, "seed": 0, "labels": None}
    return Row(varied=varied, told=told, n=100, first=first, distance=record, others=(), why={})


def sheet(*made):
    keys = list(made[0].varied)
    return Sheet("sample", "python", [Path("r")], ["r"], keys, grouped(made), [({"k": "<i>"}, "<b>no")], None)


def test_only_what_differs_is_a_column():
    jobs = [
        ["run='a/x'", "sampler=ddim", "seed=1", "out=here"],
        ["run='a/y'", "sampler=ddim", "seed=2", "out=there"],
    ]
    assert differing(jobs) == [{"run": "x", "seed": "1"}, {"run": "y", "seed": "2"}]
    assert differing([["+a=1"], ["+a=2", "b=3"]]) == [{"a": "1", "b": "–"}, {"a": "2", "b": "3"}]
    assert variant({"sampler": "heun", "grid.steps": "8", "seed": "3"}) == "heun · steps 8 · seed 3"
    assert variant({"a.x": "1", "b.x": "2"}) == "a.x 1 · b.x 2"


def test_distances_at_different_n_are_kept_apart():
    near, far, other, none = row(distance(1.0)), row(distance(2.0)), row(distance(0.5, n=50)), row(None)
    assert grouped([none, far, other, near]) == [[near, far], [other, none]]
    text = write_up(sheet(far, other, near))
    assert "Scores: FD@100 (pixels)" in text and "Scores: FD@50 (pixels)" in text
    assert "Not comparable with FD@50 (pixels): n 100 against 50." in text
    assert near.seconds_per_1000 == 40.0, "of those that were made now"


def test_what_stands_on_the_command_line_cannot_break_out():
    made = [row(distance(k + 1.0), sampler=f"<script>{k}</script>") for k in range(10)]
    text = write_up(replace(sheet(*made), names=["<script>"], command="<script>")).replace(
        sortable.SCRIPT, ""
    )
    assert "<script>" not in text and "<i>" not in text.replace('<i class="dot"', "") and "<b>no" not in text


def test_all_that_was_measured_has_a_column_that_sorts():
    recall = replace(distance(0.25), metric="recall", short="recall", percent=True, better="higher")
    made = [replace(row(distance(1.0), k="a"), others=(recall,)), row(distance(2.0), k="b")]
    text = write_up(sheet(*made))
    assert '<table class="sortable">' in text and "recall@100 (pixels)" in text
    assert (
        '<td class="right" data-v="0.25">25.00 %</td>' in text
        and '<td class="right" data-v="">–</td>' in text
    )


def test_rows_without_anything_to_compare_are_a_page():
    bare = replace(row(None, sampler="a"), told={}, why={"nfe": "not known"})
    text = write_up(sheet(bare, replace(bare, varied={"sampler": "b"})))
    assert "–<sup>1</sup>" in text and "Seeds or classes differ" in text and "<svg" not in text


def test_a_sweep_of_guidance_scales_shows_fidelity_against_diversity():
    made = [
        replace(
            row(distance(d), **{"guidance.scale": scale, "guidance.interval": interval}),
            others=(replace(distance(a), metric="accuracy", short="accuracy", percent=True),),
        )
        for interval in ("[-3,5]", "[-1,3]")
        for scale, d, a in (("1", 2.0, 0.9), ("10", 4.0, 1.0), ("2", 3.0, 0.95))
    ]
    text = write_up(sheet(*made))
    assert "tradeoff-1" in text
    assert "Fidelity against diversity" in text and "guidance.scale grows" in text
    assert "Fidelity" not in write_up(sheet(*(replace(one, others=()) for one in made)))
