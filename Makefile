# Two commands set everything up: `make demo` and `make test`. Each works alone on a fresh clone with Python 3.11+.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2# processes of `make test`, one core each
STAMP := .venv/.installed

.PHONY: demo test test-long check clean

demo: $(STAMP)
	$(BIN)/apportion demo

test: $(STAMP)-dev
	$(BIN)/python -m pytest -m "not long" -n $(JOBS) --dist loadfile

test-long: $(STAMP)-dev
	APPORTION_LONG=1 $(BIN)/python -m pytest

check: $(STAMP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/size_budget.py

$(STAMP): pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

$(STAMP)-dev: $(STAMP) requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.lock
	touch $@

clean:
	rm -rf .venv build src/*.egg-info
