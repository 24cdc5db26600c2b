# `make help` lists the targets. Every target sets up what it needs in .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Of pytest; -v names every test.
VERBOSITY ?= -q
# The first Python on PATH that is new enough; set PYTHON=… to choose another.
PYTHON ?= $(shell for name in python3 python3.11 python3.12 python3.13 python3.14; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$name; break; fi; done)

.PHONY: help setup demo test test-gpu lint clean clean-demo

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## Install into .venv, with every package at the version in constraints.txt

$(INSTALLED): constraints.txt setup.cfg pyproject.toml scripts/install.sh
	@PYTHON='$(PYTHON)' VENV='$(VENV)' bash scripts/install.sh
	@touch $@

demo: $(INSTALLED) ## Synthetic videos to shards to a trained and evaluated model, in minutes, in demo/
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh demo

test: lint ## Lint, then all tests
	@echo "== tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(VERBOSITY)

test-gpu: $(INSTALLED) ## What needs a CUDA GPU; docs/gpu.md says what it checks
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no CUDA GPU")'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu -v

lint: $(INSTALLED) ## ruff (lint and format), and mypy on the package as installed
	@echo "== ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@echo "== mypy, on the package as installed"
	@rm -rf build
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target build/installed .
	@cd build/installed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/setup.cfg \
		--cache-dir $(CURDIR)/.mypy_cache -p avid_pipeline

clean: clean-demo ## Remove .venv and everything that was built
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

clean-demo: ## Remove what `make demo` made
	rm -rf demo
