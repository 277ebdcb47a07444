.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 12), (3, 13)])' || \
		{ echo "error: Python 3.12 or 3.13 is needed; $(PYTHON) is another. Say: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "installing into .venv: a few minutes, about 5 GB"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -q -c constraints.txt -e '.[test,dev,docs]'
	@touch $@

quickstart: .venv/installed ## the main job: distil a small model on this machine, about ten minutes
	@PATH="$(CURDIR)/$(BIN):$$PATH" nemo distill quickstart --yes $(ARGS)

test: .venv/installed ## the test suite, without long matrices of layouts and tests/launch, in three processes
	@$(BIN)/python -m pytest -n 3 $(ARGS)

test-long: .venv/installed ## what make test leaves out: further layouts, benchmarks, memory over many steps: ten minutes
	@$(BIN)/python -m pytest -n 2 -m long $(ARGS)

test-launch: .venv/installed ## runs on SLURM (apt, root) and on a Kubernetes, both on this machine: a few minutes
	@$(BIN)/python -m pytest tests/launch $(ARGS)

test-versions: .venv/installed ## a third of the suite on the oldest and the newest packages; writes docs/compatibility.md in half an hour
	@$(BIN)/python -W ignore -m tests.versions $(ARGS)

parity: .venv/installed ## every layout, model and loss against fp64; writes docs/parity.md in 90 minutes (--resume goes on)
	@$(BIN)/python -W ignore -m tests.parity $(ARGS)

models: .venv/installed ## import and export of every model family against transformers; writes docs/models.md in two minutes
	@$(BIN)/python -W ignore -m tests.families $(ARGS)

recipes: .venv/installed ## layouts, memory and cost of the recipes for released models; writes recipes/planned.json
	@$(BIN)/python -W ignore -m tests.recipes

bench: .venv/installed ## cost of losses and steps beside other implementations, on this machine; writes docs/performance.md
	@$(BIN)/python -W ignore -m benchmarks.kl $(ARGS)
	@$(BIN)/python -W ignore -m benchmarks.fused_linear
	@$(BIN)/python -W ignore -m benchmarks.step
	@$(BIN)/python -W ignore -m benchmarks.convert
	@$(BIN)/python -W ignore -m benchmarks.prepare
	@$(BIN)/python -W ignore -m benchmarks.teacher_store
	@$(BIN)/python -m benchmarks.report

gpu: .venv/installed ## tests and benchmarks on a GPU, in parts of nine minutes; repeat to continue
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

soak: .venv/installed ## a run with twenty faults must end like an uninterrupted one; writes docs/reliability.md
	@$(BIN)/python -W ignore -m tests.soak $(ARGS)

docs: .venv/installed ## the documentation as a site, in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo build/site/index.html

lint: .venv/installed ## ruff, codespell, docstrings, pyright, import layers
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/codespell && $(BIN)/python .ci/docstrings.py && $(BIN)/pyright && $(BIN)/lint-imports

clean: ## remove files of runs and tests, keep .venv
	@rm -rf runs build .pytest_cache .ruff_cache

.PHONY: help quickstart test test-long test-launch test-versions parity models recipes soak gpu bench docs lint clean
