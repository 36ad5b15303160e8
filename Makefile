# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CONF ?= conf/emoji.yaml
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run verify test test-faults lint format parity bench bench-plan train-emoji clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

.venv/setup: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.txt --editable .
	@touch $@

.venv/setup-dev: .venv/setup
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.txt --editable '.[dev]'
	@touch $@

setup: .venv/setup ## Install what a run needs into .venv
setup-dev: .venv/setup-dev ## Install what tests and training need as well

run: .venv/setup ## Make a dataset with the embedded model: make run [CONF=...] [ARGS='key=value ...']
	$(BIN)/python -m jobs.generate $(CONF) $(ARGS)

test: .venv/setup-dev ## Run the tests (fault injection in reduced number)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not faults' $(ARGS)

test-faults: .venv/setup-dev ## Run the fault injection in full (long)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -m faults $(ARGS)

lint: .venv/setup-dev ## Check style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: .venv/setup-dev ## Format the sources
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

parity: .venv/setup-dev ## Compare with the reference's golden tensors: make parity [GOLDEN=...]
	$(BIN)/python -m jobs.parity $(or $(GOLDEN),tests/golden)

bench: .venv/setup ## Time the batched engine against one image at a time
	OMP_WAIT_POLICY=passive $(BIN)/python -m jobs.bench $(ARGS)

bench-plan: .venv/setup ## Memory of planning a run over 10 million prompts
	$(BIN)/python -m jobs.bench plan $(ARGS)

train-emoji: .venv/setup-dev ## Train the embedded model from nothing (hours)
	OMP_WAIT_POLICY=passive $(BIN)/python -m jobs.train_emoji all $(ARGS)

clean: ## Remove what runs and tools left behind
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache
