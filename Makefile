# make demo | make test | make test-slow | make lint | make bench | make clean
# Everything is installed into .venv; PYTHON=... chooses the interpreter, otherwise the newest of 3.13, 3.12, 3.11.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow packages lint bench clean

VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# More than cores: many tests wait for processes.
TEST_WORKERS ?= 4
TEST_EXTRAS ?= test,bench
# Slurm and the like, where one may install them; SETUP=true leaves the machine as it is.
SETUP ?= if [[ $$(id -u) == 0 ]] && command -v apt-get >/dev/null; then tests/setup-debian.sh; fi
BENCH ?= detect transfer reduce scale loop

help:  ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed-notebook  ## Watch results steer a simulated microscope until its lens is right (no root, no services; some seconds)
	@exec $(BIN)/emflow demo

test: packages $(VENV)/.installed-$(TEST_EXTRAS)  ## Run all tests that this machine can run in some minutes; says what it skips and why
	@$(BIN)/python -m pytest -m "not slow" -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

test-slow: packages $(VENV)/.installed-$(TEST_EXTRAS)  ## Run the tests that take minutes
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# Before the environment: without a compiler the kernels would not be built.
packages:
	@$(SETUP)

lint: $(VENV)/.installed-$(TEST_EXTRAS)  ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.installed-$(TEST_EXTRAS)  ## Measure, as JSON on standard output; BENCH="detect reduce" chooses
	@for part in $(BENCH); do $(BIN)/python -m benchmarks "$$part"; done

clean:  ## Remove the environment and everything else that was made
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first interpreter that is new enough and can make environments; what is missing is said in plain words.
$(BIN)/python:
	@python=""; found=""; \
	for candidate in $(PYTHON) python3.13 python3.12 python3.11 python3; do \
	    "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    found=$$candidate; \
	    if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [[ -z $$found ]]; then \
	    echo "emflow needs Python 3.11 or newer, and there is none: apt-get install python3, or make PYTHON=/path/to/python" >&2; exit 1; fi; \
	if [[ -z $$python ]]; then echo "$$found can't make environments (no ensurepip): apt-get install python3-venv" >&2; exit 1; fi; \
	echo "making $(VENV) with $$("$$python" --version)"; \
	rm -rf $(VENV); "$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# One stamp per set of extras; pip speaks only when something is wrong.
$(VENV)/.installed-%: setup.cfg pyproject.toml setup.py $(wildcard mpi_kernels/native/*) | $(BIN)/python
	@echo "installing emflow[$*] into $(VENV) (the first time takes a minute or two)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --editable '.[$*]'
	@touch '$@'
