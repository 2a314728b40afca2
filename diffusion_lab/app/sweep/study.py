"""The study of a search, in a file beside the journal, so that a search can go on.

Optuna's own storage in a file is a database that this version of it cannot open with SQLAlchemy 2. A study is small:
it is kept in memory, as Optuna does by default, and written to `study.json` at every change.

When a search goes on, the trials that came to a value are known to it; those that were interrupted or failed are
proposed once more with the same values, so that their runs are taken up from their checkpoints.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from diffusion_lab.app.config.choices import _quote
from diffusion_lab.files import write_atomically

NAME = "sweep"
FILE = "study.json"


def prepare(folder: Path, settings: Any) -> list[str]:
    """Return the overrides with which Hydra's sweeper goes on with the study of a sweep.

    Args:
        folder: The sweep's folder.
        settings: Of `settings.py`: `trials` in all, and `seed`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="optuna")
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    path = folder / FILE
    known = _read(path)
    done = sum(item["state"] == "COMPLETE" for item in known)
    # a sampler that starts again from the same seed would propose the same values again
    seed = settings.seed + len(known)
    return [
        f"hydra.sweeper.n_trials={max(0, settings.trials - done)}",
        f"hydra.sweeper.sampler.seed={seed}",
        f"hydra.sweeper.storage={{_target_:{__name__}.FileStorage,path:{_quote(str(path))},"
        f"direction:{settings.direction}}}",
    ]


class FileStorage(InMemoryStorage):
    """Optuna's storage in memory, with one study that is read from a file and written back at every change.

    Args:
        path: The file.
        direction: "minimize" or "maximize".
    """

    def __init__(self, path: str, direction: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._ready = False
        self._study = self.create_new_study(NAME)
        self.set_study_directions(self._study, [StudyDirection[direction.upper()]])
        for trial in _to_go_on(_read(self.path)):
            self.create_new_trial(self._study, trial)
        self._ready = True

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """Set one of a trial's values."""
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        self._write()

    def set_trial_state(self, trial_id: int, state: TrialState) -> bool:
        """Set how a trial ended."""
        changed = super().set_trial_state(trial_id, state)
        self._write()
        return changed

    def _write(self) -> None:
        if not self._ready:
            return
        trials = [_plain(trial) for trial in self.get_all_trials(self._study, deepcopy=False)]
        write_atomically(self.path, json.dumps({"trials": trials}, indent=1) + "\n")


def _plain(trial: FrozenTrial) -> dict[str, Any]:
    # a trial that waits has its values elsewhere
    params = trial.params or trial.system_attrs.get("fixed_params", {})
    return {
        "state": trial.state.name,
        "values": trial.values,
        "params": params,
        "distributions": {name: distribution_to_json(item) for name, item in trial.distributions.items()},
    }


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["trials"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _to_go_on(stored: list[dict[str, Any]]) -> list[FrozenTrial]:
    """Return the trials that came to a value, then the others, waiting to be tried again; each set of values once."""
    complete = [item for item in stored if item["state"] == "COMPLETE"]
    tried = {json.dumps(item["params"], sort_keys=True) for item in complete}
    found = [
        optuna.trial.create_trial(
            state=TrialState.COMPLETE,
            values=item["values"],
            params=item["params"],
            distributions={name: json_to_distribution(text) for name, text in item["distributions"].items()},
        )
        for item in complete
    ]
    for item in stored:
        key = json.dumps(item["params"], sort_keys=True)
        if item["state"] == "COMPLETE" or key in tried or not item["params"]:
            continue
        tried.add(key)
        found.append(
            optuna.trial.create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": item["params"]})
        )
    return found
