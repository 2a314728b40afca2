"""The study of a search goes on: what is known stays known, what was cut off is proposed again."""

import json

import pytest

pytest.importorskip("optuna")

import optuna

from diffusion_lab.app.sweep.settings import Random
from diffusion_lab.app.sweep.study import FILE, FileStorage, prepare

pytestmark = pytest.mark.filterwarnings("ignore")


def study(folder, seed=0):
    sampler = optuna.samplers.RandomSampler(seed=seed)
    storage = FileStorage(str(folder / FILE), "minimize")
    return optuna.create_study(
        study_name="sweep", storage=storage, sampler=sampler, directions=["minimize"], load_if_exists=True
    )


def ask(one):
    trial = one.ask()
    trial._suggest("x", optuna.distributions.UniformDistribution(0.0, 1.0))
    trial._suggest("word", optuna.distributions.CategoricalDistribution(["a", "b"]))
    return trial


def test_a_study_goes_on(tmp_path):
    first = study(tmp_path)
    done, failed, cut_off = ask(first), ask(first), ask(first)
    first.tell(done, 3.0)
    first.tell(failed, state=optuna.trial.TrialState.FAIL)

    settings = Random(trials=5, seed=10)
    words = prepare(tmp_path, settings)
    assert words[:2] == ["hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=13"]
    second = study(tmp_path, seed=13)
    assert second.best_value == 3.0 and second.best_params == done.params
    again = [ask(second) for _ in range(3)]
    assert [trial.params for trial in again[:2]] == [failed.params, cut_off.params]
    assert again[2].params["x"] not in {done.params["x"], failed.params["x"], cut_off.params["x"]}
    for value, trial in enumerate(again):
        second.tell(trial, float(value))
    third = study(tmp_path)
    assert sorted(trial.value for trial in third.get_trials()) == [0.0, 1.0, 2.0, 3.0]
    assert prepare(tmp_path, settings)[0] == "hydra.sweeper.n_trials=1"
    assert prepare(tmp_path, Random(trials=2))[0] == "hydra.sweeper.n_trials=0"


def test_a_proposal_is_written_before_its_job_starts(tmp_path):
    trial = ask(study(tmp_path))
    (stored,) = json.loads((tmp_path / FILE).read_text())["trials"]
    assert stored["state"] == "RUNNING" and stored["params"] == trial.params
    # not lost when the search is cut off twice before it comes to be proposed again
    study(tmp_path).ask()
    again = ask(study(tmp_path))
    assert again.params == trial.params


def test_a_damaged_file_begins_a_new_study(tmp_path):
    (tmp_path / FILE).write_text('{"trials": [')
    assert study(tmp_path).get_trials() == []
