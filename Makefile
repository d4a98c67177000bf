# One way in: `make run` makes the environment and runs the main job, `make test` proves it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install run schedule test faults check format lab bench reports clean

help:            ## Show this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt calling_ai/__init__.py
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: '$(PYTHON)' was not found (try make PYTHON=python3 ...)"; exit 1; }
	@echo "Installing into $(VENV) (once, a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[all,dev]"
	@touch $@

install: $(STAMP)  ## Make .venv with the pinned set

run: $(STAMP)    ## Run the main job: people, town, training, evaluation, versions, reports
	@$(BIN)/calling-ai run

schedule: $(STAMP) ## Run everything by itself: a local Prefect server with its pages, and the flows on their cron lines
	@$(BIN)/python flows/schedule.py

test: $(STAMP)   ## Run every test
	@CI_SHARED="$(abspath ../shared)" $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

faults: $(STAMP) ## Run the long fault and simulation harnesses at full size
	@CI_SHARED="$(abspath ../shared)" $(BIN)/python -m pytest -m long -s

check: $(STAMP)  ## Check format, lint, types, and that package and README equal the notebooks
	@$(BIN)/python .ci/check.py

format: $(STAMP) ## Format the code, export the notebooks, write the README
	@$(BIN)/python .ci/check.py --fix

lab: $(STAMP)    ## Open JupyterLab on nbs/
	@$(BIN)/jupyter lab nbs

bench: $(STAMP)  ## Measure, as ratios against named baselines
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:           ## Remove what can be made again, except the environment and var/
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
