# Every target needs only GNU make and Python 3.11 or later: it first fills $(VENV).
# `make test PYTHON=python3.12 VENV=.venv3.12` keeps a second row beside the first.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
CONSTRAINTS := constraints/python$(if $(filter 3.11,$(VERSION)),3.11,3.12).txt
# The two variables, where a `-c` would not, hold for the isolated build as well: the
# first as older pips read it, the second as pip 25.3 and later do.
PIP_INSTALL := PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) \
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet
INSTALLED := $(VENV)/.installed-$(VERSION)
GPU_INSTALLED := $(VENV)/.installed-gpu-$(VERSION)
# What pip adds to run on an accelerator; the constraints pin CUDA 12.
GPU_JAX ?= jax[cuda12]

.PHONY: help demo test lint test-gpu clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED)  ## train a small character-level language model on the CPU
	$(BIN)/python -m experiments.char_lm.demo $(ARGS)

# On the CPU wherever it runs: two workers would each claim most of a GPU's memory. Most
# of a test's time is compilation of what runs once: without optimisation it is a third
# shorter, and with the older of two emitters of code half of that. (The second row's XLA
# has the newer one alone, and refuses the flag.)
XLA_TEST_FLAGS := --xla_backend_optimization_level=0 \
	$(if $(filter 3.11,$(VERSION)),--xla_cpu_use_fusion_emitters=false)
test: $(INSTALLED)  ## run the tests; ARGS="-k scale" passes more to pytest
	JAX_PLATFORMS=cpu XLA_FLAGS="$(XLA_TEST_FLAGS) $$XLA_FLAGS" \
	  $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(INSTALLED)  ## check style, formatting and types
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

test-gpu: $(GPU_INSTALLED)  ## run the tests that need an accelerator
	@$(BIN)/python -c 'import jax; jax.default_backend() != "cpu" or exit("error: jax finds no accelerator here")'
	$(BIN)/python -m pytest -m gpu $(ARGS)

clean:  ## remove the virtual environment, caches and builds (never runs/)
	@if [ -e $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(wildcard jax_unit_scaling experiments tests) -name __pycache__ -prune -exec rm -rf {} +

# One environment for all: mypy has to see every package the code imports, so one for lint
# alone would hold all of this but pytest and its helpers.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Python 3.11 or later is needed, but PYTHON=$(PYTHON) is $(if \
	  $(VERSION),Python $(VERSION),not found); name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Installing into $(VENV) with Python $(VERSION) and $(CONSTRAINTS); this can take some minutes."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")' || { \
	  echo "error: $(VENV) holds another Python than $(VERSION); choose another place" \
	  "(make VENV=.venv$(VERSION) ...) or remove this one (make clean)" >&2; exit 1; }
	@$(PIP_INSTALL) -e '.[tests,lint]'
	@touch $@

$(GPU_INSTALLED): $(INSTALLED)
	@echo "Installing $(GPU_JAX) into $(VENV); it takes some gigabytes."
	@$(PIP_INSTALL) '$(GPU_JAX)'
	@touch $@
