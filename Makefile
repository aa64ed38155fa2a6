# make env    the environment, in .venv/
# make demo   environment, a 2-process run on real data, what came out
# make test   environment, all tests          make test-quick   the ones that take seconds
# make lint   environment, ruff and mypy
# make docs   environment, the documentation as a site in site/; warnings are errors
#
# All of it from a bare checkout with Python 3.11 or 3.12; nothing is installed a second time.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# Files of tests, so many at a time: most of a test's time is spent waiting for a server, a limit or other ranks.
# In the order of their names: by the number of their tests the longest would come last, and one process have them.
TEST_PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
DEMO_DIR ?= $(shell mktemp -d -t harness-demo-XXXXXX)

.PHONY: env demo test test-quick lint docs format
.DELETE_ON_ERROR:

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or 3.12 (set PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@cd "$(DEMO_DIR)" && "$(CURDIR)/$(BIN)/harness" launch --strategy ddp --num_processes 2 \
		--config "$(CURDIR)/configs/digits.yaml" --checkpoint.every_n_epochs 2

test: $(STAMP)
	$(PYTEST)

test-quick: $(STAMP)
	$(PYTEST) tests/unit

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
