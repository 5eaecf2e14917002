# The commands that people, CI and the README share. Each sets up what it needs: only Python, pip and make must be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: help demo test test-slow lint check format clean
.DEFAULT_GOAL := help

help:  ## Show these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## Ask a question about a document of 110K tokens with the embedded model
	$(BIN)/python examples/ask_long_document.py

test: $(READY)  ## Run the tests
	$(BIN)/python -m pytest

test-slow: $(READY)  ## Run the longer checks too
	$(BIN)/python -m pytest -m 'slow or not slow'

lint: $(READY)  ## Formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## The whole gate: lint, types, tests

format: $(READY)  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment
	rm -rf $(VENV)
