# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CONF ?= conf/emoji.yaml
ARGS ?=
# Where bytecode is not written, each of the many processes of a run compiles all that it imports: three times the work.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run verify test test-faults coverage lint format lock parity bench bench-plan bench-driver \
    calibrate evaluate certify-check train-emoji clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

.venv/setup: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint requirements.txt --editable .
	@touch $@

.venv/setup-dev: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint requirements.txt --editable '.[dev]'
	@touch .venv/setup $@

setup: .venv/setup ## Install what a run needs into .venv
setup-dev: .venv/setup-dev ## Install what tests and training need as well

run: .venv/setup ## Make a dataset with the embedded model: make run [CONF=...] [ARGS='key=value ...']
	$(BIN)/python -m jobs.generate $(CONF) $(ARGS)

test: .venv/setup-dev ## Run the tests (fault injection in reduced number)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m 'not faults' $(ARGS)

test-faults: .venv/setup-dev ## Run the fault injection in full (long)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -m faults $(ARGS)

coverage: .venv/setup-dev ## Run the tests without commands, faults and S3, and say which lines they reach
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -m 'not faults' --cov --cov-report=term \
	    --ignore=tests/jobs --ignore=tests/cluster --ignore=tests/storage --ignore=tests/faults $(ARGS)

lock: ## Renew requirements.lock (what cluster/Dockerfile installs) from requirements.txt; needs `uv`
	uv pip compile pyproject.toml --python-version 3.11 --generate-hashes --constraint requirements.txt \
	    --no-annotate --custom-compile-command 'make lock' --quiet --output-file requirements.lock

lint: .venv/setup-dev ## Check style, types and dead code
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/vulture

format: .venv/setup-dev ## Format the sources
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

parity: .venv/setup-dev ## Compare with the reference's golden tensors: make parity [GOLDEN=...]
	$(BIN)/python -m jobs.parity $(or $(GOLDEN),tests/golden)

bench: .venv/setup ## Time the batched engine against one image at a time
	OMP_WAIT_POLICY=passive $(BIN)/python -m jobs.bench $(ARGS)

bench-plan: .venv/setup ## Memory of planning a run over 10 million prompts
	$(BIN)/python -m jobs.bench plan $(ARGS)

bench-driver: .venv/setup ## The driver's cost for a million units on 1,000 simulated replicas
	$(BIN)/python -m jobs.bench driver $(ARGS)

calibrate: .venv/setup-dev ## Make trials of the embedded model and fit its policies into conf/policies
	OMP_WAIT_POLICY=passive $(BIN)/python -m jobs.calibrate conf/calibrate.yaml $(ARGS)

evaluate: .venv/setup-dev ## Compare all strategies and the emoji policies with base: table, plot, JSON in outputs/evaluation
	OMP_WAIT_POLICY=passive $(BIN)/python -m jobs.evaluate conf/calibrate.yaml --policies conf/policies/emoji_*.json \
	    --sets mixed=conf/prompts/emoji.txt plain=conf/prompts/emoji_plain.txt high=conf/prompts/emoji_high.txt \
	    --headline emoji_certified_0.88 $(ARGS)

certify-check: .venv/setup-dev ## Do certified policies keep their promise? Many splits of what `make calibrate` made
	OMP_WAIT_POLICY=passive $(BIN)/python -m jobs.certify_check conf/calibrate.yaml $(ARGS)

train-emoji: .venv/setup-dev ## Train the embedded model from nothing (hours)
	OMP_WAIT_POLICY=passive $(BIN)/python -m jobs.train_emoji all $(ARGS)

clean: ## Remove what runs and tools left behind
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache
