PYTHON ?= python3
VENV ?= .venv
# One torch build for everyone: its wheel decides between CPU and CUDA. Set TORCH= to keep an installed one.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: install install-test demo test lint nightly clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

install: $(BIN)/python
	$(if $(TORCH),$(BIN)/pip install --quiet --no-compile $(TORCH))
	$(BIN)/pip install --quiet --no-compile -e .

install-test: $(BIN)/python
	$(if $(TORCH),$(BIN)/pip install --quiet --no-compile $(TORCH))
	$(BIN)/pip install --quiet --no-compile -e ".[dev]"

demo: install
	$(BIN)/abft demo --output demo_run

test: install-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
