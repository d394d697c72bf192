# The two commands are `make demo` and `make test`; each installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Two busy threads that spin while they wait can cost more than the work itself.
export OMP_WAIT_POLICY ?= passive
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow test-lowest lint install clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       prepare, train, calibrate and build the model of the embedded example"
	@echo "make test       the fast tests"
	@echo "make test-slow  the slow tests"
	@echo "make test-lowest  tests with the lowest versions that pyproject.toml allows"
	@echo "make lint       ruff and mypy, as CI runs them"
	@echo "make clean      remove runs/ (not .venv)"

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "NicheCLIP needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: .venv/installed
	rm -rf runs/facades/checkpoints
	$(BIN)/python -m data_prep domains/facades/domain.yaml
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --gpu_ids 0 --mixed_precision no --dynamo_backend no train.py
	$(BIN)/python calibrate.py runs/facades
	$(BIN)/python -m model_card runs/facades --examples 8 --index train test --license apache-2.0

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4

test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --numprocesses 2

# Where the project meets other libraries; in a virtual environment of its own.
test-lowest: .venv-lowest/installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 \
		$(addprefix tests/test_,$(addsuffix .py,data_prep sources recipe published push space onnx))

.venv-lowest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) tests/lowest_versions.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check --constraint .venv-lowest/constraints.txt --editable '.[test]'
	@touch $@

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf runs
