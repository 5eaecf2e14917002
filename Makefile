# The commands that people, CI and the README share. Each sets up what it needs: only Python, pip and make must be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Another environment, with the oldest transformers that pyproject.toml allows (and the hub's client of its time).
OLDEST := $(VENV).oldest
TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
# The tests of what meets transformers; TESTS=tests for all.
TESTS := $(addsuffix .py,$(addprefix tests/test_,adapter cli conformance dense engine evaluation focus generate harness \
	heads llm models opened packed serving training windows))

# So many processes run the tests, a thread each; one that has none left takes over some of another's.
PROCESSES ?= 2
PYTEST := python -m pytest --numprocesses $(PROCESSES) --dist worksteal

.PHONY: help demo test test-slow test-oldest lint check format clean
.DEFAULT_GOAL := help

help:  ## Show these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OLDEST)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(transformers|huggingface_hub)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt \
		--editable '.[dev]' 'transformers==$(TRANSFORMERS)'
	touch $@

demo: $(READY)  ## Ask three questions about a document; SIZE=large for one of 110K tokens
	SIZE=$(SIZE) $(BIN)/python examples/ask_long_document.py

test: $(READY)  ## Run the tests
	$(BIN)/$(PYTEST)

test-slow: $(READY)  ## Run the longer checks too
	$(BIN)/$(PYTEST) -m 'slow or not slow'

test-oldest: $(OLDEST)/ready  ## Run the tests of what meets transformers with its oldest version
	$(OLDEST)/bin/$(PYTEST) -m 'slow or not slow' $(TESTS)

lint: $(READY)  ## Formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## The whole gate: lint, types, tests

format: $(READY)  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environments
	rm -rf $(VENV) $(OLDEST)
