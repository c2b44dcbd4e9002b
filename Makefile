# Everything happens in .venv, made from Python 3.11 or later alone:
#   make demo       environment, install, and the quickstart simulation on screen
#   make test       the fast test suite          make test-slow   the tests marked slow
#   make test-gpu   the tests that need a CUDA device, with that machine's torch
#   make cpu-profile  measure this CPU again, then thirty fresh points of the layer (six quiet minutes)
#   make routing-lm   train the small MoE model under each balancing method, record its routing (an hour of one core)
#   make claims     what papers state beside what this version does, the three pages anew (some ten minutes)
#   make offload-real  the mini-runtime against the simulator, reads from this disk (six quiet minutes, 400 MB)
#   make check      style, types, import order   make lint        repair what ruff can repair
#   make validation the table of errors, results/validation/README.md, from what is committed
#   make contested  three contested choices on this CPU, every candidate measured (ten quiet minutes)
#   make campaign   `moesim tune` killed 200 times, nothing lost (ten quiet minutes)
#   make bench      the asv benchmarks of this checkout
#   make clean      remove the environment and every cache (results/ stays)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
PYTEST_ARGS ?= -n auto

.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-gpu cpu-profile routing-lm claims offload-real validation contested campaign check lint bench clean

help:
	@sed -n 's/^#   /  /p' Makefile

# Stamps record what is installed; a run without the dev extras needs only the first two.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	$(PIP) -e .
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.stamp-run $@

demo: $(VENV)/.stamp-run
	$(BIN)/moesim simulate workloads/quickstart.yaml

test: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

test-gpu:
	$(PYTHON) -m pytest -m gpu tests/kernels

cpu-profile: $(VENV)/.stamp-dev
	$(BIN)/moesim calibrate workloads/calibrate_cpu.yaml --fresh --budget 5m --out hw_profiles/cpu_epyc_1thread.yaml
	$(BIN)/python benchmarks/kernels/cpu_holdout.py hw_profiles/cpu_epyc_1thread.yaml

LM := PYTHONPATH=kernels $(BIN)/python -m moesim_kernels.lm
routing-lm: $(VENV)/.stamp-dev
	$(LM) compare --keep results/routing-lm --out results/validation/routing_maxvio.json
	$(LM) record --model results/routing-lm/loss_free --out workloads/routing/stdlib_moe_loss_free.npz
	$(LM) record --model results/routing-lm/auxiliary_loss --out workloads/routing/stdlib_moe_auxiliary_loss.npz
	$(BIN)/python benchmarks/routing/maxvio.py

claims: $(VENV)/.stamp-dev
	$(BIN)/python benchmarks/routing/claims.py
	$(BIN)/python benchmarks/placement/claims.py
	$(BIN)/python benchmarks/offload/claims.py

offload-real: $(VENV)/.stamp-dev
	$(BIN)/python benchmarks/offload/real_against_simulated.py --link disk

validation: $(VENV)/.stamp-dev
	$(BIN)/python benchmarks/validation/page.py

contested: $(VENV)/.stamp-dev
	$(BIN)/python benchmarks/validate/spaces.py

campaign: $(VENV)/.stamp-dev
	$(BIN)/python benchmarks/tuner/kill_campaign.py --out results/validation/tuner_kills.md

check: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.stamp-dev
	$(BIN)/asv machine --yes
	$(BIN)/asv run --environment existing:$(abspath $(BIN)/python) --set-commit-hash "$$(git rev-parse HEAD)" --show-stderr

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
