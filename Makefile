# Every target makes the virtual environment first where there is none: Python 3.11 or later and make are all that is needed.
PYTHON ?= python3
ENVIRONMENT := .venv
READY := $(ENVIRONMENT)/.ready
BIN := $(ENVIRONMENT)/bin
ARGS ?=

.PHONY: help train test lint types clean

help:
	@echo "make train   train the small equilibrium language model on Python's own source and write a report"
	@echo "make test    run the tests"
	@echo "make lint    check style and layout of the code (ruff)"
	@echo "make types   check the types (pyright)"
	@echo "make clean   remove the virtual environment, caches and build products; runs are kept"
	@echo
	@echo 'ARGS passes on more, as in  make train ARGS="--data book.txt"  or  make test ARGS="-k adjoint -x"'
	@echo "PYTHON chooses the interpreter, as in  make test PYTHON=python3.12"

train: $(READY)
	$(BIN)/onelayer train --preset small $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n 2 $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright

clean:
	rm -rf $(ENVIRONMENT) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(ENVIRONMENT)/*' -prune -exec rm -rf {} +

# The stamp is as new as the environment is complete: an installation that broke off, or new requirements, run it again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "This needs Python 3.11 or later, which $(PYTHON) is not: make $(MAKECMDGOALS) PYTHON=python3.12 names another."; \
		exit 1; }
	@echo "Installing into $(ENVIRONMENT), which takes a few minutes the first time ..."
	@$(PYTHON) -m venv $(ENVIRONMENT)
	@$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@
