# diffusion_lab. Every target sets itself up: the first one makes .venv with the pinned packages, the others reuse it.
#   make demo       train, sample and score the quickstart on real images, offline, in about two minutes
#   make test       the default test suite          make test-all   with the slow tests too
#   make lint       ruff and mypy                   make clean      remove .venv and caches (never runs/)

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.complete
# a name of its own, so that a run started meanwhile is not sampled in its place
DEMO := demo-$(shell date +%Y-%m-%d_%H-%M-%S)
RUN := runs/digits/quickstart/$(DEMO)

# One thread a process: the networks here are so small that two are only a third faster on an idle machine, and three
# times slower on one that does anything else besides, because threads wait for each other after every layer.
export OMP_NUM_THREADS ?= 1

# tests of one file share what they train, so a file is one worker's
PARALLEL := --numprocesses auto --dist loadfile

.PHONY: demo test test-all lint setup clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	@echo "setting up $(VENV) (once; about two minutes) ..."
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps k-diffusion
	@touch $@

demo: $(STAMP)
	@$(PY) train.py experiment=digits/quickstart run_id=$(DEMO)
	@$(PY) sample.py run=$(RUN) num_samples=1437 batch_size=200 seed=0 out=$(RUN)/samples/demo
	@$(PY) evaluate.py run=$(RUN) samples=$(RUN)/samples/demo

test: $(STAMP)
	@$(PY) -m pytest $(PARALLEL)

test-all: $(STAMP)
	@$(PY) -m pytest $(PARALLEL) -m ''

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy diffusion_lab

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
