"""The plan of a sweep: every job of a batch is composed before the first one starts.

Its config's hash tells what is done and what stands in the batch twice; what refuses every job ends the sweep at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from diffusion_lab.app.config.composed import SWEEPING, check_config, complete_config
from diffusion_lab.app.display import Ticker
from diffusion_lab.app.runs.run import digest
from diffusion_lab.app.session import Session
from diffusion_lab.app.sweep.journal import Job, config_hash, trains

# to compose so many takes a few seconds
MANY = 20


class Planner:
    """Composes batches of jobs, and puts them into the plan.

    Args:
        inner: The launcher that was chosen, set up by Hydra.
        session: The command line; its context is told the jobs.

    Attributes:
        configs: Of the last batch, by hash, in plain containers; one that is not known is not there.
        composed: Of the last batch, by hash, as Hydra composed them.
    """

    def __init__(self, inner: Any, session: Session) -> None:
        self.inner, self.session = inner, session
        self.configs: dict[str, dict[str, Any]] = {}
        self.composed: dict[str, DictConfig] = {}

    def jobs(self, batch: Sequence[Sequence[str]]) -> list[Job]:
        """Compose every job for its hash, and put all into the plan.

        Raises:
            Exception: What refuses the first job, if every job is refused: then nothing is planned.
        """
        context, jobs = self.session.sweep, list[Job]()
        assert context is not None
        self.configs.clear()
        self.composed.clear()
        ticker = Ticker("planning", len(batch), unit="jobs") if len(batch) > MANY else None
        refusals: list[Exception] = []
        for done, given in enumerate(batch):
            if ticker is not None:
                ticker.update(done)
            overrides = [str(word) for word in given]
            words = dict(word.partition("=")[::2] for word in overrides)
            # what cannot be composed ends the sweep before its first job
            cfg = self.inner.hydra_context.config_loader.load_sweep_config(self.inner.config, overrides)
            # a check takes a while: they end with the first job that passes
            config, refusal = self._read(cfg, check=len(refusals) == len(jobs) and not context.seeks)
            if refusal is not None:
                refusals.append(refusal)
            if config is not None:
                own, same = config_hash(config, context.varied), trains(config, context.varied)
                self.configs[own] = config
            else:  # it will fail by itself, with a line that says why
                own = same = digest(overrides)
            self.composed.setdefault(own, cfg)  # the first of two that are one: it is the one that runs
            jobs.append(
                Job(
                    number=0,
                    overrides=overrides,
                    varied={key: words[key] for key in context.varied if key in words},
                    config=own,
                    trains=same,
                )
            )
        if ticker is not None:
            ticker.update(len(batch))
            ticker.close()
        if jobs and len(refusals) == len(jobs):
            raise refusals[0]
        jobs = context.journal.add(jobs)
        context.jobs.update({tuple(job.overrides): job for job in jobs})
        return jobs

    def _read(self, cfg: DictConfig, *, check: bool) -> tuple[dict[str, Any] | None, Exception | None]:
        """Return a job's config, None where it is not known, and what refuses the job, None if nothing."""
        config: dict[str, Any] | None = None
        try:
            with self._completed(cfg) as own:
                with suppress(OmegaConfBaseException):
                    config = _plain(own)
                if check:
                    check_config(self.session, own)
        except Exception as error:  # whatever the job itself would fail of
            return config, error
        return config, None

    @contextmanager
    def _completed(self, cfg: DictConfig) -> Iterator[DictConfig]:
        """Give a copy of a job's config, completed as the job will complete it, while Hydra takes it for the job's."""
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(cfg)
        try:
            own = cfg.copy()
            with open_dict(own):
                own.pop("hydra", None)
            complete_config(self.session, own)
            yield own
        finally:
            HydraConfig.instance().cfg = before


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a config in plain containers, without what is said about the sweep."""
    own = cfg.copy()
    with open_dict(own):
        for key in SWEEPING:
            own.pop(key, None)
    found = OmegaConf.to_container(own, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}
