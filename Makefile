# Needs Python 3.11+ and make; uses uv where it is on PATH.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.weft-installed
# Later areas join the type check as soon as they hold code.
TYPED := $(wildcard protocols/src mesh/src coordinator/src agents/src tests) $(if $(wildcard bench/*.py),bench)

.DEFAULT_GOAL := help
.PHONY: help install demo test check format bench clean distclean

help:
	@echo 'make demo       run a broker and agents on this machine, and a task through them'
	@echo 'make test       run the test suite'
	@echo 'make check      formatting, lint, types and import rules'
	@echo 'make format     format the sources and apply safe lint fixes'
	@echo 'make bench      run the benchmarks'
	@echo 'make clean      remove caches and build results'
	@echo 'make distclean  remove .venv as well'

install: $(STAMP)

# The stamp is older than its inputs after a change of dependencies or of the package layout.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	    echo 'weft: "$(PYTHON)" not found. Install Python 3.11 or newer, or run: make PYTHON=/path/to/python' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "weft: needs Python 3.11 or newer, but $(PYTHON) is $$("$(PYTHON)" -V 2>&1). Run: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo 'weft: creating $(VENV)' >&2; "$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; }
	@set -e; \
	if command -v uv >/dev/null 2>&1; then \
	    echo 'weft: installing with uv' >&2; \
	    uv pip install --quiet --python $(BIN)/python --require-hashes -r constraints.txt; \
	    uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	else \
	    echo 'weft: installing with pip, this takes a minute' >&2; \
	    $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r constraints.txt; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	fi
	@touch $@

demo: $(STAMP)
	$(BIN)/mesh demo

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python bench/run.py

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache htmlcov
	rm -f .coverage .coverage.*
	find protocols mesh coordinator agents tests bench -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)
