# `make help` lists the targets. Each one that runs Python creates .venv and installs the tested set of packages first;
# once that is done, it starts at once.

SHELL := /bin/bash

METHODS := awm b2-diffu-rl coca dance-grpo dense-grpo diffusion-nft flow-grpo flow-grpo-fast g2rpo mix-grpo temp-flow-grpo turning-point-grpo
METHOD ?= g2rpo
OUTPUT_DIR ?= runs/$(METHOD)-$(shell date +%Y%m%d-%H%M%S)

# The first of these that runs, so that a shim without an interpreter behind it is passed over.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := trl_flow tests examples benchmarks docs/conf.py docs/extensions

# The models here are tiny: on a busy machine more threads than one make them slower, not faster.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

PYTEST_ARGS ?= -n 2

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow benchmarks models docs linkcheck quality format clean

help:  ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  METHOD is one of: $(METHODS). For example: make demo METHOD=dense-grpo"

install: $(INSTALLED)  ## create .venv with the tested set of packages

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python found. Install Python 3.11 or newer, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), but trl-flow needs Python 3.11 or newer. Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and alone, by its exact version, so that nothing else gets to choose its build
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## train METHOD on the embedded shapes world, minutes on a laptop (default: g2rpo)
	@case " $(METHODS) " in *" $(METHOD) "*) ;; *) echo "error: METHOD=$(METHOD) is unknown. Choose one of: $(METHODS)" >&2; exit 2;; esac
	$(BIN)/trl-flow $(METHOD) --config examples/shapes/$(METHOD).yaml --output_dir $(OUTPUT_DIR)

test: $(INSTALLED)  ## run the tests, minutes on two cores
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# A file's tests one after the other: many share what has taken minutes.
test-slow: $(INSTALLED)  ## run the slow tests
	$(BIN)/python -m pytest $(PYTEST_ARGS) --dist loadfile -m slow

benchmarks: $(INSTALLED)  ## measure the embedded model again: JSON, tables and pictures
	for name in overhead rollout growth switches prompt_embeddings; do $(BIN)/python benchmarks/$$name.py || exit 1; done

models: $(INSTALLED)  ## find out again which of diffusers' pipelines train, for docs/models.md
	$(BIN)/python benchmarks/models.py

docs: $(INSTALLED)  ## build the documentation into build/docs; what it warns of is an error
	$(BIN)/python -m sphinx -E -b html -W --keep-going -d build/doctrees docs build/docs
	@echo "Open build/docs/index.html"

linkcheck: $(INSTALLED)  ## ask the servers whether what the documentation links to is there
	$(BIN)/python -m sphinx -b linkcheck -d build/doctrees docs build/linkcheck

quality: $(INSTALLED)  ## check lint and formatting
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/ruff format --check $(wildcard $(SOURCES))

format: $(INSTALLED)  ## fix lint and formatting
	$(BIN)/ruff check --fix $(wildcard $(SOURCES))
	$(BIN)/ruff format $(wildcard $(SOURCES))

clean:  ## remove .venv, builds and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find $(wildcard $(SOURCES)) -name __pycache__ -type d -prune -exec rm -rf {} +
