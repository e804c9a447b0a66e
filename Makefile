# Two commands: `make quickstart` and `make test`. Both make .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest

.PHONY: quickstart test test-lowest check chaos clean

quickstart: $(VENV)/.installed
	$(BIN)/lowvram run recipes/quickstart.yaml --overwrite

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

# With the lowest versions that pyproject.toml allows; the pins of constraints.txt are not there.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -n 2 \
		--deselect tests/test_check.py::test_the_pins_of_this_repository

check: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

# Five minutes: runs that are killed, disks that fail, recipes that are no recipes.
chaos: $(VENV)/.installed
	$(BIN)/python benchmarks/chaos.py --minutes 4 --if-possible
	$(BIN)/python benchmarks/fuzz.py --inputs 1000 --seconds 20

# torch goes first: the other packages then find it there and do not choose a build of their own.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) build dist .pytest_cache .mypy_cache .ruff_cache
