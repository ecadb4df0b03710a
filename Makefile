# `make demo` and `make test` do all their own set-up; a second call skips what is done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup servers demo demo-quick test lint types imports unit bench-quick format grpc lock clean

help:
	@echo "make setup       virtual environment in $(VENV), everything installed as locked; servers for the tests"
	@echo "make demo        the whole loop on a year of flights (about a quarter of an hour)"
	@echo "make demo-quick  the same on one airport and one quarter (a few minutes)"
	@echo "make test        lint, types, import contract, all tests"
	@echo "make bench-quick every benchmark at a reduced size"

setup: $(READY) servers

# Redis and PostgreSQL, which some tests and benchmarks run against; elsewhere nothing needs them.
servers:
	@sh setup/servers.sh

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is `$(PYTHON) --version 2>&1`. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[examples,dev]'
	@touch $(READY)

demo: setup
	$(BIN)/mlops-ray run workflow=loop project=flights --save-to .

demo-quick: setup
	$(BIN)/mlops-ray run workflow=loop project=flights_quick --save-to quick

test: setup lint types imports unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports --no-cache

unit: setup
	$(BIN)/python -m pytest -q

# Keeps the benchmarks alive; figures come from `python -m benchmarks NAME`, on a quiet machine.
bench-quick: setup
	@for name in asof_join batch_scoring online_read materialize orchestration pipeline serving; do \
	  $(BIN)/python -m benchmarks $$name --quick --json || exit 1; done

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the descriptors that the gRPC service reads; a test compares them with the .proto file.
grpc: setup
	$(BIN)/python -m grpc_tools.protoc -I mlops_ray/serving/grpc \
	  --descriptor_set_out=mlops_ray/serving/grpc/open_inference.binpb open_inference.proto

# Writes the versions that are installed now; edit pyproject.toml and reinstall first.
lock: setup
	$(BIN)/python -m pip freeze --exclude-editable --exclude mlops-ray | sed 's/+cpu$$//' > requirements.lock

clean:
	rm -rf .mlops-ray report.html report.json quick build dist
