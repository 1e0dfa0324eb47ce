# make demo   create .venv, install, run the demo          make test    the same, then all tests that need no GPU
# make ext    build the extension in the source tree       make lint    ruff, mypy, clang-format: report only
# make gpu    on a machine with a GPU: see benchmarks/h200.sh

PYTHON ?= python3
VENV ?= .venv
# "cuda12" or "cuda13" installs jax for GPUs, which a machine with an NVIDIA driver gets; "nvrtc" the kernel compiler alone.
CUDA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda13 || echo nvrtc)
EXTRAS ?= test,$(CUDA)
# Further requirements, e.g. make test PINS='jax==0.10.2'.
PINS ?=
PYTEST_FLAGS ?=
LINTERS := ruff==0.17.5 mypy==2.4.1 clang-format==23.1.5
SOURCES := jax_deepgemm tests benchmarks examples
DEVICE_CODE := $(shell find ffi include jax_deepgemm -name '*.cc' -o -name '*.h' -o -name '*.cuh' -o -name '*.cu' 2>/dev/null)

.PHONY: demo test ext lint format docs gpu clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m jax_deepgemm demo

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

$(VENV)/.installed: pyproject.toml CMakeLists.txt $(wildcard ffi/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; name another with make PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[$(EXTRAS)]' $(PINS)
	touch $@

ext:
	cmake -S . -B build/ext -DPython_EXECUTABLE=$$(command -v $(PYTHON)) -DJDG_IN_TREE=ON
	cmake --build build/ext --parallel 2

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check --output-format concise $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/mypy jax_deepgemm
	$(VENV)/bin/clang-format --dry-run --Werror $(DEVICE_CODE)

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)
	$(VENV)/bin/clang-format -i $(DEVICE_CODE)

$(VENV)/.lint: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet $(LINTERS)
	touch $@

docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet 'matplotlib>=3.8'
	$(VENV)/bin/python -m jax_deepgemm bench --report benchmarks/results/*.json --write

gpu:
	benchmarks/h200.sh

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
