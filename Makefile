# Two commands set everything up: `make demo` and `make test`. Each works alone on a fresh clone with Python 3.11+.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2# processes of `make test`, one core each
COVER ?= tests# what `make coverage` runs
STAMP := .venv/.installed

# where it is set, each of the tests' processes would compile the package and rewrite the tests again
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-long check shape coverage docs licences audit clean

# Progress and results in one stream: `make demo > file` has a line at least every 30 seconds.
demo: $(STAMP)
	$(BIN)/apportion demo 2>&1

test: $(STAMP)-dev
	$(BIN)/python -m pytest -m "not long" -n $(JOBS) --dist loadfile

test-long: $(STAMP)-dev
	APPORTION_LONG=1 $(BIN)/python -m pytest

check: $(STAMP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.shape
	$(BIN)/python tools/licences.py --check
	$(MAKE) docs

# Coverage of the tests, subprocesses too; fails unless they run every line of the floors that pyproject.toml lists.
coverage: $(STAMP)-dev
	rm -rf build/coverage && mkdir -p build/coverage
	$(BIN)/python -m coverage run -m pytest $(COVER) -m "not long" -n $(JOBS) --dist loadfile
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --skip-empty
	$(BIN)/python -m coverage json --quiet -o build/coverage/coverage.json
	$(BIN)/python tools/coverage_floors.py build/coverage/coverage.json

# The documentation as a site in site/; a warning is an error.
docs: $(STAMP)-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The figures of the package's shape, each with its limit.
shape: $(STAMP)-dev
	$(BIN)/python -m tools.shape

licences: $(STAMP)-dev
	$(BIN)/python tools/licences.py

# Asks the vulnerability service for every locked version; --strict, since a package that it does not know is no answer.
audit:
	test -x .venv/audit/bin/pip-audit || $(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements.lock -r requirements-dev.lock

# Says every 20 seconds that pip is still at work, so that the log of an install is never silent for long.
define pip_install
@ticks() { while sleep 20 >/dev/null 2>&1; do n=$$((n + 20)); echo "still installing, $$n s so far"; done; }; \
ticks & ticker=$$!; trap 'kill $$ticker' EXIT INT TERM; \
$(BIN)/python -m pip install --quiet --disable-pip-version-check
endef

$(STAMP): pyproject.toml requirements.lock
	@echo "Installing the locked packages in .venv: 2 to 4 minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(pip_install) --requirement requirements.lock
	$(pip_install) --no-deps --no-build-isolation --editable .
	touch $@

$(STAMP)-dev: $(STAMP) requirements-dev.lock
	$(pip_install) --requirement requirements-dev.lock
	touch $@

clean:
	rm -rf .venv build site src/*.egg-info
