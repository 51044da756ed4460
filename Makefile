# Everything is set up in .venv, from nothing but Python 3.11 and make.
PYTHON ?= python3.11
BIN := .venv/bin
IS_COMPLETE := -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))'
INCOMPLETE := $(shell $(BIN)/python $(IS_COMPLETE) 2>/dev/null || echo anew)

# What the caller's own pip and Python are told to do is not for this one.
export PIP_USER := 0
unexport PIP_TARGET PIP_PREFIX PYTHONPATH PYTHONHOME

.PHONY: demo test bench lint lock clean anew

demo: .venv/.demo
	$(BIN)/fullfield demo

# Two processes of one thread each, a file of tests after the other: threads that wait for each other take longer.
test: .venv/.test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

bench: .venv/.bench
	$(BIN)/python -m benchmarks.bench

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What an earlier call began and left half made, or has lost its Python, is made anew; not so what somebody else put there.
# torch comes first and by itself: with an open range pip may take a build for GPUs that is gigabytes larger.
.venv/.torch: pyproject.toml requirements.lock $(INCOMPLETE)
	$(BIN)/python $(IS_COMPLETE) 2>/dev/null || { test -e .venv && test ! -e .venv/.begun; } || \
		{ rm -rf .venv && mkdir .venv && touch .venv/.begun && $(PYTHON) -m venv .venv; }
	@$(BIN)/python $(IS_COMPLETE) 2>/dev/null || \
		{ echo ".venv is no environment of Python 3.11 with pip: remove it, and say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint requirements.lock torch==2.13.0
	touch $@

# Each by itself, so that what tests need is resolved and installed in one go.
.venv/.demo: .venv/.torch
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable .
	touch $@

.venv/.test: .venv/.torch
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[test]"
	touch $@

.venv/.bench: .venv/.torch
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[bench]"
	touch $@

# After a change of pyproject.toml: install what it asks for, then write down what was installed.
lock: .venv/.test
	$(BIN)/python -m pip freeze --exclude-editable | sed -e 's/+cpu$$//' > requirements.lock

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
