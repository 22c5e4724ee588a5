# Two commands set up everything they need: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Every pip call, the isolated build environments included, sees the pins.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Two threads gain nothing on tiny models and lose much when anything else runs.
export OMP_NUM_THREADS ?= 1
TIERS := not slow and not soak and not weights and not gpu

.PHONY: help demo test slow lint wheel install clean

help:  ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## / - /'

install: $(STAMP)  ## create .venv and install everything, pinned

$(STAMP): setup.cfg pyproject.toml constraints.txt align/doctor.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "align needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/align doctor --fix
	touch $@

demo: $(STAMP)  ## the whole loop on the embedded model, from thumbs to a receipt: runs/demo/report.html
	$(BIN)/align demo --overwrite
	@echo "Open runs/demo/report.html in a browser; the numbers are in runs/demo/summary.json."

lint: $(STAMP)
	$(BIN)/ruff check align rewards trainers scripts tests

test: $(STAMP) lint  ## lint, the default tests, and the wheel in an environment of its own
	$(BIN)/python -m pytest -n 2 -m "$(TIERS)"
	$(MAKE) wheel

slow: $(STAMP)  ## the slow tests
	$(BIN)/python -m pytest -n 2 -m "slow and not soak"

wheel: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/check_wheel.sh

clean:  ## remove the environment and build products; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
