# make bench, make test : install everything into the virtual environment .venv, then run.
# make bench VENV= : runs in the active environment, with its torch.
# make cuda-build-check : builds against a CUDA torch (several GB); needs nvcc, but no GPU.
# make test-matrix ARGS="--session torch-2.6.0-py3.12 -- --discard" : runs the tests with one of the
#   versions of docs/versions.md, in its own environment (5 GB), and deletes that; without ARGS it
#   runs all versions; ARGS=--list shows them.
# make test-oldest : tests the command line with the lower bounds of its packages, in an environment
#   of 5 GB that is deleted afterwards.
# make sanitize : tests the compiled module under sanitizers; ARGS=--quick: only the CPU kernels.
# make coverage ARGS="-k gradients" : shows which lines and branches of Python and C++ tests run.
# make mutants : puts faults into the sources one by one, and shows whether the tests find them.
# make fuzz CASES=10000 : tests each property with 10000 random cases.
# make audit : lists known weaknesses of the packages that this package and its extras need, as they
#   are installed here; fails if the weaknesses cannot be looked up.
# make wheel : builds a wheel, and tests it in a fresh environment.
# make docs : builds the site of the documentation into build/site; any warning is an error.
# make wheels : builds an sdist, a pure wheel and a wheel for each of TORCHES into dist/; see
#   docs/install.md.
# make gpu-check VENV= OUT=folder : runs all checks on a machine with a GPU; installs nothing.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0 triton==3.7.1
JOBS ?= 2
OUT ?= benchmarks/out/gpu
CASES ?= 10000
TORCHES ?= 2.6.0 2.7.1 2.8.0 2.9.1 2.10.0 2.11.0 2.12.1 2.13.0 2.14.1
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.11.0

ifeq ($(strip $(VENV)),)
BIN :=
PY := $(PYTHON)
else
BIN := $(VENV)/bin/
PY := $(BIN)python
endif
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := build/stamps/$(subst /,_,$(or $(strip $(VENV)),active))
CPP := $(shell find csrc tests/simt tests/cpu -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build bench test test-matrix test-oldest sanitize coverage mutants fuzz audit wheel wheels \
  gpu-check cuda-build-check docs lint format clean

# torch comes first, because the compiled module is built against the installed torch. Tests build
# models of encodec and ChatTTS, which work without torchaudio and other dependencies of these two.
$(STAMP): pyproject.toml
	@mkdir -p $(@D)
	$(if $(BIN),$(PYTHON) -m venv $(VENV))
	$(PY) -c 'import torch' 2>/dev/null || $(PIP) install -q $(TORCH)
	$(PIP) install -q 'setuptools>=77' ninja pybind11
	WNKERNEL_BUILD=none $(PIP) install -q --no-build-isolation \
	  -e '.[audit,bench,coverage,docs,lint,matrix,release,test]'
	$(PIP) install -q --no-deps encodec einops ChatTTS
	@touch $@

# The build is incremental: it compiles changed files only, or everything if torch has changed.
build: $(STAMP)
	$(PY) setup.py -q build_ext --inplace

bench: build
	$(PY) -m benchmarks $(ARGS)

# With the passive policy, threads that wait for each other do not spin and block other processes.
test: build
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS) $(ARGS)

# sanitize and coverage build the module in a copy of this folder, below build/.
sanitize: $(STAMP)
	$(PY) -m tests.instrumented $(ARGS)

coverage: $(STAMP)
	$(PY) -m tests.measured $(ARGS)

mutants: build
	WNKERNEL_MUTANTS=1 $(PY) -m pytest -q -n $(JOBS) tests/core/test_cpu_mutants.py tests/cuda/test_mutants.py
	$(PY) -m tests.mutation $(ARGS)

fuzz: build
	OMP_WAIT_POLICY=passive WNKERNEL_FUZZ_CASES=$(CASES) $(PY) -m pytest -n $(JOBS) tests/fuzz $(ARGS)

audit: $(STAMP)
	$(PY) -m tests.audit $(ARGS)

wheel: $(STAMP)
	rm -rf dist
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	$(PY) -m tests.wheel dist/*.whl

wheels: $(STAMP)
	rm -rf dist
	$(PY) -m buildtools.wheels dist --torch $(TORCHES)

# A leg is skipped if its Python is missing. The table shows all legs that were ever run.
test-matrix: $(STAMP)
	$(PY) -m nox $(ARGS); status=$$?; $(PY) -m tests.matrix table; exit $$status

test-oldest: $(STAMP)
	$(PY) -m nox --error-on-missing-interpreters --session oldest -- --discard

# gpu_check builds the module itself, so that a failed build does not stop the other checks.
gpu-check: $(if $(BIN),$(STAMP))
	$(PY) -m tools.gpu_check --out '$(OUT)' $(ARGS)

cuda-build-check:
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -c 'import torch, setuptools, ninja, pybind11, numpy' 2>/dev/null || \
	  $(CUDA_VENV)/bin/pip install -q $(CUDA_TORCH) 'setuptools>=77' ninja pybind11 numpy
	WNKERNEL_BUILD=cuda $(CUDA_VENV)/bin/python setup.py -q build --build-base build/cuda \
	  --build-lib build/cuda/lib
	cd build/cuda/lib && $(abspath $(CUDA_VENV))/bin/python - < $(CURDIR)/tests/cuda/build_check.py

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(BIN)lint-imports --no-logo --no-cache
	$(BIN)clang-format --dry-run --Werror $(CPP)

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(BIN)clang-format -i $(CPP)

clean:
	rm -rf build dist *.egg-info wnkernel/_C*.so wnkernel/_build_info.py
