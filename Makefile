# The two commands of a newcomer: `make demo` and `make test`. Each builds what it needs in .venv.
#   PYTHON       a Python 3.11 to 3.13 with venv             make demo PYTHON=python3.12
#   TORCH_INDEX  PyTorch's wheel index, if not the default   see README.md

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test drills lint bench bench-results counts results hub clean

demo: $(VENV)/.installed
	$(BIN)/ict-fast prepare digits --out data/digits
	$(BIN)/ict-fast train --preset digits
	$(BIN)/ict-fast sample runs/digits --count 100 --out runs/digits/one-step.png
	$(BIN)/ict-fast sample runs/digits --count 100 --steps 2 --out runs/digits/two-steps.png
	$(BIN)/ict-fast evaluate runs/digits
	$(BIN)/ict-fast report runs/digits
	@echo "The picture, one network evaluation per digit: runs/digits/one-step.png"
	@echo "All about the run, in a browser: runs/digits/report.html"

# File by file, by a worker more than there are cores, as some wait for processes of their own, but no more than
# four; plain `python -m pytest` does the same by one.
test: WORKERS = $(shell cores=$$(nproc); echo $$((cores < 4 ? cores + 1 : 4)))
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

drills: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m drill

bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

# The committed results: the CPU's figures on a quiet machine, what the suite compares, and the page of all.
bench-results: $(VENV)/.installed-dev
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --benchmark-json benchmarks/results/cpu-suite.json

counts: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/step_counts.py
	$(BIN)/python benchmarks/compiled_kernels.py --few

results: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/render.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# ict_kernels for Hugging Face's kernel hub, in build/hub (kernels/README.md)
hub: $(VENV)/.installed
	rm -rf build/hub
	$(BIN)/python kernels/hub/package.py --out build/hub

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks

# With the newest pip, which takes a sixth less time than the one that comes with Python 3.11.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "ict-fast needs Python 3.11 to 3.13; name one: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
		{ echo "$(PYTHON) has no venv module (Debian: apt-get install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

# torch first and alone, so that TORCH_INDEX decides which build it is.
$(VENV)/.torch: $(VENV)/bin/python constraints.txt
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch setup.py pyproject.toml
	$(PIP) --editable ".[dev]"
	@touch $(VENV)/.installed $@
