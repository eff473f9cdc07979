# Everything a newcomer, a developer and CI run. Needs python3 (3.11 or newer) with venv, and make; no root, no PostgreSQL.

PYTHON ?= python3
WORKERS ?= 2
KILLS ?= 200
SECONDS ?= 3600
FUZZ_SECONDS ?= 600
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt

# What `make coverage` runs: these tests together take every branch of the packages in pyproject.toml. More would only
# take longer. One file or folder a line.
COVERED := \
  tests/unit/test_backoff.py \
  tests/unit/test_faults.py \
  tests/unit/test_delivery.py \
  tests/unit/test_pipeline.py \
  tests/unit/test_plugins.py \
  tests/unit/test_untold_gaps.py \
  $(wildcard tests/unit/test_journal*.py) \
  tests/integration/test_decoder_memory.py \
  tests/integration/test_delivery.py \
  tests/integration/test_delivery_refused.py \
  tests/integration/test_embedded.py \
  tests/integration/test_embedded_faults.py \
  tests/integration/test_grant.py \
  tests/integration/test_sessions.py \
  tests/integration/test_store.py \
  tests/integration/test_tls.py \
  tests/migration

.DEFAULT_GOAL := help
.PHONY: help run test check coverage torture fuzz bench clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

run: $(VENV)/.installed-run ## install, start the embedded PostgreSQL, record a simulated car live until Ctrl-C
	$(BIN)/ingestd demo $(DEMO)

test: check coverage ## everything: the checks and all tests, each of them once
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --ignore tests/unit \
	  $(addprefix --ignore=,$(filter-out tests/unit/%,$(COVERED)))

check: $(VENV)/.installed-test ## under a minute: format, lint, strict types, import rules, unit tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n $(WORKERS) tests/unit

coverage: $(VENV)/.installed-test ## two minutes: every branch that decides over a frame is taken by a test, or it fails
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n $(WORKERS) $(COVERED)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=100

torture: $(VENV)/.installed-test ## the long fault campaign, then ten minutes of fuzz: make torture KILLS=200 SECONDS=3600 SEED=1
	$(BIN)/python -m tests.torture --kills $(KILLS) --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))
	$(BIN)/python -m tests.property.fuzz --seconds $(FUZZ_SECONDS) $(if $(SEED),--seed $(SEED))

fuzz: $(VENV)/.installed-test ## everything that comes from outside, mutated, until the time is over: make fuzz SECONDS=600 SEED=1
	$(BIN)/python -m tests.property.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

bench: $(VENV)/.installed-test ## measure all of it here, ten minutes; make bench BENCH=--quick: one minute
	$(BIN)/python bench $(BENCH)

clean: ## remove the virtual environment and what the tools left behind; no data
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find ingestd migrations tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of extras: a second call installs nothing. The package is installed in place, so its own files
# need no stamp. What the tests need includes all that `make run` needs, hence the second touch.
$(VENV)/.installed-run: $(VENV)/.made $(INPUTS)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[embedded,page]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.made $(INPUTS)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[embedded,mf4,page,bench,test]'
	@touch $@ $(VENV)/.installed-run

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ingestd needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
