# From a machine with only Python 3.11 and make: `make train` or `make test`. `make help` lists the rest.
PYTHON ?= python3.11
# What pip is told to install as torch. It comes first and alone, so that nothing else picks another build.
TORCH ?= torch==2.13.0
# How many processes share the test suite. Each computes with one thread.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet --quiet
LOCKS := requirements.lock requirements-last.lock requirements-clip.lock
SOURCES := imagerl rl models rewards benchmarks tools tests recipes
STAMP := $(VENV)/installed

# Settings of the caller's shell that would send packages or imports somewhere else.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_CONSTRAINT PIP_REQUIRE_HASHES

.PHONY: help install lint format test slow train results docs pretrain clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null \
		|| sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1  \2/p' Makefile

install: $(STAMP) ## create .venv with everything at the locked versions

$(STAMP): pyproject.toml $(LOCKS)
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) found; install Python 3.11 or say PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
		echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1); the locked packages are for Python 3.11; say PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || { echo "install: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "install: torch"
	@$(PIP) install --constraint requirements.lock "$(TORCH)"
	@echo "install: everything else (some minutes)"
	@$(PIP) install --no-deps --requirement requirements.lock
	@DS_BUILD_OPS=0 $(PIP) install --no-deps --no-build-isolation --force-reinstall --requirement requirements-last.lock
	@rm -rf $(VENV)/clip
	@$(PIP) install --no-deps --target $(VENV)/clip --requirement requirements-clip.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "install: done"

lint: $(STAMP) ## ruff check, ruff format --check and mypy
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy

format: $(STAMP) ## let ruff format and mend what it can
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

test: $(STAMP) ## the test suite, but for what is slow
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist loadfile -m "not slow"

slow: $(STAMP) ## the slow tests: kills, full disks, fuzzing, several processes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist loadfile -m slow

train: $(STAMP) ## post-train the shipped tiny model to spell: recipes/tiny_ocr_grpo.yaml
	@$(BIN)/imagerl train recipes/tiny_ocr_grpo.yaml --overwrite

results: $(STAMP) ## the README's table: 3 seeds, and a control run on shuffled rewards (three quarters of an hour)
	@for seed in 0 1 2; do \
		$(BIN)/imagerl train recipes/tiny_ocr_grpo.yaml --overwrite engine.threads=1 run.seed=$$seed \
			run.output_dir=runs/results/seed-$$seed || exit 1; \
	done
	@$(BIN)/imagerl train recipes/tiny_ocr_grpo.yaml --overwrite engine.threads=1 algorithm.shuffle_rewards=true \
		run.output_dir=runs/results/shuffled-0
	@$(BIN)/python docs/results.py runs/results/seed-* runs/results/shuffled-*

docs: $(STAMP) ## the tables of docs/recipes.md, from the schemas
	@$(BIN)/python docs/make_recipes.py

pretrain: $(STAMP) ## train the tiny model itself again: tools/tiny/tiny_pretrain.yaml
	@$(BIN)/python -m tools.tiny pretrain tools/tiny/tiny_pretrain.yaml

clean: ## remove .venv, caches and build leftovers; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
