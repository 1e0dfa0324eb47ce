# make demo   create .venv, install, run the demo          make test    the same with what tests need, then all tests that need no GPU
# make ext    build the extension in the source tree       make lint    ruff, mypy, clang-format: report only
# make docs   tables and plots from the result files       make gpu     on a machine with a GPU: see benchmarks/h200.sh

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# A machine with an NVIDIA driver gets jax for GPUs ("cuda13" or "cuda12"), another one the compilers alone.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
CUDA ?= $(if $(GPU),cuda13,nvrtc)
EXTRAS ?= flax,$(CUDA)
TEST_EXTRAS ?= test,$(CUDA)$(if $(GPU),,$(comma)aot)
# Further requirements, e.g. make test PINS='jax==0.10.2'.
PINS ?=
# Processes that run tests; a file of tests stays in one of them.
WORKERS ?= 2
PYTEST_FLAGS ?=
LINTERS := ruff==0.17.5 mypy==2.4.1 clang-format==23.1.5
SOURCES := jax_deepgemm tests benchmarks examples
DEVICE_CODE := $(shell find ffi include jax_deepgemm -name '*.cc' -o -name '*.h' -o -name '*.cuh' -o -name '*.cu' 2>/dev/null)
comma := ,

# $(call wait,COMMAND): a dot every five seconds while it runs.
wait = (while sleep 5 >/dev/null 2>&1; do printf . >&2; done & trap "kill $$!; echo >&2" EXIT; $(1))
# $(call install,EXTRAS)
install = $(call wait,$(VENV)/bin/python -m pip install --quiet --upgrade pip && $(VENV)/bin/python -m pip install --quiet --editable '.[$(1)]' $(PINS))

.PHONY: demo test ext lint format docs gpu clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m jax_deepgemm demo

test: $(VENV)/.tests
	@echo "Running the tests in $(WORKERS) processes: about 50 minutes on two cores. A line names what runs whenever 20 s pass in silence."
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml CMakeLists.txt $(wildcard ffi/*) | $(VENV)/bin/python
	@echo "Installing jax_deepgemm[$(EXTRAS)] into $(VENV): $(if $(GPU),5.5,1.2) GB, about a minute and the download; a dot every 5 s."
	@$(call install,$(EXTRAS))
	@touch $@

$(VENV)/.tests: pyproject.toml CMakeLists.txt $(wildcard ffi/*) | $(VENV)/bin/python
	@echo "Installing jax_deepgemm[$(TEST_EXTRAS)] into $(VENV): $(if $(GPU),6,1.9) GB, about a minute and the download; a dot every 5 s."
	@$(call install,$(TEST_EXTRAS))
	@touch $@ $(VENV)/.installed

ext:
	cmake -S . -B build/ext -DPython_EXECUTABLE=$$(command -v $(PYTHON)) -DJDG_IN_TREE=ON
	cmake --build build/ext --parallel 2

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check --output-format concise $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/mypy # of the package, and of what a user's editor sees: tests/public/user_types.py
	$(VENV)/bin/clang-format --dry-run --Werror $(DEVICE_CODE)

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)
	$(VENV)/bin/clang-format -i $(DEVICE_CODE)

$(VENV)/.lint: $(VENV)/.installed
	@echo "Installing the linters into $(VENV)"
	@$(call wait,$(VENV)/bin/python -m pip install --quiet $(LINTERS))
	@touch $@

docs: $(VENV)/.installed
	@echo "Installing matplotlib into $(VENV)"
	@$(call wait,$(VENV)/bin/python -m pip install --quiet 'matplotlib>=3.8')
	$(VENV)/bin/python -m jax_deepgemm bench --report benchmarks/results/*.json --write

gpu:
	benchmarks/h200.sh

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
