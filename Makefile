# Two commands are the whole story: `make demo` and `make test`. Both make the environment when it is missing or stale.

PYTHON ?= $(shell for p in python3.11 python3; do "$$p" -c "" >/dev/null 2>&1 && { echo "$$p"; break; }; done)
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.stamp-run
DEV := $(VENV)/.stamp-dev
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow lint clean

help:
	@echo "make env        make the environment $(VENV) for tests (done by the others when missing or stale)"
	@echo "make demo       find a needle in a million bytes, learn to read, write demo/report.html"
	@echo "make test       the suite a change must pass: lint, format, types, tests"
	@echo "make test-slow  the long checks"
	@echo "make lint       ruff and pyright only"
	@echo "make clean      remove build outputs, caches and the demo's output"
	@echo "Variables: PYTHON=python3.12 chooses the interpreter, PYTEST_ARGS='-x -k lanes' what pytest gets."

env: $(DEV)

# Running needs a little more than half of the disk that testing needs (lm-eval, pyarrow and pyright are for tests), so
# each has a stamp. A stamp is removed first and written last: an interrupted install is made again.
$(RUN): pyproject.toml constraints.txt Makefile
	@test -n "$(PYTHON)" || { echo "No Python found. Install Python 3.11 or newer, or say: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	  echo "miras needs Python 3.11 or newer, and $(PYTHON) is $$("$(PYTHON)" --version 2>&1)." >&2; \
	  echo "Name a newer one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@rm -f $(RUN)
	@"$(BIN)/python" -c "import sys; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1 \
	  || "$(PYTHON)" -m venv --clear $(VENV)
	$(PIP) -e .
	@touch $(RUN)

$(DEV): $(RUN)
	@rm -f $(DEV)
	$(PIP) -e ".[dev]"
	@touch $(DEV)

demo: $(RUN)
	$(BIN)/miras demo

test: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/pytest $(PYTEST_ARGS)

test-slow: $(DEV)
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/pyright

# Runs, checkpoints and token caches are the user's and stay. So does the environment: `rm -rf .venv` removes it.
clean:
	rm -rf build dist demo .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	find src -name "*.egg-info" -type d -prune -exec rm -rf {} + 2>/dev/null || true
