# `make demo`, `make test`, and `make test-board` (the tests on an emulated Cortex-A76 board). Each sets up its own virtual environment first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/digits

.PHONY: demo test test-board lint clean

demo: $(VENV)/.ready
	rm -rf $(OUT)
	$(BIN)/autocomp search digits --out $(OUT)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-board: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m board

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# model.so needs a linker: where there is neither a C compiler nor binutils, pip's ziglang brings one
EXTRA := $(if $(shell command -v cc gcc clang ld ld.lld 2>/dev/null),,[linker])

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) on the PATH: set PYTHON to a Python 3.11 or newer"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.$(EXTRA)'
	touch $@

$(VENV)/.ready-dev: pyproject.toml $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
