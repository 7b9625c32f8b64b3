# Every verb makes itself ready first (scripts/setup, quick when there is nothing to do).
PYTHON := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup demo test coverage check bench faults soak fuzz proto clean

help:           ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */make \1\t/' | expand -t 14

setup:          ## install what is missing: Debian packages (as root) and .venv
	@scripts/setup

demo: setup     ## show the main job with real parts (root); ARGS="--help" for options
	@$(PYTHON) -m demo $(ARGS)

test: setup     ## all tests, in two processes; what this machine cannot run is skipped; ARGS="-k name" selects, in one
	@$(PYTHON) -m tests $(ARGS)

coverage: setup ## the same, measured (two to three times as long): which failure paths no test has walked
	@$(PYTHON) -m tests --coverage $(ARGS)

check: setup    ## ruff and mypy
	@.venv/bin/ruff check .
	@.venv/bin/mypy

bench: setup    ## measure speed and memory (root), write bench/results; ARGS="first_line" selects
	@$(PYTHON) -m bench $(ARGS)

faults: setup   ## break everything around running containers (root), print what their reads noticed; ARGS="registry --long"
	@$(PYTHON) -m tests.faults $(ARGS)

soak: setup     ## the fault suite's long form (root): an hour of churn in 256 MiB; ARGS="node" selects others
	@$(PYTHON) -m tests.faults --long $(or $(ARGS),memory)

fuzz: setup     ## fuzz what parses bytes from outside, a minute each; ARGS="tar token --seconds 600"
	@$(PYTHON) -m pip install --quiet --constraint constraints.txt atheris
	@$(PYTHON) -m tests.fuzz $(ARGS)

proto: setup    ## make the gRPC modules from the .proto files anew
	@scripts/proto

clean:          ## remove caches and .venv; bench/results stays
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
